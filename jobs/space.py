"""What a sweep is: which settings vary and over which values, how points are chosen, and when a trial is given up.

    --over LR=1e-4..1e-2:log --over PRECISION=bf16,fp32 --trials 12        as words
    over: {lr: 1e-4..1e-2:log, precision: [bf16, fp32]}                    as a YAML file, for --space

Both end in one frozen `Sweep`, kept in the sweep's directory. A range is LOW..HIGH, of whole numbers where the setting is one,
with `:log` or `:step=N` behind it; anything else is a list of choices. A setting that holds a mapping varies by its keys
(MODEL_OPTIONS.d_model=64,128). Values are kept as a person writes them: a trial is the job with these words over it.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import ImpossibleJobError, NotFoundError, SettingError
from jobs.names import nearest
from jobs.settings import Job, group_of
from jobs.sources import Resolved, amend, is_mapping, number_type, read_yaml, setting_name, unknown_setting

# The most trials of a sweep, as of any array.
MAX_TRIALS = 10_000
# So many points are tried before anything is queued; a grid is tried whole.
_MOST_TRIED = 512
# Of these groups the whole array shares the values: Slurm is asked once, by one script.
_SHARED_GROUPS = frozenset({"run", "slurm", "site"})
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
    parallel: int = Field(description="trials that may run at the same time; left out, ARRAY_PARALLEL, and with tpe a quarter of the trials, so that later ones learn from earlier ones", ge=1)
    sampler: Literal["grid", "random", "tpe"] = Field(description="who chooses the values: grid takes each point once, random draws, tpe (Optuna's) learns; left out, grid where all values can be listed and no number of trials is given, else tpe")
    metric: str = Field("val_loss", description="what is compared: a name in metrics.jsonl")
    direction: Literal["minimize", "maximize"] = Field("minimize", description="whether less or more of it is better")
    value: Literal["last", "best"] = Field("last", description="which of a run's values counts: that of its last validation, or its best")
    pruner: Literal["none", "median"] = Field("none", description="median gives a trial up when its best value so far is worse than the median of the others at the same step")
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
        return Sweep.model_validate_json(path.read_text())
    except (OSError, ValidationError) as err:
        raise SettingError(f"{path}: not a sweep that this version can read: {str(err).splitlines()[0]}") from err


def find_file(word: str, cwd: Path) -> tuple[Path, str]:
    """The space file that `word` names, and how to call it: a path, or the name of one that comes with holdfast. Raises NotFoundError."""
    path = cwd / word
    if path.is_file():
        return path, word
    shipped = Path(str(resources.files("jobs"))) / "sweeps"
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    if word in known:
        return shipped / f"{word}.yaml", f"jobs/sweeps/{word}.yaml"
    near = nearest(Path(word).stem, known)
    raise NotFoundError(f"space file {word!r} does not exist in {cwd}. " + (f"Did you mean {near}?" if near else f"These come with holdfast: {', '.join(known)}."))


def define(over: Sequence[str], options: Mapping[str, Any], space: Path | None, shown: str, array_parallel: int) -> Sweep:
    """The sweep that these --over words, options (None for those left out) and space file describe; the command line wins.

    Raises SettingError with one line per fault."""
    content = read_yaml(space, shown) if space else {}
    faults: list[str] = []
    dimensions: dict[str, Dimension] = {}
    came_from: dict[str, str] = {}
    for word, value, origin in _entries(content, shown, over, faults):
        try:
            dimension = _dimension(word, value, origin)
        except ValueError as err:
            faults.append(f"{word}: {err} ({origin}).")
            continue
        except SettingError as err:
            faults.append(str(err))
            continue
        if came_from.get(dimension.label) == origin:
            faults.append(f"{dimension.label} varies twice ({origin}); give its values once.")
        dimensions[dimension.label], came_from[dimension.label] = dimension, origin
    whole = {dimension.name for dimension in dimensions.values() if not dimension.key}
    faults += [f"{d.label} and {d.name.upper()} vary both; vary the whole or its keys." for d in dimensions.values() if d.key and d.name in whole]
    known = [name for name in Sweep.model_fields if name not in ("over", "job", "words")]
    given: dict[str, Any] = {}
    for name, value in content.items():
        if name in known:
            given[name] = value
        elif name != "over":
            near = nearest(name, known)
            faults.append(f"{name!r} is no option of a sweep ({shown}). " + (f"Did you mean {near!r}?" if near else f"There are over, {', '.join(known)}."))
    given |= {name: value for name, value in options.items() if value is not None}
    origins = {name: shown if options.get(name) is None else f"--{name.replace('_', '-')}" for name in given}
    if not dimensions and not faults:
        faults.append("A sweep needs something that varies: --over LR=1e-4..1e-2:log, --over PRECISION=bf16,fp32, or --space FILE with `over:` in it.")
    if faults:
        raise SettingError("\n".join(faults))
    return _complete(list(dimensions.values()), given, origins, array_parallel)


def _entries(content: Mapping[str, Any], shown: str, over: Sequence[str], faults: list[str]) -> Iterator[tuple[str, Any, str]]:
    """(setting, what it varies over, where that stands), of the file first."""
    listed = content.get("over", {})
    if isinstance(listed, dict):
        yield from ((str(word), value, shown) for word, value in listed.items())
    else:
        faults.append(f"over: holds a {type(listed).__name__}, not settings ({shown}); write lines of the form lr: 1e-4..1e-2:log")
    for word in over:
        name, equals, value = word.partition("=")
        if not equals or not name:
            faults.append(f"--over {word!r}: write KEY=value1,value2 or KEY=low..high, with :log or :step=N behind a range.")
        else:
            yield name, value, "--over"


def _dimension(word: str, value: Any, origin: str) -> Dimension:
    """One setting and its values. Raises ValueError with what is wrong, SettingError for a word that is no setting."""
    head, dot, key = word.partition(".")
    name = setting_name(head)
    if name is None or name not in Job.model_fields:
        raise SettingError(unknown_setting(head, origin))
    if group_of(name) in _SHARED_GROUPS:
        raise ValueError("is the same for all trials of a sweep, since Slurm is asked once for all of them; give it as KEY=value")
    if dot and (not is_mapping(name) or not key):
        raise ValueError(f"{name.upper()} has no keys to vary" if not is_mapping(name) else "has no key behind the dot")
    kind = number_type(name)
    if isinstance(value, dict) and not (is_mapping(name) and not dot):
        return _range(name, key, value, kind)
    if isinstance(value, str) and ".." in value and (kind or dot):
        low, _, rest = value.partition("..")
        high, colon, how = rest.partition(":")
        parts: dict[str, Any] = {"low": low, "high": high}
        if how == "log":
            parts["log"] = True
        elif how.startswith("step="):
            parts["step"] = how.removeprefix("step=")
        elif colon:
            raise ValueError(f"{how!r} behind a range is neither log nor step=N")
        return _range(name, key, parts, kind)
    items = value if isinstance(value, list) else str(value).split(",") if isinstance(value, str) else [value]
    choices = [_as_word(item) for item in items]
    if "" in choices:
        raise ValueError("has an empty value in its list; none clears a setting")
    if len(choices) < 2:
        raise ValueError(f"has one value only; give {head.upper()}={choices[0]} as a setting" if choices else "has no values")
    twice = sorted({choice for choice in choices if choices.count(choice) > 1})
    if twice:
        raise ValueError(f"has {twice[0]!r} twice")
    return Dimension(name=name, key=key, choices=tuple(choices))


def _range(name: str, key: str, parts: Mapping[str, Any], kind: type | None) -> Dimension:
    unknown = sorted(set(parts) - {"low", "high", "log", "step"})
    if unknown or "low" not in parts or "high" not in parts:
        raise ValueError("needs low and high, and may have log or step" + (f"; {unknown[0]!r} is none of them" if unknown else ""))
    if kind is None and not key:
        raise ValueError("is no number and has no range; list its values")
    low, high = _finite(parts["low"]), _finite(parts["high"])
    step = None if parts.get("step") is None else _finite(parts["step"])
    log = parts.get("log", False)
    if not isinstance(log, bool):
        raise ValueError("log is neither true nor false")
    # Under a key nothing is known of the type: whole ends mean whole numbers.
    whole = kind is int or (kind is None and all(isinstance(item, int) for item in (low, high, step or 1)))
    if whole and not all(float(item).is_integer() for item in (low, high, step or 1)):
        raise ValueError("takes whole numbers")
    if not low < high:
        raise ValueError(f"{number(low, whole)} is not below {number(high, whole)}")
    if log and low <= 0:
        raise ValueError(f"a range with :log begins above 0, not at {number(low, whole)}")
    if log and step:
        raise ValueError("has log and step; give one of them")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"a step of {number(step, whole)} does not fit between {number(low, whole)} and {number(high, whole)}")
    return Dimension(name=name, key=key, low=low, high=high, log=log, step=step, whole=whole)


def _finite(item: Any) -> float:
    """A number, whole where it is written so. Raises ValueError."""
    text = str(item).strip()
    try:
        value: float = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number; write LOW..HIGH with :log or :step=N behind it, or values between commas") from None
    if isinstance(item, bool) or not math.isfinite(value) or abs(value) > 2**53:
        raise ValueError(f"{text!r} is not a number that a range can end at")
    return value


def _as_word(item: Any) -> str:
    """A value of a YAML list as the word that a command line has for it."""
    if item is None:
        return "none"
    if isinstance(item, bool):
        return str(item).lower()
    return json.dumps(item) if isinstance(item, (dict, list)) else str(item).strip()


def _complete(dimensions: list[Dimension], given: dict[str, Any], origins: Mapping[str, str], array_parallel: int) -> Sweep:
    """The sweep with what was left out, and its numbers checked. Raises SettingError."""
    listed = all(dimension.count is not None for dimension in dimensions)
    given["direction"] = {"min": "minimize", "max": "maximize"}.get(str(given.get("direction")), given.get("direction", "minimize"))
    given.setdefault("sampler", "grid" if listed and given.get("trials") is None else "tpe")
    if given["sampler"] == "grid":
        endless = [dimension for dimension in dimensions if dimension.count is None]
        if endless:
            raise SettingError("\n".join(f"{d.text()} has no end of values, and a grid takes each once: list them (KEY=a,b,c), give a step, or take --sampler tpe --trials N." for d in endless))
        points = math.prod(dimension.count or 1 for dimension in dimensions)
        if points > MAX_TRIALS:
            raise SettingError(f"This grid has {points:,} points, at most {MAX_TRIALS:,} go into one array; list fewer values, or take --sampler tpe --trials N.")
        if given.setdefault("trials", points) != points:
            raise SettingError(f"A grid takes each of its {points} points once, but {origins['trials']} says {given['trials']} trials; leave that out, or take --sampler tpe.")
    elif given.get("trials") is None:
        raise SettingError(f"How many trials? A sweep by {given['sampler']} needs --trials N.")
    if given.get("parallel") is None:
        given["parallel"] = max(1, int(given["trials"]) // 4) if given["sampler"] == "tpe" and str(given["trials"]).isdigit() else array_parallel
    try:
        return Sweep(over=tuple(dimensions), **given)
    except ValidationError as err:
        lines = []
        for fault in err.errors(include_url=False):
            name = str(fault["loc"][0])
            lines.append(f"{name}: {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]} ({origins.get(name, 'default')}).")
        raise SettingError("\n".join(lines)) from err


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
    return words + [f"{name.upper()}={json.dumps(mapping)}" for name, mapping in mappings.items()]


def _typed(value: Any) -> Any:
    """A choice under a key, as the number or switch that it looks like."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def trial_of(base: Job, origins: Mapping[str, str], words: Sequence[str], origin: str) -> Resolved:
    """The job of one point: the sweep's job with the point's words over it; what followed from others follows anew."""
    frozen = {name: value for name, value in base.model_dump(mode="json").items() if origins.get(name) != "derived" or name == "job_name"}
    return amend(frozen, origins, words, origin)


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
        lines = [f"  {reason}\n    as at {points[0]}" + (f", and {len(points) - 1} more points that were tried" if len(points) > 1 else "") for reason, points in impossible.items()]
        more = f"\n  and {len(lines) - _NAMED} more reasons" if len(lines) > _NAMED else ""
        raise ImpossibleJobError("This sweep holds combinations that cannot run:\n" + "\n".join(lines[:_NAMED]) + more + "\nLeave such values out, give ranges a step, or write two sweeps.")


def said(value: Any) -> str:
    """A value as a table shows it: four digits of a real number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
