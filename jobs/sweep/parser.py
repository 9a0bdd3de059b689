"""How a sweep is written: words behind --over, options, and space files; all faults are told at once.

    --over LR=1e-4..1e-2:log --over PRECISION=bf16,fp32 --trials 12        as words
    over: {lr: 1e-4..1e-2:log, precision: [bf16, fp32]}                    as a YAML file, for --space

A range is LOW..HIGH, of whole numbers where the setting is one, with `:log` or `:step=N` behind it; anything else is a list of
choices. A setting that holds a mapping varies by its keys (MODEL_OPTIONS.d_model=64,128).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.config.setting_names import setting_name, unknown_setting
from jobs.config.settings import Job, group_of, is_mapping, number_type
from jobs.config.yaml_io import read_yaml
from jobs.core.errors import NotFoundError, SettingError
from jobs.core.imports import nearest
from jobs.sweep.search_space import MAX_TRIALS, Dimension, Sweep, number

# Of these groups the whole array shares the values: Slurm is asked once, by one script.
_SHARED_GROUPS = frozenset({"run", "slurm", "site"})


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
    raise NotFoundError(
        f"space file {word!r} does not exist in {cwd}. " + (f"Did you mean {near}?" if near else f"These come with holdfast: {', '.join(known)}.")
    )


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
            raise SettingError(
                "\n".join(
                    f"{d.text()} has no end of values, and a grid takes each once: list them (KEY=a,b,c), give a step, or take --sampler tpe --trials N."
                    for d in endless
                )
            )
        points = math.prod(dimension.count or 1 for dimension in dimensions)
        if points > MAX_TRIALS:
            raise SettingError(
                f"This grid has {points:,} points, at most {MAX_TRIALS:,} go into one array; list fewer values, or take --sampler tpe --trials N."
            )
        if given.setdefault("trials", points) != points:
            raise SettingError(
                f"A grid takes each of its {points} points once, but {origins['trials']} says {given['trials']} trials; leave that out, or take --sampler tpe."
            )
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
