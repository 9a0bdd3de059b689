"""What a sweep is: which settings vary and over which values, how points are chosen, and when a trial is given up.

`jobs.sweep.parser` reads one from words and files; one frozen `Sweep` is kept in the sweep's directory. Values are kept as a
person writes them: a trial is the job with these words over it.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.config.resolver import Resolved, amend, given_values
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.core import safe_read
from jobs.core.errors import ImpossibleJobError, SettingError

# The most trials of a sweep, as of any array.
MAX_TRIALS = 10_000
# So many points are tried before anything is queued; a grid is tried whole.
_MOST_TRIED = 512
# Combinations that cannot run are named up to this number, then counted.
_NAMED = 5

Value = str | int | float


class Dimension(BaseModel):
    """One setting that varies: over `choices`, or from `low` to `high`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    key: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def label(self) -> str:
        """LR, or MODEL_OPTIONS.d_model."""
        return self.name.upper() + (f".{self.key}" if self.key else "")

    def text(self) -> str:
        """As it would be written behind --over."""
        if self.choices:
            return f"{self.label}={','.join(self.choices)}"
        # Under a key nothing but the point tells 0.0..1.0 from 0..1.
        low, high, step = (repr(item) if self.key and not self.whole else number(item, self.whole) for item in (self.low, self.high, self.step))
        how = ":log" if self.log else f":step={step}" if self.step else ""
        return f"{self.label}={low}..{high}{how}"

    @property
    def count(self) -> int | None:
        """How many values it can take; None for a range that nobody would list: of real numbers without a step, or with :log."""
        if self.choices:
            return len(self.choices)
        assert self.low is not None and self.high is not None
        if self.log or not (self.whole or self.step):
            return None
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    def at(self, index: int) -> Value:
        """Its value of this index, where it has a count."""
        if self.choices:
            return self.choices[index]
        assert self.low is not None and self.high is not None
        value = self.low + index * (self.step or 1)
        # 0.30000000000000004 is 0.3, and no rounding leads out of the range.
        return int(value) if self.whole else min(max(float(f"{value:.12g}"), self.low), self.high)

    def ends(self) -> list[Value]:
        """The values that are tried up front: every choice, or both ends of the range."""
        if self.choices:
            return list(self.choices)
        if self.count is not None:
            return [self.at(0), self.at(self.count - 1)]
        assert self.low is not None and self.high is not None
        return [int(value) if self.whole else value for value in (self.low, self.high)]

    def anywhere(self, chance: random.Random) -> Value:
        """Some value that a sampler might choose."""
        if self.count is not None:
            return self.at(chance.randrange(self.count))
        assert self.low is not None and self.high is not None
        return chance.randint(int(self.low), int(self.high)) if self.whole else chance.uniform(self.low, self.high)


class Sweep(BaseModel):
    """A sweep, checked. Fields with a description are its options: `--metric` on the command line, `metric:` in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: tuple[Dimension, ...] = Field(description="settings and what each varies over")
    trials: int = Field(description="runs in all; of a grid, its points", ge=1, le=MAX_TRIALS)
    parallel: int = Field(
        description="trials that may run at the same time; left out, ARRAY_PARALLEL, and with tpe a quarter of the trials, so that later ones learn from earlier ones",
        ge=1,
    )
    sampler: Literal["grid", "random", "tpe"] = Field(
        description="who chooses the values: grid takes each point once, random draws, tpe (Optuna's) learns; left out, grid where all values can be listed and no number of trials is given, else tpe"
    )
    metric: str = Field("val_loss", description="what is compared: a name in metrics.jsonl")
    direction: Literal["minimize", "maximize"] = Field("minimize", description="whether less or more of it is better")
    value: Literal["last", "best"] = Field("last", description="which of a run's values counts: that of its last validation, or its best")
    pruner: Literal["none", "median"] = Field(
        "none", description="median gives a trial up when its best value so far is worse than the median of the others at the same step"
    )
    prune_startup: int = Field(5, description="trials that must be over before one is given up", ge=1)
    prune_after: int = Field(0, description="steps that every trial may make", ge=0)
    sampler_seed: int = Field(0, description="seed of the sampler; together with a trial's number it decides what is drawn", ge=0)
    job: str = ""
    words: tuple[str, ...] = ()

    @property
    def has_study(self) -> bool:
        """Whether Optuna is asked: for values, or whether to give a trial up."""
        return self.sampler != "grid" or self.pruner != "none"

    def dimension(self, label: str) -> Dimension:
        return next(dimension for dimension in self.over if dimension.label == label)

    def refusal(self, values: Mapping[str, Any]) -> str:
        """Why values, as label -> value, are none of this sweep; empty where they are."""
        for label in {one.label for one in self.over} ^ set(values):
            return f"{label[:80]} {'is no setting of the sweep' if label in values else 'has no value'}"
        for one in self.over:
            if not (str(values[one.label]) in one.choices if one.choices else safe_read.is_number(values[one.label])):
                return f"{one.label} is {safe_read.describe(values[one.label])}; allowed: {one.text()}"
        return ""

    def point(self, index: int) -> dict[str, Value]:
        """The values of one point of a grid, as label -> value. The last setting varies fastest."""
        chosen = {}
        for dimension in reversed(self.over):
            assert dimension.count is not None
            index, place = divmod(index, dimension.count)
            chosen[dimension.label] = dimension.at(place)
        return {dimension.label: chosen[dimension.label] for dimension in self.over}


def number(value: float | None, whole: bool) -> str:
    """A number as a person would write it; reading it back gives the same one."""
    return str(int(value)) if whole and value is not None else repr(value).removesuffix(".0")


def load(path: Path) -> Sweep:
    """The sweep that is kept in a sweep's directory. Raises SettingError when the file is damaged."""
    try:
        return Sweep.model_validate_json(safe_read.read_bytes(path))
    except (OSError, ValidationError) as err:
        raise SettingError(f"{path}: not a sweep that this version can read: {str(err).splitlines()[0]}") from err


def words_of(sweep: Sweep, base: Job, values: Mapping[str, Any]) -> list[str]:
    """The KEY=value words of one point; keys of a mapping are put into the job's own mapping."""
    words: list[str] = []
    mappings: dict[str, dict[str, Any]] = {}
    for dimension in sweep.over:
        value = values[dimension.label]
        if dimension.key:
            mappings.setdefault(dimension.name, dict(getattr(base, dimension.name)))[dimension.key] = _typed(value)
        else:
            words.append(f"{dimension.label}={value if isinstance(value, str) else number(value, isinstance(value, int))}")
    return words + [mapping_word(name, mapping) for name, mapping in mappings.items()]


def mapping_word(name: str, mapping: Mapping[str, Any]) -> str:
    """KEY={...} of a setting that holds a mapping, read back as the same values whatever characters they hold."""
    return dump_yaml({name.upper(): mapping}).rstrip("\n").replace(": ", "=", 1)


def _typed(value: Any) -> Any:
    """A choice under a key, as the number or switch that it looks like."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def trial_of(base: Job, origins: Mapping[str, str], words: Sequence[str], origin: str) -> Resolved:
    """The job of one point: the sweep's job with the point's words over it; what followed from others follows anew."""
    return amend(given_values(base, origins), origins, words, origin)


def points_to_try(sweep: Sweep) -> Iterator[dict[str, Value]]:
    """Points that together show what a sweep may ask for: a grid's own; else the corners, and some from inside."""
    if sweep.sampler == "grid":
        yield from (sweep.point(index) for index in range(sweep.trials))
        return
    ends = [dimension.ends() for dimension in sweep.over]
    labels = [dimension.label for dimension in sweep.over]
    chance = random.Random(0)
    if math.prod(len(values) for values in ends) <= _MOST_TRIED:
        yield from (dict(zip(labels, point, strict=True)) for point in itertools.product(*ends))
    else:
        for index in range(max(len(values) for values in ends)):
            yield {label: values[index % len(values)] for label, values in zip(labels, ends, strict=True)}
        yield from ({label: chance.choice(values) for label, values in zip(labels, ends, strict=True)} for _ in range(_MOST_TRIED))
    if any(not dimension.choices for dimension in sweep.over):
        yield from ({dimension.label: dimension.anywhere(chance) for dimension in sweep.over} for _ in range(_MOST_TRIED // 4))


def check(sweep: Sweep, base: Resolved) -> None:
    """Tries points of the sweep as jobs. Raises SettingError for values that a setting cannot have, ImpossibleJobError that
    names combinations which cannot run."""
    wrong: dict[str, None] = {}
    impossible: dict[str, list[str]] = {}
    meaning: dict[tuple[str, str], Any] = {}
    for values in points_to_try(sweep):
        try:
            job = trial_of(base.job, base.origins, words_of(sweep, base.job, values), "sweep").job
        except ImpossibleJobError as err:
            reason = " ".join(line.strip() for line in str(err).splitlines()[1:])
            impossible.setdefault(reason, []).append(" ".join(f"{label}={said(value)}" for label, value in values.items()))
            continue
        except SettingError as err:
            wrong |= dict.fromkeys(str(err).splitlines())
            continue
        for dimension in sweep.over:
            if dimension.choices and not dimension.key:
                meaning[dimension.label, str(values[dimension.label])] = json.dumps(getattr(job, dimension.name), default=str)
    for dimension in sweep.over:
        first: dict[str, str] = {}
        for choice in dimension.choices:
            meant = meaning.get((dimension.label, choice), choice)
            same = first.setdefault(meant, choice)
            if same != choice:
                wrong[f"{dimension.label}: {same!r} and {choice!r} mean the same (sweep); leave one out."] = None
    if wrong:
        raise SettingError("\n".join(wrong))
    if impossible:
        lines = [
            f"  {reason}\n    as at {points[0]}" + (f", and {len(points) - 1} more points that were tried" if len(points) > 1 else "")
            for reason, points in impossible.items()
        ]
        more = f"\n  and {len(lines) - _NAMED} more reasons" if len(lines) > _NAMED else ""
        raise ImpossibleJobError(
            "This sweep holds combinations that cannot run:\n"
            + "\n".join(lines[:_NAMED])
            + more
            + "\nLeave such values out, give ranges a step, or write two sweeps."
        )


def said(value: Any) -> str:
    """A value as a table shows it: four digits of a real number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
