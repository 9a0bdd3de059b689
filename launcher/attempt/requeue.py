"""Back into the queue at the end of an attempt."""

import signal
import time
from contextlib import suppress
from functools import partial
from typing import Any

from jobs.config.settings import Job
from jobs.core.contract import Cause, Event
from jobs.core.errors import SubmitError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.attempt.classify_exit import is_ended_for_good
from launcher.attempt.node_exclusion import avoided
from slurm.client import Slurm, expand_nodelist

# Seconds to wait for a controller that is being restarted; the node's own KILL may come first.
_REQUEUE_PATIENCE_S = 600.0
# How often a request that was lost is made again.
_CONFIRM_TRIES = 20


# Causes after which slurmctld itself ends the job, and this attempt brings it back all the same.
_ENDED_BY_SLURM = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_FAILURE})


def send_back(run: RunDir, job: Job, number: int, job_id: str, restarts: int, slurm: Slurm, cause: Cause | None = None) -> bool:
    """Back into the queue: by `scontrol requeue`, else by a job of its own that waits for the end of this one.

    Returns when slurmctld has saved that, so that its crash does not undo it. False for a job that was cancelled meanwhile."""
    with suppress(ValueError):  # not the main thread: then nobody signals us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cause not in _ENDED_BY_SLURM and _is_cancelled(job_id, restarts, slurm):
        event_log.append(run.ledger, Event.CANCEL, attempt=number, job_id=job_id, by="scancel")
        print(f"holdfast: job {job_id} is cancelled and not requeued", flush=True)
        return False
    way, fields = _ask_back(run, job_id, restarts, slurm)
    _write_requeue(run, job, number, job_id, way, fields, slurm)
    _confirm(run, number, job_id, restarts, slurm, way, fields)
    return True


def _is_cancelled(job_id: str, restarts: int, slurm: Slurm) -> bool:
    """Whether slurmctld has ended the job for good. A slurmctld that is being restarted is waited for."""
    try:
        info = slurm.patiently(lambda: slurm.job(job_id), _REQUEUE_PATIENCE_S)
    except SubmitError:
        return False
    return info is not None and info.restarts <= restarts and is_ended_for_good(info)


def _ask_back(run: RunDir, job_id: str, restarts: int, slurm: Slurm) -> tuple[str, dict[str, Any]]:
    """The way that was found, in words, and the fields of the ledger that belong to it."""
    try:
        return slurm.requeue(job_id, restarts, _REQUEUE_PATIENCE_S), {}
    except SubmitError as refused:
        try:
            successor, new = slurm.successor(run.script, job_id, run.script.parent.name, run.path.name if run.is_member else None)
            said = "was submitted to go" if new else "is queued already and goes"
            return f"job {successor} {said} on when this one is over; requeue was not possible: {refused}", {"successor": successor}
        except SubmitError as err:
            return f"could not be requeued: {refused}; and no successor could be submitted: {err}", {}


def _confirm(run: RunDir, number: int, job_id: str, restarts: int, slurm: Slurm, way: str, fields: dict[str, Any]) -> None:
    """Waits until what slurmctld accepted is in its saved state, and asks again where it was lost in a crash.

    This script must live for that: when it is over, slurmctld ends the job that it has not requeued."""
    if way.startswith("could not"):
        return
    for _ in range(_CONFIRM_TRIES):
        time.sleep(slurm.save_wait_s)
        try:
            info = slurm.patiently(partial(slurm.job, fields.get("successor", job_id)), _REQUEUE_PATIENCE_S)
        except SubmitError as err:
            print(f"holdfast: whether the requeue was saved is not known: {err}", flush=True)
            return
        if "successor" in fields:
            if info is not None:
                return
        elif info is None or info.restarts > restarts or is_ended_for_good(info):
            return
        way, again = _ask_back(run, job_id, restarts, slurm)
        fields = again
        way = f"{way}; slurmctld lost the first request in a restart"
        event_log.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=way, **again)
        print(f"holdfast: {way}", flush=True)


def _write_requeue(run: RunDir, job: Job, number: int, job_id: str, way: str, fields: dict[str, Any], slurm: Slurm) -> None:
    """The `requeue` line, and the nodes that the next attempt stays away from."""
    events = event_log.read(run.ledger)
    bad = avoided(events, job.avoid_node_h, time.time())
    # Slurm keeps a list of nodes over requeues: it is ours to take back when their time is over.
    earlier = any(event["event"] == Event.REQUEUE and event.get("successor", event["job_id"]) == job_id and event.get("avoids") for event in events)
    if bad:
        fields["avoids"] = bad
    # What follows may be cut short: Slurm ends this script when its job is requeued. TERM is ignored here, KILL is not.
    event_log.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=way, **fields)
    print(f"holdfast: {way}", flush=True)
    if bad or earlier:
        try:
            waiting = fields.get("successor", job_id)
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
