"""Several words for one thing, brought together: the higher layer's counts, and two in one layer contradict each other."""

import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs.config import precision_cache
from jobs.config.layers import Given
from jobs.config.setting_names import AMP_WORDS
from jobs.config.settings import Job, bare_type, is_mapping_of_numbers, is_optional
from jobs.config.yaml_io import parse
from jobs.specs.precision import ALIASES, Precision


def take_advice(values: dict[str, Any], origins: dict[str, str], faults: list[str], cwd: Path | None) -> tuple[str, ...]:
    """Puts what `holdfast precision` recommended in the place of PRECISION=auto. Returns the files that it depends on."""
    where = origins["precision"]
    if cwd is None:
        faults.append(f"PRECISION=auto ({where}) is looked up at submit; a run that exists needs a precision by its name.")
        values["precision"] = Precision.FP32
        return ()
    values["precision"] = Precision.FP32
    try:
        job = Job(**values)
    except ValidationError:
        return ()  # told by the caller
    found = precision_cache.look_up(cwd / job.runs_dir, job)
    if found is None:
        faults.append(
            f"PRECISION=auto ({where}): MODEL={job.model} SEQ_LEN={job.seq_len} was not measured yet on this site's hardware in {job.runs_dir}/. `holdfast precision JOB` on a node does it, or name a precision."
        )
        return ()
    for name, value in found.settings.items():
        if name == "precision" or name not in values:
            values[name], origins[name] = value, f"auto: measured on {found.device}, {found.date}"
    return (str(found.path),)


def merge_warmup(values: dict[str, Any], origins: dict[str, str], rank: dict[str, int], faults: list[str]) -> None:
    """Leaves one of the words for the warm-up: warmup_steps, warmup_pct, and the steps under lr_scheduler_params."""
    _take_steps_from_params(values, origins, rank, faults)
    if values.get("warmup_steps") is not None and values.get("warmup_pct") is not None:
        if rank["warmup_steps"] == rank["warmup_pct"]:
            faults.append(f"WARMUP_STEPS ({origins['warmup_steps']}) and WARMUP_PCT ({origins['warmup_pct']}) say the same thing twice; give one.")
        elif rank["warmup_steps"] < rank["warmup_pct"]:
            values["warmup_steps"] = None
    if values.get("warmup_steps") is not None:
        values["warmup_pct"], origins["warmup_pct"] = None, "derived"


def _take_steps_from_params(values: dict[str, Any], origins: dict[str, str], rank: dict[str, int], faults: list[str]) -> None:
    """Moves the warm-up out of lr_scheduler_params, where it may stand too, to the setting of that name; the higher layer's counts."""
    params = values.get("lr_scheduler_params")
    if not isinstance(params, dict) or params.get("warmup_steps") is None:
        return
    at = rank["lr_scheduler_params"]
    others = [name for name in ("warmup_steps", "warmup_pct") if values.get(name) is not None]
    values["lr_scheduler_params"] = {name: value for name, value in params.items() if name != "warmup_steps"}
    same = [name for name in others if rank[name] == at]
    if same:
        faults.append(f"warmup_steps under lr_scheduler_params and {same[0].upper()} ({origins[same[0]]}) say the same thing twice; give one.")
    elif all(rank[name] < at for name in others):
        values["warmup_steps"] = params["warmup_steps"]
        origins["warmup_steps"] = f"{origins['lr_scheduler_params']}: lr_scheduler_params"
        rank["warmup_steps"] = at


def merge_amp_words(values: dict[str, Any], origins: dict[str, str], rank: dict[str, int], faults: list[str]) -> None:
    """Turns use_amp and amp_dtype into precision, unless a layer above them gives precision itself."""
    found = [word for word in AMP_WORDS if word in values]
    if not found:
        return
    level = max(rank[word] for word in found)
    where = " and ".join(dict.fromkeys(origins[word] for word in found))
    use = str(values.pop("use_amp", True)).lower()
    dtype = str(values.pop("amp_dtype", "bfloat16")).lower()
    if use not in ("true", "false", "1", "0"):
        faults.append(f"use_amp: {use!r} is neither true nor false ({where}).")
        return
    if dtype not in ("bfloat16", "float16", "bf16", "fp16"):
        faults.append(f"amp_dtype: {dtype!r} is not known ({where}); choose bfloat16 or float16.")
        return
    off = use in ("false", "0")
    if rank.get("precision", -1) < level:
        values["precision"] = "fp32" if off else dtype
        origins["precision"] = f"{where}: {' and '.join(found)}"
    elif rank["precision"] == level:
        given = str(values["precision"]).lower()
        given, meant = ALIASES.get(given, given), ALIASES.get(dtype, dtype)
        other = given in ("bf16", "fp16") and "amp_dtype" in found and given != meant
        if other or given in (("bf16", "fp16", "fp8") if off else ("fp32", "tf32")):
            said = " and ".join(f"{word.upper()}={use if word == 'use_amp' else dtype}" for word in found)
            faults.append(f"PRECISION={given} and {said} ({where}) contradict each other; PRECISION alone says it all.")


def plain(given: Given) -> Any:
    """A value as pydantic should see it: the words none and null clear an optional setting; mappings may be one word."""
    value = given.value
    if given.name not in Job.model_fields:
        return value
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
        if is_optional(given.name):
            return None
        if typing.get_origin(bare_type(given.name)) in (dict, tuple):
            return {} if typing.get_origin(bare_type(given.name)) is dict else ()
    if isinstance(value, bool) and bare_type(given.name) in (int, float):
        return str(value).lower()  # `nodes: true` is a slip, and Python would count it as 1
    if isinstance(value, str) and is_mapping_of_numbers(given.name):
        value = _mapping_from_word(value)
    if isinstance(value, dict) and typing.get_args(bare_type(given.name))[1:] == (float,):
        return {key: str(one).lower() if isinstance(one, bool) else one for key, one in value.items()}
    return value


def _mapping_from_word(text: str) -> Any:
    """`{a: 1, b: 2}` or `a=1,b=2`; anything else is handed on, for pydantic to refuse."""
    try:
        if text.lstrip().startswith("{"):
            return parse(text)
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        if all(equals for _, equals, _ in pairs):
            return {key.strip(): parse(value) for key, _, value in pairs}
    except yaml.YAMLError:
        pass
    return text
