"""What follows on an overflow: the same step again with a smaller scale, or in bf16 from then on, also in the attempts after."""

from collections.abc import Callable
from dataclasses import replace

from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.specs.precision import Precision
from train.checkpoint.state_dict import State
from train.precision.numerics import LossScale, OverflowGuard, first_bad, forward_context
from train.train_step import Stepper

# In the place of a scale in a checkpoint: training had gone on in bf16.
_FALLEN_BACK = {"fallback": 1.0}


def after_overflow(stepper: Stepper, guard: OverflowGuard, run: RunDir, step: int, say: Callable[[str], None]) -> Stepper:
    """Writes an overflow down and applies the policy; the stepper to try the step again with."""
    rt, before = stepper.rt, stepper.scale.scale if stepper.scale else 1.0
    culprit = first_bad(stepper.inner)
    if rt.is_main:
        event_log.append(run.ledger, Event.OVERFLOW, attempt=rt.attempt, job_id=rt.job_id, step=step, scale=before, first=culprit)
    say(f"  overflow at step {step:,}, loss scale {before:g}, first in {culprit}")
    if guard.overflow(step, culprit):
        return stepper
    say(f"  WARNING: {guard.in_a_row} overflows in a row: going on in bf16 (ON_OVERFLOW=fallback)")
    return _in_bf16(stepper, guard)


def scale_to_save(stepper: Stepper) -> dict[str, float] | None:
    """What a checkpoint says of the loss scale: its state, that it was given up, or None where the precision has none."""
    if stepper.scale is not None:
        return stepper.scale.state()
    return _FALLEN_BACK if LossScale.of(stepper.job) is not None else None


def as_saved(stepper: Stepper, guard: OverflowGuard, loaded: State | None, job: Job, say: Callable[[str], None]) -> Stepper:
    """The stepper to go on with: with the scale of the checkpoint, or in bf16 where the run had fallen back and the policy still says so."""
    if stepper.scale is None or loaded is None or not loaded.scaler:
        return stepper
    if "scale" in loaded.scaler:
        stepper.scale.load(loaded.scaler)
    elif job.on_overflow == "fallback":
        say("  going on in bf16, as since an overflow before (ON_OVERFLOW=fallback)")
        return _in_bf16(stepper, guard)
    return stepper


def _in_bf16(stepper: Stepper, guard: OverflowGuard) -> Stepper:
    guard.scale = None
    return replace(stepper, scale=None, context=forward_context(Precision.BF16, stepper.rt.device))
