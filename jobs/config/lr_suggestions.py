"""Words of the learning-rate schedule that stand where they mean nothing, and the place where each one belongs."""

from collections.abc import Iterable, Mapping
from typing import Any

# Fields of jobs.specs.lr_schedule.LRSchedule that a job gives by lr_scheduler_params; warmup_steps is a setting as well.
PARAMS = ("total_iters", "T_0", "T_max", "T_mult", "eta_min", "min_lr", "num_cycles", "decay_steps", "decay_pct")
_SETTINGS = ("warmup_steps", "warmup_pct", "lr_scheduler")


def belongs(word: str) -> str | None:
    """Where a word of the schedule belongs, as a sentence; None for any other word."""
    folded = word.lower().replace("-", "_")
    if folded in _SETTINGS:
        return f"It belongs at the top of the job file or under training: or optimizer:, or as {folded.upper()}=... on the command line."
    name = next((name for name in PARAMS if name.lower() == folded), None)
    return f"It belongs under lr_scheduler_params: (or LR_SCHEDULER_PARAMS={name}=...)." if name else None


def inside(mapping: str, content: Any, origin: str) -> list[str]:
    """Faults of a mapping that is about something else and holds words of the schedule."""
    if not isinstance(content, Mapping):
        return []
    words = [str(key) for key in content]
    if mapping == "lr_scheduler_params":
        wrong = [word for word in words if word.lower() in ("warmup_pct", "lr_scheduler")]
    else:
        # Names that no model and no data set has by chance.
        wrong = [word for word in words if word.lower().replace("-", "_") in (*_SETTINGS, "total_iters", "t_mult", "eta_min")]
    return [f"{word} has no meaning under {mapping} ({origin}). {belongs(word)}" for word in wrong]


def unknown_block(key: str, content: Mapping[Any, Any], origin: str, headings: Iterable[str]) -> str:
    """The fault of a block whose name is neither a setting nor a heading."""
    text = f"{key} is neither a setting nor a heading ({origin}). Headings are {', '.join(sorted(headings))}; settings also stand without one."
    hints = [f" {word}: {where}" for word in map(str, content) if (where := belongs(word))]
    return text + "".join(hints)
