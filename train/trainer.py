"""The training loop, and what surrounds it: build, resume, step, validate, log, save, stop."""

import gc
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.checkpoint import directory
from jobs.checkpoint.directory import complete, val_loss_of
from jobs.config.settings import Job
from jobs.config.validation import schedule_of
from jobs.core.contract import Event
from jobs.rank.stop_flag import StopFlag, name_of
from jobs.run import event_log
from jobs.run.goodput import Part
from jobs.run.progress import Progress
from jobs.run.rundir import RunDir, origins
from jobs.specs.lr_schedule import describe, lr_at
from train import optim, perf_flags
from train.build import build, open_split
from train.checkpoint import state_dict
from train.checkpoint.interval import Rhythm
from train.checkpoint.manager import Saver
from train.checkpoint.restore import initialise, resume
from train.compilation.compile_cache import CompileCache
from train.data.loader import LISTEN_S, Feed, ValidationFeed
from train.data.sources import content_of
from train.distributed import runtime
from train.distributed.parallel import is_sharded, prepare
from train.metrics.flops import flops_per_sample
from train.metrics.goodput_timer import Clock
from train.metrics.logger import MetricsLog
from train.metrics.profiler import Tracer
from train.metrics.throughput import Live, progress_text
from train.metrics.tracking import Trackers
from train.model_check import check_count_rule
from train.overflow_policy import after_overflow, as_saved, scale_to_save
from train.precision.numerics import GradientOverflow, LossScale, OverflowGuard, first_bad
from train.rng import seed_everything
from train.step_faults import first_fault, no_fault, raise_on_fault
from train.train_step import Stepper
from train.validation import evaluate


@dataclass(frozen=True)
class Outcome:
    """Where training ended; `stopped_by` is TERM, USR2 and so on, or None when the last step is done."""

    step: int
    stopped_by: str | None


def train(job: Job, run: RunDir, flag: StopFlag, clock: Clock, ahead: directory.Ahead | None = None) -> Outcome:
    """Trains until `max_steps` or until all ranks agree to stop. `ahead`, of rank 0: the newest checkpoint, already being verified.
    Raises the errors of jobs.core.errors."""
    rt = runtime.start(job)
    say = _Speaker(rt.is_main)
    say(f"attempt {rt.attempt} of run {run.id}")
    say("  " + runtime.describe(job, rt, origins(run).get("precision", "default")))

    schedule = schedule_of(job)
    for text in describe(schedule):
        say("  " + text)
    # A backward function that makes a NaN is then named with the line of its forward; far too slow to leave on.
    torch.autograd.set_detect_anomaly(job.debug, check_nan=True)
    seed_everything(job.seed, step=0)
    data, val_data = open_split(job, "train"), open_split(job, "val")
    # Rank 0 looks for all: on a shared file system each node may see another listing.
    begins = rt.broadcast(not any(complete(run.checkpoints)) if rt.is_main else None)
    compiled = CompileCache(job, run, rt, say)
    compiled.load()
    inner, context = build(job, data, rt, say, drawn=begins)
    for text in perf_flags.apply(job, inner, data, rt.device):
        say("  " + text)
    optimizer = optim.build(job, inner)
    scale = LossScale.of(job)
    with clock.during(Part.RESTORE):
        loaded = resume(job, run, rt, inner, optimizer, data, say, ahead)
        if loaded is None and not begins:
            # Every checkpoint was damaged: from the first step after all, with the weights that the first attempt drew.
            seed_everything(job.seed, step=0)
            inner, context = build(job, data, rt, _Speaker(enabled=False))
            optimizer = optim.build(job, inner)
        if loaded is None and job.init_from:
            say("  " + initialise(Path(job.init_from), inner, rt))
    resumed, pending = (loaded.step, loaded.pending) if loaded else (None, None)
    prepared = prepare(inner, job, rt)
    if sum(p.requires_grad for p in inner.parameters()):
        say(
            f"  model {job.model}: {sum(p.numel() for p in inner.parameters()):,} parameters · data {data.name}: {len(data):,} samples · batch {job.batch_size} = {rt.world} x {job.micro_batch_size} x {job.grad_accum_steps}"
        )

    metrics = MetricsLog(run.metrics, resumed or 0, again=pending is not None) if rt.is_main else None
    progress = Progress(run.attempt(rt.attempt), rt.is_main)
    progress.set(resumed or 0)
    progress.enter("first_step")
    clock.enter(Part.FIRST_STEP)
    stop_file: Path | None = run.stop_file if rt.is_main else None
    flag.successor = run.attempt(rt.attempt + 1).path if rt.is_main and rt.attempt else None
    feed = Feed(job, rt, data, run.attempt(rt.attempt).samples(rt.rank) if job.log_samples else None)
    guard = OverflowGuard(job, scale)
    stepper = as_saved(Stepper(job, rt, prepared, inner, optimizer, context, scale), guard, loaded, job, say)
    val_feed = ValidationFeed(job, val_data)
    first_batch = feed.first(resumed or 0)
    live = Live(job, rt, flops_per_sample(inner, first_batch), clock)
    for text in live.lines():
        say("  " + text)
    tracer = Tracer(job, run.attempt(rt.attempt).trace, say, enabled=rt.is_main)
    stepper.settle(first_batch)
    check_count_rule(inner, job, data, rt, say)
    live.restart()
    # After the reading processes are forked, which inherit no thread but might inherit a lock that one holds.
    trackers = Trackers(job, run, (resumed or 0) - (pending is not None), say) if rt.is_main else None
    saver = Saver(run, job, rt, say, sharded=is_sharded(inner), saved=resumed)
    rhythm = Rhythm(job, event_log.read(run.ledger), say)
    step, tokens = resumed or 0, loaded.tokens if loaded else 0
    tokens_of_line = tokens
    # Targets of this rank since `tokens` was counted, on the device: counting them for all would wait for each step.
    uncounted = torch.zeros((), dtype=torch.float64, device=rt.device)
    fault = no_fault(rt.device)
    stopped_by = 0
    log_every = 1 if job.debug else job.log_every

    def agree(*said: bool) -> tuple[bool, ...]:
        """Whether the ranks stop, and for each of these whether any of them says so."""
        nonlocal stopped_by
        stopped_by, *any_said = rt.maxima(stopped_by or flag.code(stop_file), *map(int, said))
        return stopped_by != 0, *map(bool, any_said)

    def go_on() -> bool:
        """Waits until every rank has its samples of the next step; a stop is heard in the meantime, and a save may be due."""
        while True:
            with clock.during(Part.DATA_WAIT):
                waiting = not feed.ready(step, wait_s=LISTEN_S)
            asked = clock.now()
            due = rt.is_main and not saver.busy and rhythm.due(step, saver)
            stop, waiting_any, due_any = agree(waiting, due)
            if waiting_any:
                clock.count(Part.DATA_WAIT, since=asked)
            if stop:
                return False
            if due_any:
                save()
            if not waiting_any:
                return True

    def totals(*sums: torch.Tensor) -> list[float]:
        """Over all ranks: these, and `tokens`. Waits for the steps."""
        nonlocal tokens
        raise_on_fault(fault.tolist(), job, inner, step)
        *found, more = rt.total(torch.stack([*sums, uncounted])).tolist()
        uncounted.zero_()
        tokens += int(more)
        return found

    def flushed() -> bool:
        """Whether the metrics are on disk, which a checkpoint must not be newer than."""
        try:
            if metrics is not None:
                metrics.sync()
        except OSError as err:
            say(f"  WARNING: metrics could not be flushed to disk: {err.strerror}")
            return False
        return True

    def save(pending_line: dict[str, Any] | None = None, *, must: bool = False) -> None:
        flushed()
        # The copy waits for the steps that are queued on the device anyway; waited for here, that time counts as theirs.
        totals()
        state = state_dict.State(
            step=step,
            tokens=tokens,
            seed=job.seed,
            max_steps=job.max_steps,
            batch_size=job.batch_size,
            data=data.name,
            samples=len(data),
            content=content_of(data),
            precision=str(job.precision),
            world=rt.world,
            parallel=job.parallel,
            val_loss=validated[1] if validated and validated[0] == step and math.isfinite(validated[1]) else None,
            pending=pending_line,
            scaler=scale_to_save(stepper),
            versions=state_dict.versions(),
        )
        before = progress.enter("save")
        clock.saving(step)
        with clock.during(Part.SAVE_STALL):
            saver.save(state, inner, optimizer, must=must)
        progress.enter(before)
        rhythm.saved()

    def log(line: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(**line)
        if trackers is not None:
            trackers.log(line)
        say(progress_text(line, job.max_steps))

    def validate() -> dict[str, float] | None:
        assert job.micro_batch_size is not None
        before = progress.enter("evaluation")
        begun = clock.now()
        with clock.during(Part.EVALUATION):
            result = evaluate(inner, stepper.context, val_data, val_feed, rt, samples=job.eval_samples, micro_batch=job.micro_batch_size, agree=agree)
            if result is None:
                clock.count(Part.LOST, since=begun)
        progress.enter(before)
        return result.metrics(val_data) if result else None

    validated: tuple[int, float] | None = None
    best = min((loss for path in complete(run.checkpoints) if (loss := val_loss_of(path)) is not None), default=None)
    best = rt.broadcast(best)

    def better(loss: float) -> bool:
        """Whether this is the best so far, and from now on the one to beat. NaN never is."""
        nonlocal best
        found = math.isfinite(loss) and (best is None or loss < best)
        best = loss if found else best
        return found

    prepared.train()
    if resumed == job.max_steps:
        flag.busy()
    if pending is not None:
        # The attempt before was stopped while it validated: that is done first, so that no line of metrics is missing.
        values = validate()
        if values is not None:
            log({**pending, **values})
            if flushed():
                saver.validated(step, values["val_loss"] if math.isfinite(values["val_loss"]) else None)
            better(values["val_loss"])

    while step < job.max_steps and not stopped_by and go_on():
        lr = lr_at(schedule, step)
        optim.set_lr(optimizer, lr)
        seed_everything(job.seed, step, rt.rank)
        tracer.before(step + 1)
        done = stepper.run(feed.of_step(step))
        if done.overflow:
            # The same step again, with a smaller scale or in bf16: schedule and data order do not notice.
            stepper = after_overflow(stepper, guard, run, step, say)
            continue
        guard.good()
        step += 1
        progress.set(step)
        clock.finished_step()
        progress.enter("step")
        tracer.after(step)
        uncounted += done.targets
        fault = first_fault(fault, step, done.fault)
        live.step()
        saver.poll()
        if step == (resumed or 0) + 1:
            flag.busy()
            saver.reserve(inner, optimizer)
            compiled.keep(validated=False)
            # What imports and compilation made stays: a full collection of 400,000 objects stops this thread, which feeds the GPU, for
            # a quarter of a second.
            gc.freeze()

        due_eval = step == job.max_steps or (job.eval_every > 0 and step % job.eval_every == 0)
        if due_eval or step % log_every == 0 or step == 1:
            total, targets = totals(done.loss_sum.double(), done.targets)
            loss = total / (targets or 1)
            line: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": done.norm.item(),
                "tokens": tokens,
                **live.values(tokens - tokens_of_line),
                "attempt": rt.attempt,
                "time": round(time.time(), 3),
            }
            tokens_of_line = tokens
            if stepper.scale is not None:
                line |= {"loss_scale": stepper.scale.scale, "growth_tracker": stepper.scale.good_steps}
            if not math.isfinite(total) or not math.isfinite(line["grad_norm"]):
                raise GradientOverflow(
                    f"at step {step} the loss is {loss} and the gradient norm {line['grad_norm']}, first in {first_bad(inner)}. A lower LR or more warm-up may help; DEBUG=true finds the operation."
                )
            if due_eval:
                values = validate()
                if values is None:
                    clock.stop()
                    save(line, must=True)
                    break
                line |= values
                validated = (step, values["val_loss"])
                compiled.keep(validated=True)
                live.restart()
            log(line)
        new_best = validated is not None and validated[0] == step and better(validated[1])
        due_save = (job.checkpoint_every != "auto" and step % job.checkpoint_every == 0) or (job.keep_every > 0 and step % job.keep_every == 0)
        if step == job.max_steps or (new_best and job.keep_best > 0) or due_save:
            save(must=step == job.max_steps)

    progress.enter("save")
    clock.stop()
    if stopped_by:
        if rt.is_main:
            with suppress(OSError):  # the save matters more
                event_log.append(run.ledger, Event.STOP, attempt=rt.attempt, job_id=rt.job_id, step=step, signal=name_of(stopped_by))
        saver.join()
        if saver.saved is None or saver.saved < step:
            save(must=True)
        say(f"stopped by {name_of(stopped_by)} at step {step:,}; saved, nothing is lost")
    saver.join()
    tracer.close()
    feed.close()
    val_feed.close()
    # No rank leaves before rank 0 has saved: its exit could otherwise end the step while rank 0 still writes.
    rt.barrier()
    if metrics is not None:
        metrics.close()
    if trackers is not None:
        trackers.close(stopped=bool(stopped_by))
    return Outcome(step, name_of(stopped_by) if stopped_by else None)


class _Speaker:
    """Prints on rank 0."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __call__(self, text: str) -> None:
        if self.enabled:
            # The log lies on the disk that may be full: no word is worth the training.
            with suppress(OSError):
                print(text, flush=True)
