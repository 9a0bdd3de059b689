"""Going on from the newest checkpoint that verifies, or from the beginning where there is none; also with the weights of another run."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from jobs import ckpt_format, ledger
from jobs.contract import Event
from jobs.errors import CheckpointError, ImpossibleJobError
from jobs.precision import Precision
from jobs.rundir import RunDir
from jobs.settings import Job
from train import checkpoint
from train.changes import changes, refusal
from train.data.sources import Dataset
from train.runtime import Runtime


def resume(
    job: Job,
    run: RunDir,
    rt: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    say: Callable[[str], None],
    ahead: ckpt_format.Ahead | None,
) -> checkpoint.State | None:
    """Loads the newest checkpoint that verifies. Returns its state, None when there is none."""
    chosen: str | None = None
    asked = time.monotonic()
    if rt.is_main:
        ckpt_format.clear_leftovers(run.checkpoints)
        path, damaged = ckpt_format.newest_verified(run.checkpoints, rt.attempt, ahead)
        for name, reason in damaged:
            ledger.append(run.ledger, Event.DAMAGED, attempt=rt.attempt, job_id=rt.job_id, name=name, reason=reason)
            before = f"the one before, {path.name}, is used" if path else "there is none before it that is whole: training begins anew"
            say(f"  WARNING: checkpoint {reason}; it is kept as checkpoints/{name}, and {before}")
        chosen = path.name if path else None
    # Rank 0 chooses for all: on a shared file system each node may see another listing.
    chosen = rt.broadcast(chosen)
    state: checkpoint.State | None = None
    if chosen is not None:
        begun = time.monotonic()
        state, remarks = checkpoint.load(run.checkpoints / chosen, model, optimizer)
        changed = changes(state, job, data, rt.world)
        refused = rt.broadcast(refusal(changed, ledger.read(run.ledger), state.step) if rt.is_main else None)
        if refused:
            raise ImpossibleJobError(refused)
        remarks += [f"{name} was {then}, now {now}" for name, (then, now) in changed.items()]
        if job.precision is Precision.FP8 and job.fp8_recipe == "delayed":
            remarks.append("WARNING: the history of scales of FP8_RECIPE=delayed starts anew, so losses will be close and not identical")
        took = f"waited {begun - asked:.1f} s for its sums, loaded in {time.monotonic() - begun:.1f} s"
        say(f"  resumed at step {state.step:,} ({chosen}, {took})" + "".join(f"; {remark}" for remark in remarks))
    if rt.is_main:
        ledger.append(run.ledger, Event.RESUMED, attempt=rt.attempt, job_id=rt.job_id, step=state.step if state else 0)
    return state


def initialise(source: Path, model: nn.Module, rt: Runtime | None = None) -> str:
    """Puts the weights of another run, or of one checkpoint, into a new model: fine-tuning, from step 0. Returns a remark.

    Raises CheckpointError when there is none there that verifies, or it does not fit."""
    # Rank 0 chooses for all: the other run may still train, and have a newer one a moment later.
    path, damaged = rt.broadcast(_choose(source) if rt.is_main else None) if rt else _choose(source)
    if path is None:
        raise CheckpointError(
            f"INIT_FROM: {source} " + (f"has no checkpoint that verifies: {damaged}" if damaged else "is neither a checkpoint nor a run with one.")
        )
    # One that is whole and does not fit is no reason to take an older one.
    state, _ = checkpoint.load(path, model, None)
    passed = f"; WARNING: passed over what is damaged: {damaged}" if damaged else ""
    return f"weights from {path}, step {state.step:,}; optimizer, schedule and data start fresh{passed}"


def _choose(source: Path) -> tuple[Path | None, str]:
    """The newest checkpoint there that verifies, and what is wrong with those before it."""
    damaged = []
    for path in [source] if (source / ckpt_format.MANIFEST).is_file() else ckpt_format.complete(RunDir(source).checkpoints):
        try:
            ckpt_format.verify(path)
        except CheckpointError as err:
            damaged.append(str(err))
            continue
        return path, "; ".join(damaged)
    return None, "; ".join(damaged)
