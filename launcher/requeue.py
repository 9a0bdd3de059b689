"""Back into the queue at the end of an attempt."""

import signal
import time
from contextlib import suppress
from typing import Any

from jobs import ledger
from jobs.contract import Event
from jobs.errors import SubmitError
from jobs.rundir import RunDir
from jobs.settings import Job
from launcher.nodes import avoided
from slurm.client import Slurm, expand_nodelist


def send_back(run: RunDir, job: Job, number: int, job_id: str, restarts: int, slurm: Slurm) -> None:
    """Back into the queue: by `scontrol requeue`, else by a job of its own that waits for the end of this one."""
    fields: dict[str, Any] = {}
    with suppress(ValueError):  # not the main thread: then nobody signals us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        way = slurm.requeue(job_id, restarts)
    except SubmitError as refused:
        try:
            successor, new = slurm.successor(run.script, job_id, run.script.parent.name, run.path.name if run.is_member else None)
            way = f"job {successor} {'was submitted to go' if new else 'is queued already and goes'} on when this one is over; requeue was not possible: {refused}"
            fields["successor"] = successor
        except SubmitError as err:
            way = f"could not be requeued: {refused}; and no successor could be submitted: {err}"
    events = ledger.read(run.ledger)
    bad = avoided(events, job.avoid_node_h, time.time())
    # Slurm keeps a list of nodes over requeues: it is ours to take back when their time is over.
    earlier = any(event["event"] == Event.REQUEUE and event.get("successor", event["job_id"]) == job_id and event.get("avoids") for event in events)
    if bad:
        fields["avoids"] = bad
    # What follows may be cut short: Slurm ends this script when its job is requeued. TERM is ignored here, KILL is not.
    ledger.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=way, **fields)
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
