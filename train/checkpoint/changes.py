"""What is different between a checkpoint and the job that resumes from it, and which of it a person must have asked for.

Precision, number of processes and parallel mode may change at any time: global batch, schedule and data order do not depend
on them. Horizon, batch, seed and data decide what is trained at which step, so these change only by an explicit word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jobs.config.settings import Job
from jobs.core.contract import Event
from train.checkpoint.state_dict import TrainStateRecord
from train.data.sources import Dataset, content_of

NEEDS_A_WORD = ("max_steps", "batch_size", "seed", "data")


def changes(state: TrainStateRecord, job: Job, data: Dataset, world: int) -> dict[str, tuple[Any, Any]]:
    """Setting -> (as it was saved, as it is now), for those that differ."""
    pairs = {
        "max_steps": (state.max_steps, job.max_steps),
        "batch_size": (state.batch_size, job.batch_size),
        "seed": (state.seed, job.seed),
        "data": _data(state, data),
        "precision": (state.precision, str(job.precision)),
        "parallel": (state.parallel, job.parallel),
        "world size": (state.world, world),
    }
    return {name: (then, now) for name, (then, now) in pairs.items() if then != now}


def _data(state: TrainStateRecord, data: Dataset) -> tuple[str, str]:
    """The names; where these are alike and what is under them is not, with what tells them apart. An older checkpoint says less."""
    if state.data == data.name:
        if state.samples not in (None, len(data)):
            return f"{state.data} of {state.samples:,} samples", f"{data.name} of {len(data):,}"
        if None not in (state.content, content := content_of(data)) and state.content != content:
            return f"{state.data} with content {state.content}", f"{data.name} with {content}"
    return state.data, data.name


def refusal(changed: Mapping[str, tuple[Any, Any]], events: Iterable[Mapping[str, Any]], step: int) -> str | None:
    """Why a resume from the checkpoint of `step` must not happen, or None. `events` is the ledger, where `holdfast resume --allow-change`
    wrote what it allows: from a checkpoint that was there then, however often it is resumed from."""
    allowed: set[str] = set()
    for event in events:
        if event.get("event") == Event.CHECKPOINT and event.get("step") == step:
            allowed.clear()
        elif event.get("event") == Event.CHANGED and event.get("allow"):
            allowed |= {*event["changes"], "data"}
    asked = {name: pair for name, pair in changed.items() if name in NEEDS_A_WORD and name not in allowed}
    if not asked:
        return None
    said = ", ".join(f"{name.upper()} was {then}, is now {now}" for name, (then, now) in asked.items())
    return f"{said}: that changes what is trained at which step. If you mean it: holdfast resume RUN KEY=value --allow-change"
