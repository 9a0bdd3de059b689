"""Whose run it is: a job takes the number of the next attempt, or gives way to the one that holds the run."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.config.settings import Job
from jobs.core.contract import LOCAL, Event
from jobs.core.errors import HoldfastError, RunOwnedError, SubmitError
from jobs.run import claim, event_log
from jobs.run.retry_policy import budgets_of, judge
from jobs.run.rundir import RunDir
from launcher.attempt.finalize import close
from slurm.client import Slurm

# Seconds to wait for a controller that is just being restarted, before a job gives way.
_OWNER_PATIENCE_S = 60.0
# Two jobs that begin at once see each other within this many tries.
_CLAIMS = 20


def own(run: RunDir, job: Job, job_id: str, restarts: int, slurm: Slurm | None) -> int:
    """The number of an attempt that is now ours; the ledger has no open attempt in it any more.

    Raises RunOwnedError when another job holds the run, HoldfastError when the run is over."""
    owner = {"job_id": job_id, "restarts": restarts, "host": socket.gethostname(), "pid": os.getpid() if slurm is None else 0}
    if slurm is None:
        owner["stamp"] = claim.process_stamp(os.getpid())
    for _ in range(_CLAIMS):
        events = event_log.read(run.ledger)
        for open_attempt in [attempt for attempt in event_log.attempts(events) if attempt.cause is None]:
            _give_way(run, open_attempt.number, open_attempt.job_id, job_id, events, slurm)
            close(run, job, open_attempt, job_id, slurm)
        events = event_log.read(run.ledger)
        known = event_log.attempts(events)
        verdict = judge(events, budgets_of(job))
        if not verdict.again:
            # Slurm may bring a job back that is over, and a successor may find that its job came back by itself. Any other
            # job is a person's own wish, and begins with new budgets.
            begun = [attempt.job_id for attempt in known] or [event["job_id"] for event in events if event["event"] == Event.SUBMITTED]
            if begun[-1:] == [job_id] or any(event["event"] == Event.REQUEUE and event.get("successor") == job_id for event in events):
                raise HoldfastError(f"run {run.id} is over: {verdict.reason}. `holdfast resume {run.id}` starts it again on purpose.")
            event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="sbatch" if slurm else "run")
        number = max(known[-1].number if known else 0, claim.newest(run)) + 1
        claimed = claim.newest(run)
        if claimed > (known[-1].number if known else 0):
            # Somebody has the number and has not written the start yet, or died before.
            _give_way(run, claimed, str(claim.owner_of(run, claimed).get("job_id", "")), job_id, events, slurm)
        if claim.claim(run, number, owner):
            return number
        time.sleep(0.05)
    raise RunOwnedError(f"other jobs keep beginning attempts of run {run.id}; this job leaves it alone.")


def _give_way(run: RunDir, number: int, other: str, job_id: str, events: Sequence[Mapping[str, Any]], slurm: Slurm | None) -> None:
    """Raises RunOwnedError when the job that holds attempt `number` lives; when that cannot be found out, too."""
    if not other or (other == job_id and not other.startswith(LOCAL)):
        return
    # A successor starts when the job before it is over: Slurm itself saw to that.
    if any(event["event"] == Event.REQUEUE and event.get("successor") == job_id and event["job_id"] == other for event in events):
        return
    said = f"job {other} is training run {run.id} (attempt {number}); this job leaves it alone."
    if other.startswith(LOCAL):
        owner = claim.owner_of(run, number)
        host, stamp = owner.get("host"), owner.get("stamp")
        if host == socket.gethostname():
            if stamp and claim.process_stamp(int(owner.get("pid", 0))) == stamp and int(owner["pid"]) != os.getpid():
                raise RunOwnedError(said)
        elif host:
            raise RunOwnedError(f"run {run.id} was {claim.elsewhere(run, number, host)}")
        return
    if slurm is None:
        if not Slurm.available():
            return
        slurm = Slurm()
    try:
        if slurm.patiently(lambda: slurm.is_live(other), _OWNER_PATIENCE_S):
            raise RunOwnedError(said)
    except SubmitError as err:
        raise RunOwnedError(f"attempt {number} of run {run.id} belongs to job {other}, and Slurm does not say whether it lives: {err}") from err
