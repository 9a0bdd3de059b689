"""Why an attempt ended: a pure function of what was left behind.

The order of trust: what the ranks themselves wrote, what Slurm's daemons wrote into the batch log, what slurmctld says
now, the exit code of the step. A cause is only named when something points to it; otherwise it is `unknown`.
"""

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.contract import Cause, Exit
from slurm.client import JobInfo
from slurm.states import ENDED, base

# slurmstepd's line in the batch log; the reason behind it is missing for scancel and at the start of a grace time.
_DAEMON_LINE = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")
_DAEMON_REASON = {
    "PREEMPTION": Cause.PREEMPTED,
    "JOB REQUEUE": Cause.REQUEUED,
    "TIME LIMIT": Cause.TIME_LIMIT,
    "NODE FAILURE": Cause.NODE_FAILURE,
}
# What a rank says when it is another rank that is gone.
_PEER_LOST = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket Timeout|NCCL.*remote|connectFullMesh|Timed out waiting|recvValue failed|failed to recv|DistNetworkError|ncclRemoteError|ncclSystemError", re.I)
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|cannot allocate memory|std::bad_alloc", re.I)
_STORAGE_ERRNO = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE}


@dataclass(frozen=True)
class Evidence:
    """What is known when the step is over. `log` is the part of the batch log that this attempt wrote."""

    code: int
    signals: Sequence[str] = ()
    markers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    world: int = 1
    log: str = ""
    job: JobInfo | None = None
    seconds_to_limit: float | None = None
    lead_s: int = 0
    cancel_wished: bool = False
    accounting: Sequence[str] = ()


def classify(seen: Evidence) -> tuple[Cause, str]:
    """The cause, and the evidence for it in words."""
    reasons = {marker.get("reason") for marker in seen.markers.values()}
    if seen.code == 0 and reasons == {"finished"} and len(seen.markers) == seen.world:
        return Cause.FINISHED, "every rank finished"
    if seen.cancel_wished:
        return Cause.CANCELLED, "holdfast cancel"
    stopped = [marker for marker in seen.markers.values() if marker.get("reason") == "stopped"]
    if stopped:
        return _stopped(seen, str(stopped[0].get("signal")))
    errors = [marker for marker in seen.markers.values() if marker.get("reason") == "error"]
    own = [marker for marker in errors if not _PEER_LOST.search(str(marker.get("message", "")))]
    if own:
        first = min(own, key=lambda marker: float(marker.get("time", 0)))
        return _error(first)
    daemon = _daemon_cause(seen)
    if daemon:
        return daemon
    if _OUT_OF_MEMORY.search(seen.log) or "oom-kill" in seen.log.lower() or "OUT_OF_MEMORY" in seen.accounting:
        return Cause.OUT_OF_MEMORY, "Slurm's log speaks of an out-of-memory kill"
    missing = sorted(set(range(seen.world)) - set(seen.markers))
    # Killed by something that was announced to the whole job, before the ranks could write how they left.
    if "TERM" in seen.signals or (seen.job and base(seen.job.state) in ("PREEMPTED", "CANCELLED", "TIMEOUT")):
        return _stopped(seen, "TERM")
    if missing and errors:
        return Cause.KILLED, f"rank {_numbers(missing)} is gone without a word, the others lost the connection to it"
    if seen.code > 128:
        return Cause.KILLED, f"the step ended by signal {seen.code - 128}" + (f", rank {_numbers(missing)} left no marker" if missing else "")
    if seen.code == Exit.IMPOSSIBLE:
        return Cause.CODE_ERROR, "a rank says that this job can never run here"
    if missing:
        return Cause.UNKNOWN, f"exit code {seen.code}, rank {_numbers(missing)} left no marker"
    return Cause.UNKNOWN, f"exit code {seen.code}"


def _stopped(seen: Evidence, signal: str) -> tuple[Cause, str]:
    """The ranks were asked to stop: by whom?"""
    if signal == "stop file":
        return Cause.CANCELLED, "a stop file in the run directory"
    daemon = _daemon_cause(seen)
    if daemon:
        return daemon
    if seen.job is not None:
        if seen.job.preempted_at:
            return Cause.PREEMPTED, f"slurmctld: preempted at {seen.job.preempted_at}"
        named = ENDED.get(base(seen.job.state))
        if named in (Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_FAILURE, Cause.CANCELLED):
            return named, f"slurmctld: {seen.job.state}"
    # Slurm may send the warning up to 60 s earlier than asked; a few seconds for the way here.
    if seen.seconds_to_limit is not None and seen.seconds_to_limit <= (seen.lead_s + 75 if signal == "USR2" else 15):
        return Cause.TIME_LIMIT, f"SIG{signal} {max(seen.seconds_to_limit, 0):.0f} s before the time limit"
    if seen.job is not None and base(seen.job.state) == "COMPLETING" and _DAEMON_LINE.search(seen.log) and seen.job.end_time not in ("Unknown", ""):
        return Cause.CANCELLED, "slurmctld ended the job and does not mean to start it again"
    if signal == "USR2":
        return Cause.PREEMPTED, "SIGUSR2 long before the time limit"
    if seen.job is not None and base(seen.job.state) in ("PENDING", "REQUEUED"):
        return Cause.REQUEUED, "slurmctld has put the job back into the queue"
    return Cause.REQUEUED, f"SIG{signal}, sent by a person or a tool"


def _daemon_cause(seen: Evidence) -> tuple[Cause, str] | None:
    found = [reason.strip() for reason in _DAEMON_LINE.findall(seen.log) if reason]
    for reason in found:
        if reason in _DAEMON_REASON:
            return _DAEMON_REASON[reason], f"slurmstepd: cancelled due to {reason.lower()}"
    return None


def _error(marker: Mapping[str, Any]) -> tuple[Cause, str]:
    message = str(marker.get("message", "")).strip()
    said = f"rank {marker.get('rank')}: {marker.get('kind')}: {message.splitlines()[0][:200] if message else 'no message'}"
    if marker.get("kind") in ("OutOfMemoryError", "MemoryError") or _OUT_OF_MEMORY.search(message):
        return Cause.OUT_OF_MEMORY, said
    if marker.get("errno") in _STORAGE_ERRNO or marker.get("kind") == "CheckpointError":
        return Cause.STORAGE, said
    return Cause.CODE_ERROR, said


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
