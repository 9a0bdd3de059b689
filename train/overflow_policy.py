"""What follows an overflow: the same step again with a smaller loss scale, or in bf16 from then on, also in later attempts."""

from collections.abc import Callable

from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.specs.precision import Precision
from train.checkpoint.state_dict import TrainStateRecord
from train.precision.numerics import GradScaler, OverflowPolicy, autocast_context, first_nonfinite_grad
from train.train_step import TrainStep

# The scaler state of a checkpoint from which training continues in bf16.
_FALLEN_BACK = {"fallback": 1.0}


def handle_overflow(train_step: TrainStep, policy: OverflowPolicy, run: RunDir, step: int, say: Callable[[str], None]) -> None:
    """Record an overflow in the event log and apply the policy. Raises GradientOverflow where the policy ends training."""
    rt, before = train_step.rt, train_step.scale.scale if train_step.scale else 1.0
    first = first_nonfinite_grad(train_step.inner)
    if rt.is_main:
        event_log.append(run.ledger, Event.OVERFLOW, attempt=rt.attempt, job_id=rt.job_id, step=step, scale=before, first=first)
    say(f"  overflow at step {step:,}, loss scale {before:g}, first in {first}")
    if not policy.record_overflow(step, first):
        say(f"  WARNING: {policy.in_a_row} overflows in a row: going on in bf16 (ON_OVERFLOW=fallback)")
        _fall_back(train_step, policy)


def scaler_state(train_step: TrainStep) -> dict[str, float] | None:
    """What a checkpoint holds of the loss scale: its state, that training fell back to bf16, or None where the precision has none."""
    if train_step.scale is not None:
        return train_step.scale.state()
    return _FALLEN_BACK if GradScaler.from_job(train_step.job) is not None else None


def restore_scaler(train_step: TrainStep, policy: OverflowPolicy, record: TrainStateRecord | None, job: Job, say: Callable[[str], None]) -> None:
    """Load the loss scale of a checkpoint, or continue in bf16 where the run had fallen back and the policy still allows it."""
    if train_step.scale is None or record is None or not record.scaler:
        return
    if "scale" in record.scaler:
        train_step.scale.load(record.scaler)
    elif job.on_overflow == "fallback":
        say("  going on in bf16, as since an overflow before (ON_OVERFLOW=fallback)")
        _fall_back(train_step, policy)


def _fall_back(train_step: TrainStep, policy: OverflowPolicy) -> None:
    policy.scale = train_step.scale = None
    train_step.context = autocast_context(Precision.BF16, train_step.rt.device)
