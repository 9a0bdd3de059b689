"""What a run is doing, and as which job: read from its ledger and one answer of squeue."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.config.settings import Job
from jobs.core.contract import LOCAL, Cause, Event
from jobs.run import claim, event_log
from jobs.run.retry_policy import budgets_of, judge
from jobs.run.rundir import RunDir
from slurm.job_queue import Queue
from slurm.pending_reasons import in_words
from slurm.states import WAITING, base


def newest_job(events: list[dict[str, Any]]) -> str:
    """The job that the ledger has last: submitted, begun, or submitted by the one before as its successor. Empty before the first."""
    job_id, number, begun = "", 0, set()
    for event in events:
        event_job = str(event["job_id"])
        if event["event"] == Event.START:
            number = max(number, event["attempt"])
            begun.add(event_job)
            # A local submission trains in a child of the process that the person was told of.
            job_id = job_id if event_job.startswith(LOCAL) and job_id.startswith(LOCAL) else event_job
        elif event["event"] == Event.SUBMITTED and event_job not in begun:  # a quick job begins before its submission is written down
            job_id = event_job
        elif event["event"] == Event.REQUEUE and event.get("successor") and event["attempt"] >= number:
            job_id = str(event["successor"])
    return job_id


def state_of(
    run: RunDir, job: Job, events: list[dict[str, object]], attempts: list[event_log.Attempt], job_id: str, queue: dict[str, tuple[str, str, str]] | None
) -> tuple[str, str]:
    """One of the states of `run_status.FIELDS`, and a note for the user. `queue` is squeue's answer, None where Slurm could not be asked."""
    lost = sum(attempt.lost_steps for attempt in attempts)
    stops = [attempt.cause.value.replace("_", " ") for attempt in attempts[:-1] if attempt.cause]
    history = f"{len(stops)} interruption{'s' if len(stops) > 1 else ''} ({', '.join(dict.fromkeys(stops))}), {lost} steps lost" if stops else ""
    last = attempts[-1] if attempts else None
    queued = (queue or {}).get(job_id)
    ended_as = base(queue.ended.get(job_id, "")) if isinstance(queue, Queue) else ""
    # Submitted since the newest attempt, as `resume` does; where Slurm cannot be asked, it waits.
    resumed = bool(attempts and job_id) and not job_id.startswith(LOCAL) and all(attempt.job_id != job_id for attempt in attempts)
    waits = resumed and (queue is None or queued is not None)
    if last and last.cause is Cause.FINISHED and not waits:
        return "finished", history
    if last and last.cause is Cause.PRUNED and not waits:
        return "finished", last.evidence
    if queued:
        if base(queued[0]) in WAITING:
            return "waiting", "; ".join(
                filter(None, [f"{last.cause.value.replace('_', ' ')}, queued again" if last and last.cause else "", in_words(queued[1])])
            )
        return "running", history
    if waits:
        return "waiting", ""
    verdict = judge(events, budgets_of(job))
    if ended_as == "CANCELLED" and (last is None or last.cause is None or verdict.again):
        return "cancelled", f"scancel of job {job_id}; holdfast resume {run.id} goes on"
    # A missing module, a setup script that fails: the batch log has the error message.
    has_log = not attempts and bool(job_id) and run.log(job_id, "batch").exists()
    gone = (
        (
            "stopped",
            f"job {job_id} ended before its attempt began (holdfast logs {run.id}); holdfast resume {run.id}"
            if has_log
            else f"job {job_id} is gone from the queue; holdfast resume {run.id}",
        )
        if verdict.reason != "cancelled"
        else ("cancelled", f"holdfast resume {run.id} goes on")
    )
    if last and last.cause is None:
        if last.job_id.startswith(LOCAL):
            return (
                ("running", history) if _works(run, last) else ("stopped", begun_elsewhere(run, attempts) or f"its process is gone; holdfast resume {run.id}")
            )
        return ("running", history) if queue is None else gone
    if last is None:
        if queue is None and not job_id.startswith(LOCAL):
            return "waiting", ""
        return ("waiting", "") if job_id.startswith(LOCAL) else gone if job_id else ("stopped", "never submitted")
    if last.cause is Cause.CANCELLED or verdict.reason == "cancelled":
        return "cancelled", f"holdfast resume {run.id} goes on"
    if verdict.again and last.cause:
        return "stopped", f"{last.cause.value.replace('_', ' ')}{_not_requeued(job_id, queue, ended_as)}; holdfast resume {run.id}"
    return "failed", f"{last.evidence} (holdfast logs {run.id})"


def _not_requeued(job_id: str, queue: Mapping[str, object] | None, ended_as: str) -> str:
    """What Slurm answers about the job of a run that should have been requeued, for a note. The request may have been lost in a crash of
    slurmctld after it was accepted, so the ledger does not decide."""
    if queue is None or job_id.startswith(LOCAL):
        return ""
    return f", not requeued: job {job_id} ended as {ended_as}" if ended_as else f", not in the queue: job {job_id} is gone"


def _works(run: RunDir, attempt: event_log.Attempt) -> bool:
    """Whether the process behind a local attempt still works; its number alone may be another one's by now."""
    number = attempt.job_id.removeprefix(LOCAL)
    stamp = claim.owner_of(run, attempt.number).get("stamp")
    return number.isdigit() and claim.alive(int(number)) and (not stamp or claim.process_stamp(int(number)) == stamp)


def begun_elsewhere(run: RunDir, attempts: Sequence[event_log.Attempt]) -> str:
    """Of a run whose newest attempt is a local one of another machine without an end: that nobody can tell what became of it. Else empty."""
    number = claim.newest(run)
    owner = {} if any(attempt.number == number and attempt.cause for attempt in attempts) else claim.owner_of(run, number)
    host = owner.get("host")
    if not str(owner.get("job_id")).startswith(LOCAL) or host in (None, socket.gethostname()):
        return ""
    return claim.elsewhere(run, number, str(host))
