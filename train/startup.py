"""Start-up of a training process: join the ranks, open the data, build and restore the model, and make the Trainer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from jobs.checkpoint import directory
from jobs.checkpoint.directory import complete, val_loss_of
from jobs.config.settings import Job
from jobs.config.validation import schedule_of
from jobs.rank.stop_flag import StopFlag
from jobs.run import event_log
from jobs.run.goodput import Part
from jobs.run.progress import Progress
from jobs.run.rundir import RunDir, origins
from jobs.specs.lr_schedule import LRSchedule, describe
from train import optim, perf_flags
from train.build import build, open_split
from train.checkpoint.interval import YoungInterval
from train.checkpoint.manager import CheckpointManager
from train.checkpoint.restore import initialise, resume
from train.checkpoint.state_dict import TrainStateRecord
from train.compilation.compile_cache import CompileCache
from train.data.loader import TrainLoader, ValidationLoader
from train.data.sources import Dataset
from train.distributed import runtime
from train.distributed.parallel import is_sharded, prepare
from train.distributed.runtime import Distributed
from train.distributed.stop_agreement import StopAgreement
from train.metrics.flops import flops_per_sample
from train.metrics.goodput_timer import GoodputTimer
from train.metrics.logger import MetricsFile, MetricsLogger
from train.metrics.profiler import StepProfiler
from train.metrics.step_totals import StepTotals
from train.metrics.throughput import Throughput
from train.metrics.tracking import Trackers
from train.model_check import check_count_rule
from train.overflow_policy import restore_scaler
from train.precision.numerics import GradScaler, OverflowPolicy
from train.rng import seed_everything
from train.train_state import TrainState
from train.train_step import TrainStep
from train.trainer import Trainer
from train.validation import Validator


class MainRankPrinter:
    """Prints on rank 0. A failed write never ends training: the log may be on a full disk."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __call__(self, text: str) -> None:
        if self.enabled:
            with suppress(OSError):
                print(text, flush=True)


@dataclass(frozen=True)
class _Process:
    """What every part of this rank is built from."""

    job: Job
    run: RunDir
    dist: Distributed
    flag: StopFlag
    timer: GoodputTimer
    say: Callable[[str], None]


@dataclass(frozen=True)
class _Restored:
    """The model before DDP, its optimizer, and the record of the checkpoint that both come from; None at the beginning of a run."""

    model: nn.Module
    context: Callable[[], AbstractContextManager[object]]
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None
    record: TrainStateRecord | None

    @property
    def step(self) -> int:
        return self.record.step if self.record else 0

    @property
    def is_pending(self) -> bool:
        """Whether a validation of this step is still to be finished."""
        return self.record is not None and self.record.pending is not None


def build_trainer(job: Job, run: RunDir, flag: StopFlag, timer: GoodputTimer, verifier: directory.Ahead | None = None) -> Trainer:
    """Build the Trainer of this rank, from the newest checkpoint that verifies. Collective.

    `verifier`, on rank 0: verifies the newest checkpoint since before torch was imported. Raises the errors of jobs.core.errors."""
    dist = runtime.init(job)
    process = _Process(job, run, dist, flag, timer, MainRankPrinter(dist.is_main))
    process.say(f"attempt {dist.attempt} of run {run.id}")
    process.say("  " + runtime.describe(job, dist, origins(run).get("precision", "default")))
    schedule = schedule_of(job)
    for text in describe(schedule):
        process.say("  " + text)
    # Anomaly mode names the forward line behind a backward function that makes a NaN; far too slow to leave on.
    torch.autograd.set_detect_anomaly(job.debug, check_nan=True)
    seed_everything(job.seed, step=0)
    data, val_data = open_split(job, "train"), open_split(job, "val")
    # Rank 0 lists the checkpoints for all: on a shared file system each node may see another listing.
    is_fresh = dist.broadcast(not any(complete(run.checkpoints)) if dist.is_main else None)
    compile_cache = CompileCache(job, run, dist, process.say)
    compile_cache.load()
    restored = _restore(process, data, verifier, is_fresh)
    return _assemble(process, schedule, data, val_data, compile_cache, restored)


def _restore(process: _Process, data: Dataset, verifier: directory.Ahead | None, is_fresh: bool) -> _Restored:
    """Build model and optimizer, and load the newest checkpoint that verifies, or the weights of INIT_FROM. Collective."""
    job, dist, say = process.job, process.dist, process.say
    model, context = build(job, data, dist, say, drawn=is_fresh)
    for text in perf_flags.apply(job, model, data, dist.device):
        say("  " + text)
    optimizer = optim.build(job, model)
    with process.timer.during(Part.RESTORE):
        record = resume(job, process.run, dist, model, optimizer, data, say, verifier)
        if record is None and not is_fresh:
            # Every checkpoint was damaged: start from the first step, with the weights that the first attempt drew.
            seed_everything(job.seed, step=0)
            model, context = build(job, data, dist, MainRankPrinter(enabled=False))
            optimizer = optim.build(job, model)
        if record is None and job.init_from:
            say("  " + initialise(Path(job.init_from), model, dist))
    return _Restored(model, context, optimizer, GradScaler.from_job(job), record)


def _assemble(process: _Process, schedule: LRSchedule, data: Dataset, val_data: Dataset, compile_cache: CompileCache, restored: _Restored) -> Trainer:
    """Make the parts of the Trainer around a restored model, warm up, and check the model. Collective."""
    job, run, dist, timer, say = process.job, process.run, process.dist, process.timer, process.say
    attempt, inner = run.attempt(dist.attempt), restored.model
    prepared = prepare(inner, job, dist)
    _log_size(process, inner, data)
    metrics_file = MetricsFile(run.metrics, restored.step, again=restored.is_pending) if dist.is_main else None
    progress = _start_progress(process, restored.step)
    agreement = _watch_for_stops(process)
    loader = TrainLoader(job, dist, data, attempt.samples(dist.rank) if job.log_samples else None)
    policy = OverflowPolicy(job, restored.scaler)
    step = TrainStep(job, dist, prepared, inner, restored.optimizer, restored.context, restored.scaler)
    restore_scaler(step, policy, restored.record, job, say)
    validator = Validator(job, inner, val_data, ValidationLoader(job, val_data), dist, agreement, timer, progress)
    first_batch = loader.peek(restored.step)
    throughput = Throughput(job, dist, flops_per_sample(inner, first_batch), timer)
    for text in throughput.lines():
        say("  " + text)
    profiler = StepProfiler(job, attempt.trace, say, enabled=dist.is_main)
    step.warm_up(first_batch)
    check_count_rule(inner, job, data, dist, say)
    throughput.restart()
    # After the worker processes are forked, which inherit no thread but might inherit a lock that one holds.
    trackers = Trackers(job, run, restored.step - restored.is_pending, say) if dist.is_main else None
    interval = YoungInterval(job, event_log.read(run.ledger), say)
    saved = restored.record.step if restored.record else None
    checkpoints = CheckpointManager(run, job, dist, say, sharded=is_sharded(inner), saved=saved, interval=interval)
    state = TrainState.from_record(restored.record, _best_val_loss(process))
    metrics = MetricsLogger(job, dist, metrics_file, trackers, throughput, say, state.tokens)
    totals = StepTotals(dist, job, inner)
    return Trainer(
        job, run, dist, process.flag, agreement, timer, progress, say, schedule, data, loader, step, policy, totals, validator, checkpoints,
        metrics, profiler, compile_cache, state,
    )  # fmt: skip


def _log_size(process: _Process, model: nn.Module, data: Dataset) -> None:
    job = process.job
    if any(p.requires_grad for p in model.parameters()):
        parameters = sum(p.numel() for p in model.parameters())
        batch = f"batch {job.batch_size} = {process.dist.world_size} x {job.micro_batch_size} x {job.grad_accum_steps}"
        process.say(f"  model {job.model}: {parameters:,} parameters · data {data.name}: {len(data):,} samples · {batch}")


def _start_progress(process: _Process, step: int) -> Progress:
    progress = Progress(process.run.attempt(process.dist.attempt), process.dist.is_main)
    progress.set(step)
    progress.enter("first_step")
    process.timer.enter(Part.FIRST_STEP)
    return progress


def _watch_for_stops(process: _Process) -> StopAgreement:
    """Rank 0 looks for the stop file and for a later attempt, besides the signals that every rank receives."""
    run, dist = process.run, process.dist
    process.flag.successor = run.attempt(dist.attempt + 1).path if dist.is_main and dist.attempt else None
    return StopAgreement(dist, process.flag, run.stop_file if dist.is_main else None)


def _best_val_loss(process: _Process) -> float | None:
    """The smallest validation loss in the manifests of the checkpoints; None where none was validated."""
    paths = complete(process.run.checkpoints) if process.dist.is_main else []
    losses = [loss for path in paths if (loss := val_loss_of(path)) is not None]
    best: float | None = process.dist.broadcast(min(losses, default=None))
    return best
