"""The end of an attempt in the ledger: written by itself, or by the next one where its batch script was killed."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from jobs.config.resolver import load
from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.contract import LOCAL, Cause, Event, Exit
from jobs.run import claim, event_log, goodput
from jobs.run.rundir import RunDir
from launcher.attempt.classify_exit import Evidence, classify
from launcher.attempt.evidence import clock_record, evidence_of, nodes_of
from slurm.allocation import local_time
from slurm.client import AccountingRow, Slurm


def is_ghost(run: RunDir, number: int) -> bool:
    return claim.superseded(run, number) or any(event["event"] == Event.END and event["attempt"] == number for event in event_log.read(run.ledger))


def write_end(run: RunDir, number: int, job_id: str, cause: Cause, evidence: str, code: int | None, seconds: float) -> None:
    """The `end` line: the step reached, the newest checkpoint, what lies between them and is lost, and where the time went."""
    events = [event for event in event_log.read(run.ledger) if event.get("attempt") == number]
    started = next((event for event in events if event["event"] == Event.START), None)
    start_step = max((int(event.get("step", 0)) for event in events if event["event"] == Event.RESUMED), default=0)
    saved = max((int(event.get("step", 0)) for event in events if event["event"] == Event.CHECKPOINT), default=start_step)
    try:
        reached = safe_read.read_int(run.attempt(number).progress)
    except (OSError, ValueError):
        reached = saved
    own_script = load(run.job_yaml).entry is not None
    record = clock_record(run, number)
    # A person's own script saves where and when it likes: whether it got forward is not known.
    known = not own_script or any(event["event"] in (Event.RESUMED, Event.CHECKPOINT) for event in events)
    event_log.append(
        run.ledger,
        Event.END,
        attempt=number,
        job_id=job_id,
        cause=cause,
        evidence=evidence,
        exit_code=code,
        start_step=start_step,
        step=max(reached, saved),
        saved_step=saved if known else None,
        # Nothing is trained again after the end, saved or not.
        lost_steps=0 if cause is Cause.FINISHED else max(reached - saved, 0),
        seconds=round(seconds, 3),
        gpu_seconds=round(seconds * int(started["world"]), 1) if started else 0.0,
        parts=goodput.parts_of(record, seconds, cause, own_script=own_script, worked=reached > start_step),
        marks=record.get("marks", []) if record else [],
    )


def blame(run: RunDir, number: int, job_id: str, cause: Cause, evidence: str, seen: Evidence) -> None:
    """Writes down which node failed, so that the next attempt stays away from it. A hang may be the code's own fault: its
    node counts from the second time on (`launcher.attempt.node_exclusion.avoided`)."""
    if cause is Cause.NODE_FAILURE:
        named = [node for node in nodes_of(run, number) if node in seen.lost_nodes or f"Node failure on {node}" in seen.log]
    elif cause is Cause.HANG and seen.hang:
        named = [str(node) for node in seen.hang.get("nodes", [])]
    else:
        named = []
    # On a run of one node there is no other to tell it from; Slurm itself keeps it away while it is down.
    for node in named:
        event_log.append(run.ledger, Event.BAD_NODE, attempt=number, job_id=job_id, node=node, reason=evidence, hang=cause is Cause.HANG)


def close(run: RunDir, job: Job, open_attempt: event_log.Attempt, job_id: str, slurm: Slurm | None) -> None:
    """Writes the end of an attempt whose batch script was killed before it could."""
    number, other = open_attempt.number, open_attempt.job_id
    seen = evidence_of(run, job, number, other, slurm)
    finished = len(seen.markers) == job.world_size and all(marker.get("reason") == "finished" for marker in seen.markers.values())
    rows = rows_of(slurm.accounting(other) if slurm else [], open_attempt)
    seen = replace(
        seen,
        code=0 if finished else Exit.REQUEUE if seen.markers else 1,
        accounting=[row.state for row in rows],
        brought_back=slurm is not None and other == job_id,
        gone=slurm is not None and other != job_id and not other.startswith(LOCAL),
    )
    cause, evidence = classify(seen)
    # A local run has nobody above it: when its process is gone with the ranks, it was killed.
    if cause is Cause.UNKNOWN and other.startswith(LOCAL):
        cause, evidence = Cause.KILLED, "the process that watched over the ranks is gone"
    write_end(run, number, other, cause, f"{evidence}; the batch script could not say", None, _lived(run, open_attempt, rows))
    blame(run, number, other, cause, evidence, seen)


def rows_of(rows: Sequence[AccountingRow], attempt: event_log.Attempt) -> list[AccountingRow]:
    """Those of sacct's rows that belong to one attempt: the job's own first. The accounting lags, and what it shows may still
    be the attempt before, so a row counts only when it was running as this attempt began."""
    mine = []
    for row in rows:
        start, finish = local_time(row.start), local_time(row.end)
        if start <= attempt.started + 5 and finish > attempt.started - 5:
            mine.append(row)
    return sorted(mine, key=lambda row: "." in row.job_id)


def _lived(run: RunDir, attempt: event_log.Attempt, rows: Sequence[AccountingRow]) -> float:
    """Seconds of an attempt whose end nobody saw: to the end that the accounting knows, else to its last sign of life."""
    until_now = max(time.time() - attempt.started, 0.0)
    for row in rows:
        if "." not in row.job_id and attempt.started <= (finish := local_time(row.end)) < float("inf"):
            return min(finish - attempt.started, until_now)
    signs = [float((clock_record(run, attempt.number) or {}).get("passed", 0.0))]
    for path in (run.attempt(attempt.number).progress, run.log(attempt.job_id, "batch"), *run.attempt(attempt.number).path.glob("exit.*.json")):
        with suppress(OSError):
            signs.append(path.stat().st_mtime - attempt.started)
    return min(max(signs), until_now)
