"""Where the time of a run went: every attempt's seconds from START to END, split into parts that add up.

Rank 0 keeps a clock (`train/metrics/goodput_timer.py`) whose sections are these parts; the end of an attempt turns its last record into the
`parts` of the END line (`parts_of`), and `account` reads a whole ledger. Only what comes later can tell that work was lost,
so `account` moves it: the useful seconds of steps that a later attempt made again.

An attempt is counted from the START line, which the batch script writes some tenths of a second after Slurm began the job.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jobs.core.contract import Cause, Event


class Part(StrEnum):
    """What a second of an allocation was spent on."""

    # Finished optimizer steps that no later attempt had to make again.
    USEFUL = "useful"
    # From START to the checkpoint: checks of the nodes, srun, imports, rendezvous, data, model.
    START_UP = "start_up"
    # Verifying and loading the checkpoint.
    RESTORE = "restore"
    # What the first step took beyond an ordinary one: warm-up of libraries, compilation, memory.
    FIRST_STEP = "first_step"
    # Any rank waiting for its samples.
    DATA_WAIT = "data_wait"
    # Training standing still for a save: the copy to host memory, the save before that is still being written, the last save.
    SAVE_STALL = "save_stall"
    # Asked for, and not training: a part of its own.
    EVALUATION = "evaluation"
    # Steps that were made again, a step that was never finished, a validation that was broken off.
    LOST = "lost"
    # From the end of the last step, or from the fault, to END: the last save of a stopped run, processes that leave, the verdict.
    STOP = "stop"
    # No progress until the watchdog ended it.
    HANG = "hang"
    # A person's own script (`entry:`): what it did inside is not known.
    SCRIPT = "script"
    # The rest, which nothing above explains.
    OTHER = "other"


@dataclass(frozen=True)
class Spent:
    """One attempt: wall seconds from START to END, the same split into parts, and the GPUs (ranks) that it held."""

    attempt: int
    job_id: str
    started: float
    seconds: float
    gpus: int
    cause: str | None
    parts_s: dict[str, float]


@dataclass(frozen=True)
class Account:
    """A whole run. `parts_s` has every part, in the order of `Part`, in wall seconds over all attempts; `parts_gpu_hours` the
    same times the GPUs of each attempt. `queue_s` is outside of any allocation: before the first attempt and between them.
    `useful_share` is useful GPU time over all GPU time, None when nothing was spent."""

    attempts: list[Spent] = field(default_factory=list)
    allocation_s: float = 0.0
    queue_s: float = 0.0
    gpu_hours: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    parts_gpu_hours: dict[str, float] = field(default_factory=dict)
    useful_share: float | None = None


def parts_of(record: Mapping[str, Any] | None, seconds: float, cause: str | None, *, own_script: bool = False, worked: bool = False) -> dict[str, float]:
    """The parts of one attempt of `seconds`, from the last record of rank 0's clock; together they are `seconds`.

    `cause` None: the attempt still runs. Without a record all of it was start-up, unless it is known to have `worked`: then the
    record is lost, and the time is nobody's."""
    if own_script:
        return {Part.SCRIPT.value: _round(seconds)}
    parts = {part: 0.0 for part in Part}
    try:
        assert record is not None
        done = {Part(name): max(float(value), 0.0) for name, value in record["seconds"].items()}
        part, since, passed, unfinished, steps = (
            Part(record["part"]),
            float(record["since"]),
            float(record["passed"]),
            float(record["unfinished"]),
            int(record["steps"]),
        )
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        parts[Part.OTHER if worked or record is not None else Part.START_UP] = max(seconds, 0.0)
        return _shown(parts)
    parts.update(done)
    seen, unseen = max(min(passed, seconds) - since, 0.0), max(seconds - max(passed, since), 0.0)
    if part is Part.STOP:
        parts[Part.STOP] += seen + unseen
    elif cause == Cause.HANG:
        waited = min(float(record.get("waited", 0.0)), parts[Part.DATA_WAIT])
        parts[Part.HANG] += seen + unseen + waited
        parts[Part.DATA_WAIT] -= waited
        parts[Part.LOST] += unfinished
    elif cause is None:
        parts[part] += seen + unfinished
        parts[Part.OTHER] += unseen
    else:
        # Ended without a word: the clock was last seen at `passed`; what follows is the dying.
        parts[Part.LOST if part is Part.USEFUL else part] += seen
        parts[Part.LOST] += unfinished
        parts[Part.STOP] += unseen
    # The first step is a step too: an ordinary one's worth of it is work.
    ordinary = min(parts[Part.USEFUL] / (steps - 1), parts[Part.FIRST_STEP]) if steps > 1 else 0.0
    parts[Part.USEFUL] += ordinary
    parts[Part.FIRST_STEP] -= ordinary
    parts[Part.OTHER] += max(seconds - sum(parts.values()), 0.0)
    return _shown(parts)


def account(events: Iterable[Mapping[str, Any]], *, now: float | None = None, open_record: Mapping[str, Any] | None = None) -> Account:
    """What a ledger says about the time of its run.

    `now` (Unix seconds) and `open_record` (the clock's record of an attempt without END) count a running attempt in; without
    `now` such an attempt is left out. Attempts from before there was a clock are all `other`."""
    starts: dict[int, Mapping[str, Any]] = {}
    ends: dict[int, Mapping[str, Any]] = {}
    resumed: dict[int, int] = {}
    submitted: list[float] = []
    for event in events:
        number = int(event["attempt"])
        if event["event"] == Event.START:
            starts.setdefault(number, event)
        elif event["event"] == Event.END:
            ends.setdefault(number, event)
        elif event["event"] == Event.RESUMED:
            resumed[number] = int(event.get("step", 0))
        elif event["event"] == Event.SUBMITTED:
            submitted.append(float(event["time"]))
    spent, queue_s = [], 0.0
    free_since = submitted[0] if submitted else None
    for number in sorted(starts):
        start, end = starts[number], ends.get(number)
        begun = float(start["time"])
        if end is None and now is None:
            continue
        if end is not None:
            seconds = float(end.get("seconds", max(float(end["time"]) - begun, 0.0)))
            parts = {**_empty(), **(end.get("parts") or {Part.OTHER.value: seconds})}
            _move_lost(parts, end, resumed.get(number, int(end.get("start_step", 0))), [step for later, step in resumed.items() if later > number])
        else:
            assert now is not None
            seconds = max(now - begun, 0.0)
            parts = {**_empty(), **parts_of(open_record, seconds, None)}
        queue_s += max(begun - free_since, 0.0) if free_since is not None else 0.0
        free_since = begun + seconds
        cause = str(end["cause"]) if end is not None and "cause" in end else None
        spent.append(Spent(number, str(start["job_id"]), begun, _round(seconds), int(start.get("world", 1)), cause, parts))
    gpu_s = sum(one.seconds * one.gpus for one in spent)
    by_gpu = {part.value: sum(one.parts_s[part.value] * one.gpus for one in spent) for part in Part}
    return Account(
        attempts=spent,
        allocation_s=_round(sum(one.seconds for one in spent)),
        queue_s=_round(queue_s),
        gpu_hours=gpu_s / 3600,
        parts_s={part.value: _round(sum(one.parts_s[part.value] for one in spent)) for part in Part},
        parts_gpu_hours={name: value / 3600 for name, value in by_gpu.items()},
        useful_share=by_gpu[Part.USEFUL.value] / gpu_s if gpu_s else None,
    )


def _move_lost(parts: dict[str, float], end: Mapping[str, Any], first: int, later: Sequence[int]) -> None:
    """From useful to lost: the steps beyond the newest checkpoint, and those that a later attempt began before."""
    reached = int(end.get("step", first))
    saved = end.get("saved_step")
    kept = min([reached, *([int(saved)] if saved is not None else []), *later])
    useful = parts[Part.USEFUL.value]
    if kept >= reached or useful <= 0:
        return
    lost = useful - _useful_at(max(kept, first), first, reached, useful, end.get("marks") or [])
    parts[Part.USEFUL.value] = _round(useful - lost)
    parts[Part.LOST.value] = _round(parts[Part.LOST.value] + lost)


def _useful_at(step: int, first: int, reached: int, useful: float, marks: Sequence[Sequence[float]]) -> float:
    """Useful seconds of an attempt when it had made `step`: measured at each save, in between by the number of steps."""
    points = [(first, 0.0), *((int(at), min(float(seconds), useful)) for at, seconds in marks if first < at < reached), (reached, useful)]
    for (left, before), (right, after) in zip(points, points[1:], strict=False):
        if left <= step <= right and right > left:
            return before + (after - before) * (step - left) / (right - left)
    return useful if step >= reached else 0.0


def _empty() -> dict[str, float]:
    return {part.value: 0.0 for part in Part}


def _shown(parts: Mapping[Part, float]) -> dict[str, float]:
    return {part.value: _round(value) for part, value in parts.items() if _round(value)}


def _round(value: float) -> float:
    return round(value, 3)
