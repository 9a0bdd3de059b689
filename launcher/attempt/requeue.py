"""Requeues the job of a run at the end of an attempt, and confirms that the request survives a crash of slurmctld."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from jobs.config.settings import Job
from jobs.core.contract import Cause, Event
from jobs.core.errors import SettingError, SubmitError
from jobs.run import event_log, permissions
from jobs.run.rundir import RunDir
from launcher.attempt.classify_exit import is_ended_for_good
from launcher.attempt.node_exclusion import avoided
from slurm.client import Slurm, expand_nodelist
from slurm.states import WAITING, base

# Seconds to wait for a controller that is being restarted; the node's own KILL may come first.
_REQUEUE_PATIENCE_S = 600.0
# Limit for requests that are repeated because slurmctld lost the one before.
_MAX_REQUESTS = 20

# Causes after which slurmctld itself ends the job, and this attempt brings it back all the same.
_ENDED_BY_SLURM = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_FAILURE})


@dataclass(frozen=True)
class _Request:
    """A request that another attempt be started. `job_id` is the job that will run it, None where Slurm refused; `way` says how, for the user."""

    way: str
    job_id: str | None


class _Fate(Enum):
    """What became of a request that slurmctld accepted."""

    KEPT = auto()
    LOST = auto()
    CANCELLED = auto()


def send_back(run: RunDir, job: Job, number: int, job_id: str, restarts: int, slurm: Slurm, cause: Cause | None = None) -> bool:
    """Requeues the job with `scontrol requeue`; where that is refused, submits a job with the same script that starts after this one.

    Returns whether another attempt will start: False if the job was cancelled or Slurm refused both. Returns after `requeue_confirm_s`
    seconds, when slurmctld has saved the request, and repeats a request that was lost in a crash of slurmctld."""
    with suppress(ValueError):  # signal handlers can be set in the main thread only
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cause not in _ENDED_BY_SLURM and _is_cancelled(job_id, restarts, slurm):
        _write_cancel(run, number, job_id)
        return False
    for repetition in range(_MAX_REQUESTS):
        request = _ask_back(run, job_id, restarts, slurm, "; slurmctld lost the request before in a crash" if repetition else "")
        _write_requeue(run, job, number, job_id, request, slurm)
        if request.job_id is None:
            return False
        fate = _confirm(job, job_id, request.job_id, restarts, slurm)
        if fate is _Fate.CANCELLED:
            _write_cancel(run, number, job_id)
        if fate is not _Fate.LOST:
            return fate is _Fate.KEPT
    print(f"holdfast: slurmctld lost {_MAX_REQUESTS} requests to requeue job {job_id}; holdfast resume {run.id} starts the run again", flush=True)
    return False


def _is_cancelled(job_id: str, restarts: int, slurm: Slurm) -> bool:
    """Whether slurmctld has ended the job for good. A slurmctld that is being restarted is waited for."""
    try:
        info = slurm.patiently(lambda: slurm.job(job_id), _REQUEUE_PATIENCE_S)
    except SubmitError:
        return False
    return info is not None and info.restarts <= restarts and is_ended_for_good(info)


def _write_cancel(run: RunDir, number: int, job_id: str) -> None:
    event_log.append(run.ledger, Event.CANCEL, attempt=number, job_id=job_id, by="scancel")
    print(f"holdfast: job {job_id} is cancelled and not requeued", flush=True)


def _ask_back(run: RunDir, job_id: str, restarts: int, slurm: Slurm, why: str) -> _Request:
    try:
        return _Request(slurm.requeue(job_id, restarts, _REQUEUE_PATIENCE_S) + why, job_id)
    except SubmitError as refused:
        try:
            successor, new = slurm.successor(permissions.script_to_submit(run), job_id, run.script.parent.name, run.path.name if run.is_member else None)
            state = "was submitted and starts" if new else "is queued already and starts"
            return _Request(f"job {successor} {state} when this one is over; requeue was not possible: {refused}{why}", successor)
        except (SubmitError, SettingError) as err:
            return _Request(f"could not be requeued: {refused}; and no successor could be submitted: {err}{why}", None)


def _confirm(job: Job, job_id: str, waiting: str, restarts: int, slurm: Slurm) -> _Fate:
    """What became of a request, asked when slurmctld must have saved it.

    slurmctld answers before it saves, and a crash in between undoes the request: the job is then recovered as running, ends with this script
    and is FAILED. Nothing that a client can read says when the state was saved (BOOT_TIME shows a restart only), but the time is bounded:
    the thread that saves writes the jobs at most SAVE_MAX_WAIT = 5 s after its last start, which it checks every second
    (src/slurmctld/state_save.c, the same in 22.05.8, 24.11.5 and 26.05.3). A job that shows its new restart count after that time was either
    saved by this slurmctld or recovered from the saved state by the next one. This script must live until then."""
    if job.requeue_confirm_s == 0:
        return _Fate.KEPT
    time.sleep(job.requeue_confirm_s)
    try:
        info = slurm.patiently(lambda: slurm.job(waiting), _REQUEUE_PATIENCE_S)
    except SubmitError as err:
        print(f"holdfast: cannot confirm that the requeue was saved: {err}", flush=True)
        return _Fate.KEPT
    if info is None:
        return _Fate.LOST
    if waiting != job_id or info.restarts > restarts or base(info.state) in WAITING:
        return _Fate.KEPT
    return _Fate.CANCELLED if is_ended_for_good(info) else _Fate.LOST


def _write_requeue(run: RunDir, job: Job, number: int, job_id: str, request: _Request, slurm: Slurm) -> None:
    """The `requeue` line, and the nodes that the next attempt stays away from."""
    events = event_log.read(run.ledger)
    bad = avoided(events, job.avoid_node_h, time.time())
    # Slurm keeps a list of nodes over requeues: it must be reset when their time is over.
    earlier = any(event["event"] == Event.REQUEUE and event.get("successor", event["job_id"]) == job_id and event.get("avoids") for event in events)
    fields: dict[str, object] = {"successor": request.job_id} if request.job_id not in (None, job_id) else {}
    if bad:
        fields["avoids"] = bad
    # What follows may be cut short: Slurm ends this script when its job is requeued. TERM is ignored here, KILL is not.
    event_log.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=request.way, **fields)
    print(f"holdfast: {request.way}", flush=True)
    if request.job_id is not None and (bad or earlier):
        _exclude(job, request.job_id, bad, earlier, slurm)


def _exclude(job: Job, waiting: str, bad: list[str], earlier: bool, slurm: Slurm) -> None:
    """Keeps the waiting job away from nodes that failed; allows them again when their time is over (`earlier`: some were excluded before)."""
    try:
        out = {*bad, *expand_nodelist(",".join(job.exclude))}
        if bad and slurm.partition_nodes(waiting) - len(out) >= job.nodes:
            # In the order that was given: of node[1,3] each half is an item of its own.
            slurm.exclude(waiting, [*job.exclude, *(node for node in bad if node not in job.exclude)])
            print(f"holdfast: the next attempt stays away from {', '.join(bad)}", flush=True)
        elif earlier:
            slurm.exclude(waiting, job.exclude)
            print("holdfast: nodes that earlier attempts stayed away from may be used again", flush=True)
    except (SubmitError, IndexError, ValueError) as err:
        print(f"holdfast: the nodes of the next attempt cannot be chosen ({', '.join(bad) or 'none'} to be avoided): {err}", flush=True)
