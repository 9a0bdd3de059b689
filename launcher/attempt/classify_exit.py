"""Why an attempt ended: a pure function of what was left behind.

The order of trust: what the ranks and the watchdog wrote themselves, what Slurm's daemons wrote into the batch log, what
slurmctld and the accounting say, the exit code of the step. A cause is only named when something points to it; otherwise it
is `unknown`. docs/explanation/preemption.md has the table of what Slurm sends, docs/evidence/survival.md what was recorded for every fault.
"""

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.core.contract import LEAD_SIGNAL, PRUNED_WORD, Cause, Exit
from jobs.rank.stop_flag import OWN_WISH, STOP_FILE
from jobs.run.retry_policy import BY_OWN_WISH
from slurm.client import JobInfo
from slurm.daemon_log import cancel_reasons
from slurm.states import ENDED, base

_DAEMON_REASON = {
    "PREEMPTION": Cause.PREEMPTED,
    "JOB REQUEUE": Cause.REQUEUED,
    "TIME LIMIT": Cause.TIME_LIMIT,
    "NODE FAILURE": Cause.NODE_FAILURE,
}
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (\S+)")
_SRUN_ERROR = re.compile(r"^srun: error: (.+)$", re.M)
# srun's last error where no task was started (src/srun/libsrun/launch.c and allocate.c, 22.05 to 26.05), as in the first seconds of a new slurmctld.
_NOT_STARTED = re.compile(r"Unable to (?:create step|confirm allocation) for job")
# What a rank says when it is another rank that is gone.
_PEER_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket Timeout|NCCL.*remote|connectFullMesh|Timed out waiting|recvValue failed"
    r"|failed to recv|DistNetworkError|DistStoreError|ncclRemoteError|ncclSystemError|Connection refused",
    re.I,
)
_OUT_OF_MEMORY = re.compile(r"out[ _]of[ _]memory|OutOfMemoryError|cannot allocate memory|std::bad_alloc", re.I)
# slurmstepd and srun, of several versions: by cgroup, and by accounting (OverMemoryKill).
_MEMORY_KILL = re.compile(r"oom[-_]kill|OOM Killed|out[ -]of[ -]memory|exceeded (?:job )?memory limit", re.I)
_HARDWARE = re.compile(r"uncorrectable|fallen off the bus|cudaErrorECC|CUDA_ERROR_ECC|hardware (?:error|stack)|NvlinkUncorrectable", re.I)
_STORAGE_ERRNO = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE}
# Slurm may send the warning up to 60 s earlier than asked; the rest is for the way to the end of the attempt.
_EARLY_S = 75
_TERM_AT_LIMIT_S = 15


@dataclass(frozen=True)
class Evidence:
    """What is known when the step is over.

    log: the part of the batch log that this attempt wrote. rank_logs: last lines of ranks that left no marker.
    accounting: states of sacct's rows for this attempt, the job's first and then those of its steps.
    hang: what the watchdog wrote before it ended the step. lost_nodes: nodes that slurmctld no longer reaches.
    brought_back: Slurm started the job again, and nobody of this attempt had lived to write its end.
    put_back: Slurm has put the job back into the queue by itself, while this attempt still came to its end.
    gone: the job is over by now, and this is another one.
    unanswered: slurmctld did not answer, or knows no such job.
    stop_file: what the stop file says; "" when it is empty or absent.
    own_script: the ranks run a user script (`entry`), whose exit code is all that it says.
    stop_sent: name of a stop signal that reached the ranks of a user script, other than Slurm's own TERM; "" for none.
    limit_near: the attempt of a user script was ended because the time limit was about to be reached.
    failed_rank: (rank or task, exit code) of the first failure, after which the other ranks were killed."""

    code: int
    signals: Sequence[str] = ()
    markers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    world: int = 1
    log: str = ""
    rank_logs: str = ""
    job: JobInfo | None = None
    seconds_to_limit: float | None = None
    lead_s: int = 0
    cancel_wished: bool = False
    accounting: Sequence[str] = ()
    hang: Mapping[str, Any] | None = None
    lost_nodes: Sequence[str] = ()
    brought_back: bool = False
    put_back: bool = False
    gone: bool = False
    unanswered: bool = False
    stop_file: str = ""
    own_script: bool = False
    stop_sent: str = ""
    limit_near: bool = False
    failed_rank: tuple[int, int] | None = None


def classify(seen: Evidence) -> tuple[Cause, str]:
    """The cause, and the evidence for it in words."""
    reasons = {marker.get("reason") for marker in seen.markers.values()}
    if seen.code == 0 and reasons == {"finished"} and set(seen.markers) == set(range(seen.world)):
        return Cause.FINISHED, "every rank finished"
    if seen.markers.get(0, {}).get("reason") == "finished":
        # Rank 0 says so behind the last save and a barrier of all ranks: whoever was then too slow to leave (a machine under load,
        # srun's patience with the last one) had nothing left to do.
        late = sorted(rank for rank in range(seen.world) if seen.markers.get(rank, {}).get("reason") != "finished")
        return Cause.FINISHED, "rank 0 finished after the last save" + (
            f"; rank {_numbers(late)} did not leave by itself" if late else f"; the step ended with {seen.code}"
        )
    if seen.own_script and seen.code == 0 and reasons <= {"finished"} and not _stop_seen(seen):
        return Cause.FINISHED, "every process of your script ended with 0"
    if seen.hang:
        return Cause.HANG, str(seen.hang.get("evidence", "no step was finished for too long"))
    if seen.cancel_wished:
        return Cause.CANCELLED, "holdfast cancel"
    stopped = [marker for marker in seen.markers.values() if marker.get("reason") == "stopped"]
    if stopped:
        return _stopped(seen, str(stopped[0].get("signal")))
    if seen.limit_near and not cancel_reasons(seen.log) and not (seen.job and seen.job.preempted_at):
        return Cause.TIME_LIMIT, "the time limit was about to be reached and the script was still running"
    # Exit 0 after a stop says nothing about the end of the training: one attempt too many costs less than a lost run.
    if seen.own_script and (seen.code in (Exit.DONE, Exit.REQUEUE) or (seen.stop_sent and seen.code > 128)):
        # Which signal it heard is not known: USR2 comes to the ranks alone, TERM before a kill to the batch script as well.
        near = seen.seconds_to_limit is not None and seen.seconds_to_limit <= seen.lead_s + _EARLY_S
        # In a grace time slurmstepd's line is the only sign; where Slurm does not answer there may have been any.
        asked = seen.signals or seen.unanswered or cancel_reasons(seen.log)
        return _stopped(seen, seen.stop_sent or ("USR2" if near and "TERM" not in seen.signals else "TERM" if asked else ""))
    # Before the ranks' errors: when a node is lost, the others fail in many ways, and all of them are its echo.
    daemon = _daemon_cause(seen) or _accounting_cause(seen)
    if daemon:
        return daemon
    errors = [marker for marker in seen.markers.values() if marker.get("reason") == "error"]
    own = [marker for marker in errors if not _PEER_LOST.search(f"{marker.get('kind')}: {marker.get('message', '')}")]
    missing = sorted(set(range(seen.world)) - set(seen.markers))
    if _MEMORY_KILL.search(seen.log) or (missing and _MEMORY_KILL.search(seen.rank_logs)):
        return Cause.OUT_OF_MEMORY, "Slurm's log speaks of an out-of-memory kill" + (f" of rank {_numbers(missing)}" if missing else "")
    if own:
        return _error(min(own, key=lambda marker: _number(marker.get("time"))))
    if seen.lost_nodes and missing:
        return Cause.NODE_FAILURE, f"slurmctld no longer reaches {', '.join(seen.lost_nodes)}, rank {_numbers(missing)} left no marker"
    if seen.brought_back and missing:
        return Cause.NODE_FAILURE, "Slurm started the job again, and its node had no time for a word"
    # Killed by something that was announced to the whole job, before the ranks could write how they left.
    if "TERM" in seen.signals or (seen.job and base(seen.job.state) in ("PREEMPTED", "CANCELLED", "TIMEOUT")):
        return _stopped(seen, "TERM")
    if seen.code == 128 + LEAD_SIGNAL and not seen.markers and not seen.own_script:
        # On a node under load Python may need longer to come to life than the time limit leaves: then the warning itself kills.
        cause, evidence = _stopped(seen, "USR2")
        return cause, f"{evidence}, before any rank could listen"
    if seen.own_script and seen.failed_rank:
        rank, code = seen.failed_rank
        if 0 < code <= 128:
            return Cause.CODE_ERROR, f"srun task {rank} of your script ended with {code}; tasks still running after PEER_EXIT_WAIT_S were killed"
    if seen.own_script and 0 < seen.code <= 128 and not _NOT_STARTED.match((_SRUN_ERROR.findall(seen.log) or [""])[-1]):
        return Cause.CODE_ERROR, f"your script ended with {seen.code}"
    if seen.put_back and missing:
        return Cause.NODE_FAILURE, f"Slurm had taken the job back by itself, and rank {_numbers(missing)} left no marker"
    if seen.unanswered and missing and (errors or seen.code > 128):
        # A process that was killed looks like this, and so does a node that Slurm has given up while it cannot be asked.
        return Cause.UNKNOWN, f"exit code {seen.code}, rank {_numbers(missing)} left no marker, and Slurm did not say what became of the job"
    if missing and errors:
        return Cause.KILLED, f"rank {_numbers(missing)} is gone without a word, the others lost the connection to it"
    if seen.code > 128:
        return Cause.KILLED, f"the step ended by signal {seen.code - 128}" + (f", rank {_numbers(missing)} left no marker" if missing else "")
    if seen.code == Exit.IMPOSSIBLE:
        return Cause.CODE_ERROR, "a rank says that this job can never run here"
    if seen.gone and cancel_reasons(seen.log):
        return Cause.CANCELLED, "slurmstepd: cancelled, and Slurm did not start it again"
    # A step that could not be made, for example: srun's own words, where it had any.
    said = _SRUN_ERROR.search(seen.log)
    words = f"; srun: {said[1][:160]}" if said else ""
    if missing:
        return Cause.UNKNOWN, f"exit code {seen.code}, rank {_numbers(missing)} left no marker{words}"
    return Cause.UNKNOWN, f"exit code {seen.code}{words}"


def _stop_seen(seen: Evidence) -> bool:
    """Whether there is a sign that a user script was asked to stop. USR2 to the batch script alone is none: it does not reach the ranks."""
    return bool(seen.stop_sent or "TERM" in seen.signals or "INT" in seen.signals or cancel_reasons(seen.log))


def _stopped(seen: Evidence, signal: str) -> tuple[Cause, str]:
    """The ranks were asked to stop: by whom? `signal` is empty where no sign of a stop was seen."""
    if seen.stop_file.startswith(PRUNED_WORD):
        # Whoever was faster: another attempt would stop at its first step.
        return Cause.PRUNED, seen.stop_file
    if signal == STOP_FILE:
        return Cause.CANCELLED, "a stop file in the run directory" + (f": {seen.stop_file}" if seen.stop_file else "")
    known = _state_cause(seen) or _daemon_cause(seen)
    if known:
        return known
    if signal == OWN_WISH:
        return Cause.REQUEUED, BY_OWN_WISH
    if seen.job is not None and seen.job.preempted_at:
        return Cause.PREEMPTED, f"slurmctld: preempted at {seen.job.preempted_at}"
    if seen.seconds_to_limit is not None and seen.seconds_to_limit <= (seen.lead_s + _EARLY_S if signal in ("USR2", seen.stop_sent) else _TERM_AT_LIMIT_S):
        return Cause.TIME_LIMIT, f"SIG{signal} {max(seen.seconds_to_limit, 0):.0f} s before the time limit"
    accounted = _accounting_cause(seen)
    if accounted:
        return accounted
    if seen.job is not None and is_ended_for_good(seen.job) and not seen.put_back:
        return Cause.CANCELLED, "slurmctld ended the job and does not mean to start it again"
    if seen.gone and cancel_reasons(seen.log):
        return Cause.CANCELLED, "slurmstepd: cancelled, and Slurm did not start it again"
    if signal == "USR2":
        return Cause.PREEMPTED, "SIGUSR2 long before the time limit"
    if seen.put_back or (seen.job is not None and "PENDING" in (base(seen.job.state), seen.job.ended_as)):
        return Cause.REQUEUED, "slurmctld has put the job back into the queue"
    if not signal:
        return Cause.REQUEUED, f"{BY_OWN_WISH}: it left with {Exit.REQUEUE.value}, and no stop was seen"
    return Cause.REQUEUED, f"SIG{signal}, sent by a person or a tool"


def _state_cause(seen: Evidence) -> tuple[Cause, str] | None:
    """What the job's state says, where it names a reason."""
    if seen.job is None:
        return None
    state = seen.job.ended_as or seen.job.state
    named = ENDED.get(base(state))
    return (named, f"slurmctld: {state}") if named in (Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_FAILURE, Cause.CANCELLED) else None


def is_ended_for_good(job: JobInfo) -> bool:
    """Whether slurmctld is ending a job that it will not start again. Where the state says only COMPLETING, a job that was not
    restarted and has an end is one."""
    state = job.ended_as or base(job.state)
    return state == "CANCELLED" or (state == "COMPLETING" and job.end_time not in ("Unknown", ""))


def _daemon_cause(seen: Evidence) -> tuple[Cause, str] | None:
    for reason in cancel_reasons(seen.log):
        if reason in _DAEMON_REASON:
            return _DAEMON_REASON[reason], f"slurmstepd: cancelled due to {reason.lower()}"
    lost = _NODE_FAILURE.search(seen.log)
    if lost:
        return Cause.NODE_FAILURE, f"srun: node failure on {lost[1]}"
    return None


def _accounting_cause(seen: Evidence) -> tuple[Cause, str] | None:
    """What sacct is sure about. FAILED and COMPLETED say nothing about why; CANCELLED of a step is how every kill looks."""
    if any(base(state) == "OUT_OF_MEMORY" for state in seen.accounting):
        return Cause.OUT_OF_MEMORY, "sacct: OUT_OF_MEMORY"
    for state in seen.accounting[:1]:
        cause = ENDED.get(base(state))
        if cause in (Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_FAILURE, Cause.CANCELLED):
            return cause, f"sacct: {state}"
    return None


def _error(marker: Mapping[str, Any]) -> tuple[Cause, str]:
    message = str(marker.get("message", "")).strip()
    said = f"rank {marker.get('rank')}: {marker.get('kind')}: {message.splitlines()[0][:200] if message else 'no message'}"
    if _HARDWARE.search(message):
        return Cause.NODE_FAILURE, said
    if marker.get("kind") in ("OutOfMemoryError", "MemoryError") or _OUT_OF_MEMORY.search(message):
        return Cause.OUT_OF_MEMORY, said
    if marker.get("errno") in _STORAGE_ERRNO or marker.get("kind") == "CheckpointError":
        return Cause.STORAGE, said
    if marker.get("kind") == "DataWorkerError":
        return Cause.KILLED, said
    return Cause.CODE_ERROR, said


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
