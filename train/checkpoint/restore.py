"""Restore training from the newest checkpoint that verifies, or initialise weights from another run."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from jobs.checkpoint import directory
from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.core.errors import CheckpointError, ImpossibleJobError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.specs.precision import Precision
from train.checkpoint import state_dict
from train.checkpoint.changes import changes, refusal
from train.data.sources import Dataset
from train.distributed.runtime import Distributed


def resume(
    job: Job,
    run: RunDir,
    rt: Distributed,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    say: Callable[[str], None],
    ahead: directory.Ahead | None,
) -> state_dict.TrainStateRecord | None:
    """Load the newest checkpoint that verifies. Returns its record, None when there is none."""
    chosen: str | None = None
    asked = time.monotonic()
    if rt.is_main:
        directory.clear_leftovers(run.checkpoints)
        path, damaged = directory.newest_verified(run.checkpoints, rt.attempt, ahead)
        for name, reason in damaged:
            event_log.append(run.ledger, Event.DAMAGED, attempt=rt.attempt, job_id=rt.job_id, name=name, reason=reason)
            before = f"the one before, {path.name}, is used" if path else "there is none before it that is whole: training begins anew"
            say(f"  WARNING: checkpoint {reason}; it is kept as checkpoints/{name}, and {before}")
        chosen = path.name if path else None
    # Rank 0 chooses for all: on a shared file system each node may see another listing.
    chosen = rt.broadcast(chosen)
    state: state_dict.TrainStateRecord | None = None
    if chosen is not None:
        begun = time.monotonic()
        state, remarks = state_dict.load(run.checkpoints / chosen, model, optimizer)
        changed = changes(state, job, data, rt.world_size)
        refused = rt.broadcast(refusal(changed, event_log.read(run.ledger), state.step) if rt.is_main else None)
        if refused:
            raise ImpossibleJobError(refused)
        remarks += [f"{name} was {then}, now {now}" for name, (then, now) in changed.items()]
        if job.precision is Precision.FP8 and job.fp8_recipe == "delayed":
            remarks.append("WARNING: the history of scales of FP8_RECIPE=delayed starts anew, so losses will be close and not identical")
        took = f"waited {begun - asked:.1f} s for its sums, loaded in {time.monotonic() - begun:.1f} s"
        say(f"  resumed at step {state.step:,} ({chosen}, {took})" + "".join(f"; {remark}" for remark in remarks))
    if rt.is_main:
        event_log.append(run.ledger, Event.RESUMED, attempt=rt.attempt, job_id=rt.job_id, step=state.step if state else 0)
    return state


def initialise(source: Path, model: nn.Module, rt: Distributed | None = None) -> str:
    """Puts the weights of another run, or of one checkpoint, into a new model: fine-tuning, from step 0. Returns a remark.

    Raises CheckpointError when there is none there that verifies, or it does not fit."""
    # Rank 0 chooses for all: the other run may still train, and have a newer one a moment later.
    path, damaged = rt.broadcast(_choose(source) if rt.is_main else None) if rt else _choose(source)
    if path is None:
        raise CheckpointError(
            f"INIT_FROM: {source} " + (f"has no checkpoint that verifies: {damaged}" if damaged else "is neither a checkpoint nor a run with one.")
        )
    # One that is whole and does not fit is no reason to take an older one.
    state, _ = state_dict.load(path, model, None)
    passed = f"; WARNING: passed over what is damaged: {damaged}" if damaged else ""
    return f"weights from {path}, step {state.step:,}; optimizer, schedule and data start fresh{passed}"


def _choose(source: Path) -> tuple[Path | None, str]:
    """The newest checkpoint there that verifies, and what is wrong with those before it."""
    damaged = []
    for path in [source] if os.path.lexists(source / directory.MANIFEST) else directory.complete(RunDir(source).checkpoints):
        try:
            directory.verify(path)
        except CheckpointError as err:
            damaged.append(str(err))
            continue
        return path, "; ".join(damaged)
    return None, "; ".join(damaged)
