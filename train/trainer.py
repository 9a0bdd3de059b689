"""The training loop. train/startup.py builds what it works with."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.rank.stop_flag import StopFlag
from jobs.run import event_log
from jobs.run.goodput import Part
from jobs.run.progress import Progress
from jobs.run.rundir import RunDir
from jobs.specs.lr_schedule import LRSchedule
from train import optim
from train.checkpoint.manager import CheckpointManager
from train.compilation.compile_cache import CompileCache
from train.data.loader import POLL_S, Batch, TrainLoader
from train.data.sources import Dataset
from train.distributed.runtime import Distributed
from train.distributed.stop_agreement import StopAgreement
from train.metrics.goodput_timer import GoodputTimer
from train.metrics.logger import Metrics, MetricsLogger
from train.metrics.profiler import StepProfiler
from train.metrics.step_totals import StepTotals
from train.overflow_policy import handle_overflow, scaler_state
from train.precision.numerics import GradientOverflow, OverflowPolicy, first_nonfinite_grad
from train.rng import seed_everything
from train.train_state import TrainState
from train.train_step import StepResult, TrainStep
from train.validation import Validator


@dataclass(frozen=True)
class Outcome:
    """Where training ended; `stopped_by` is TERM, USR2 and so on, or None when the last step is done."""

    step: int
    stopped_by: str | None


@dataclass
class Trainer:
    """One training process. `state`, weights and optimizer are what a checkpoint holds; everything else is rebuilt from the job.

    All ranks call the same methods in the same order: `next_batches`, `train_step`, `validate`, `save` and `shut_down` are collective."""

    job: Job
    run: RunDir
    dist: Distributed
    flag: StopFlag
    agreement: StopAgreement
    timer: GoodputTimer
    progress: Progress
    say: Callable[[str], None]
    schedule: LRSchedule
    data: Dataset
    loader: TrainLoader
    step: TrainStep
    overflow_policy: OverflowPolicy
    totals: StepTotals
    validator: Validator
    checkpoints: CheckpointManager
    metrics: MetricsLogger
    profiler: StepProfiler
    compile_cache: CompileCache
    state: TrainState

    def __post_init__(self) -> None:
        self._first_step = self.state.step + 1

    def train(self) -> Outcome:
        """Train until `max_steps`, or until the ranks agree to stop. Raises the errors of jobs.core.errors."""
        self.step.model.train()
        if self.state.step == self.job.max_steps:
            self.flag.busy()
        if self.state.pending_metrics is not None:
            self.finish_pending_validation()
        while self.state.step < self.job.max_steps and not self.agreement.stop_code:
            batches = self.next_batches()
            if batches is None or not self.train_step(batches):
                break
        return self.shut_down()

    def next_batches(self) -> Iterator[Batch] | None:
        """Wait until every rank has the micro-batches of the next step; save when the interval is over. None: the ranks agreed to stop."""
        while True:
            with self.timer.during(Part.DATA_WAIT):
                is_waiting = not self.loader.ready(self.state.step, wait_s=POLL_S)
            asked = self.timer.now()
            any_waiting, save_due = self.agreement.sync(is_waiting, self.checkpoints.is_due(self.state.step))
            if any_waiting:
                self.timer.count(Part.DATA_WAIT, since=asked)
            if self.agreement.stop_code:
                return None
            if save_due:
                self.save()
            if not any_waiting:
                return self.loader.take(self.state.step)

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """Do one optimizer step, with its log line, validation and checkpoint. False: stopped during the validation.

        After an overflow the step is not counted, and `next_batches` gives the same batches again: neither the schedule nor the data order changes."""
        lr = self.schedule(self.state.step)
        optim.set_lr(self.step.optimizer, lr)
        seed_everything(self.job.seed, self.state.step, self.dist.rank)
        self.profiler.before(self.state.step + 1)
        result = self.step(batches)
        if result.overflow:
            handle_overflow(self.step, self.overflow_policy, self.run, self.state.step, self.say)
            return True
        self.finish_step(result)
        is_best = False
        if self.should_log():
            line = self.collect_metrics(result, lr)
            if self.should_validate():
                values = self.validate()
                if values is None:
                    self.save_pending(line)
                    return False
                line |= values
                is_best = self.finish_validation(values["val_loss"])
            self.metrics.log(line)
        if self.should_save(is_best):
            self.save(blocking=self.is_last_step())
        return True

    def finish_step(self, result: StepResult) -> None:
        """Count a step whose update is queued on the device. Nothing here waits for the device."""
        self.overflow_policy.record_success()
        self.state.advance()
        self.progress.set(self.state.step)
        self.timer.finished_step()
        self.progress.enter("step")
        self.profiler.after(self.state.step)
        self.totals.add(self.state.step, result)
        self.metrics.throughput.step()
        self.checkpoints.poll()
        if self.state.step == self._first_step:
            self.flag.busy()
            self.checkpoints.preallocate(self.step.inner, self.step.optimizer)
            self.compile_cache.keep(validated=False)
            # Objects made by imports and compilation stay: a full collection of 400,000 objects stops this thread, which feeds the GPU,
            # for a quarter of a second.
            gc.freeze()

    def should_validate(self) -> bool:
        return self.is_last_step() or (self.job.eval_every > 0 and self.state.step % self.job.eval_every == 0)

    def should_log(self) -> bool:
        """Each `log_every` steps, the first step of the run, and each step that is validated."""
        log_every = 1 if self.job.debug else self.job.log_every
        return self.should_validate() or self.state.step % log_every == 0 or self.state.step == 1

    def should_save(self, is_best: bool) -> bool:
        """Whether the step just finished is saved by its number or its validation loss. CHECKPOINT_EVERY=auto is decided in `next_batches`."""
        job, step = self.job, self.state.step
        due = (job.checkpoint_every != "auto" and step % job.checkpoint_every == 0) or (job.keep_every > 0 and step % job.keep_every == 0)
        return self.is_last_step() or (is_best and job.keep_best > 0) or due

    def is_last_step(self) -> bool:
        return self.state.step == self.job.max_steps

    def reduce_totals(self, *sums: torch.Tensor) -> list[float]:
        """Sum these over all ranks, and add the targets since the last call to `state.tokens`. Waits for the device."""
        targets, reduced = self.totals.reduce(self.state.step, *sums)
        self.state.tokens += targets
        return reduced

    def collect_metrics(self, result: StepResult, lr: float) -> Metrics:
        """Return the log line of the step just finished. Raises GradientOverflow when the loss or the gradient is not finite."""
        total, targets = self.reduce_totals(result.loss_sum.double(), result.targets)
        loss, norm = total / (targets or 1), result.norm.item()
        line = self.metrics.line(self.state, loss, lr, norm)
        if self.step.scale is not None:
            line |= {"loss_scale": self.step.scale.scale, "growth_tracker": self.step.scale.good_steps}
        if not math.isfinite(total) or not math.isfinite(norm):
            raise GradientOverflow(
                f"at step {self.state.step} the loss is {loss} and the gradient norm {norm}, first in {first_nonfinite_grad(self.step.inner)}."
                " A lower LR or more warm-up may help; DEBUG=true finds the operation."
            )
        return line

    def validate(self) -> dict[str, float] | None:
        """Return the values of a validation for the log line; None when the ranks agreed to stop in the middle of it."""
        return self.validator.run(self.step.context)

    def finish_validation(self, loss: float) -> bool:
        """Record the validation loss of this step. Returns whether it is the best so far."""
        self.compile_cache.keep(validated=True)
        self.metrics.throughput.restart()
        return self.state.record_validation(loss)

    def finish_pending_validation(self) -> None:
        """Validate the step at which the previous attempt was stopped, so that no log line is missing. A second stop leaves it pending."""
        values = self.validate()
        if values is None:
            return
        self.metrics.log({**(self.state.pending_metrics or {}), **values})
        self.state.pending_metrics = None
        if self.metrics.sync():
            self.checkpoints.amend_val_loss(self.state.step, values["val_loss"] if math.isfinite(values["val_loss"]) else None)
        self.state.record_validation(values["val_loss"])

    def save_pending(self, line: Metrics) -> None:
        """Save at a stop during a validation: the next attempt finishes it and logs this line."""
        self.timer.stop()
        self.state.pending_metrics = line
        self.save(blocking=True)

    def save(self, *, blocking: bool = False) -> None:
        """Save a checkpoint of this step. Returns when the state is in host memory; with `blocking`, when the checkpoint is committed."""
        self.metrics.sync()
        # The copy waits for the steps that are queued on the device; waited for here, that time counts as theirs.
        self.reduce_totals()
        record = self.state.to_record(self.job, self.data, self.dist.world_size, scaler_state(self.step))
        before = self.progress.enter("save")
        self.timer.saving(self.state.step)
        with self.timer.during(Part.SAVE_STALL):
            self.checkpoints.save(record, self.step.inner, self.step.optimizer, blocking=blocking)
        self.progress.enter(before)
        self.checkpoints.restart_interval()

    def shut_down(self) -> Outcome:
        """Save where the ranks agreed to stop, finish the save in flight, and close everything."""
        self.progress.enter("save")
        self.timer.stop()
        stopped_by = self.agreement.stopped_by
        if stopped_by:
            self.save_at_stop(stopped_by)
        self.checkpoints.join()
        self.profiler.close()
        self.loader.close()
        self.validator.close()
        # No rank leaves before rank 0 has saved: its exit could otherwise end the Slurm step while rank 0 still writes.
        self.dist.barrier()
        self.metrics.close(stopped=bool(stopped_by))
        return Outcome(self.state.step, stopped_by)

    def save_at_stop(self, stopped_by: str) -> None:
        """Write the STOP event, and save this step unless its checkpoint is committed already."""
        step = self.state.step
        if self.dist.is_main:
            with suppress(OSError):  # the save matters more
                event_log.append(self.run.ledger, Event.STOP, attempt=self.dist.attempt, job_id=self.dist.job_id, step=step, signal=stopped_by)
        self.checkpoints.join()
        if self.checkpoints.saved is None or self.checkpoints.saved < step:
            self.save(blocking=True)
        self.say(f"stopped by {stopped_by} at step {step:,}; saved, nothing is lost")
