"""DEBUG=true makes a run small: sizes that nobody asked for by hand shrink, so that the first fault shows within a minute."""

from collections.abc import Collection
from typing import Any

from jobs.config import validation
from jobs.config.settings import Job
from jobs.config.types import step_range
from jobs.core.errors import SettingError

ORIGIN = "debug"
# Enough steps for a warm-up, two validations and a decay; the model keeps its shape, since that is what is looked at.
_MAX_STEPS = 20
_EVAL_EVERY = 10
_EVAL_SAMPLES = 32
_MICRO_BATCH = 2


def small(job: Job, said: Collection[str]) -> dict[str, Any]:
    """The values that DEBUG=true changes: none in `said`, which the command line or the environment gave, and none that would grow.

    None for the parts of a batch means that they follow from it. A script of somebody's own has sizes of its own."""
    if not job.debug or job.entry is not None:
        return {}
    changed: dict[str, Any] = {
        "max_steps": min(job.max_steps, _MAX_STEPS),
        "eval_every": min(job.eval_every, _EVAL_EVERY),
        "eval_samples": min(job.eval_samples or _EVAL_SAMPLES, _EVAL_SAMPLES),
    }
    changed = {name: value for name, value in changed.items() if name not in said} | _batch(job, said)
    return changed | _schedule(job.model_copy(update=changed), said)


def _batch(job: Job, said: Collection[str]) -> dict[str, Any]:
    parts = {name: getattr(job, name) if name in said else None for name in validation.BATCH_PARTS}
    if "batch_size" in said:
        return parts
    size = job.world_size * (parts["micro_batch_size"] or _MICRO_BATCH) * (parts["grad_accum_steps"] or 1)
    return {"batch_size": size, **parts} if size < job.batch_size or any(parts.values()) else {}


def _schedule(job: Job, said: Collection[str]) -> dict[str, Any]:
    """What counts in steps and no longer fits into the run."""
    changed: dict[str, Any] = {}
    if job.warmup_steps is not None and job.warmup_steps > job.max_steps // 4 and "warmup_steps" not in said:
        changed["warmup_steps"] = job.max_steps // 4
    if job.profile_steps and step_range(job.profile_steps)[1] > job.max_steps and "profile_steps" not in said:
        changed["profile_steps"] = None
    if job.lr_scheduler_params and "lr_scheduler_params" not in said:
        try:
            validation.schedule_of(job.model_copy(update=changed))
        except SettingError:
            changed["lr_scheduler_params"] = {}
    return changed
