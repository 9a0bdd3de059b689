"""Whether Slurm has a job of a run already, found by what the job itself says: its name, its comment, its log.

The ledger may not know of it: an sbatch whose answer was lost, a launcher that was killed between sbatch and the ledger, the
script submitted by hand, a successor that a node submitted for itself.
"""

import os
import time
from collections.abc import Iterable

from jobs.core.contract import Event
from jobs.core.errors import SubmissionUnknownError, SubmitError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from slurm.client import Slurm
from slurm.states import is_live

# A job that is just ending may come back or not; it is waited for that long.
_ENDING_S = 40.0
_POLL_S = 1.0


def job_of(run: RunDir, slurm: Slurm) -> str | None:
    """The id of a job of this run that waits or runs; None when there is none. Raises SubmitError when Slurm does not say."""
    whole = RunDir(run.path.parent.parent) if run.is_member else run
    limit = time.monotonic() + _ENDING_S
    while True:
        found = slurm.named(whole.path.name, f"holdfast:{whole.path.name}", whole.path)
        if run.is_member:
            found = [(job_id, state) for job_id, state in found if job_id.endswith(f"_{run.path.name}")]
        lasting = [job_id for job_id, state in found if state != "COMPLETING"]
        if lasting or not found or time.monotonic() > limit:
            return lasting[0] if lasting else None
        time.sleep(_POLL_S)


def taken_over(run: RunDir, slurm: Slurm) -> str | None:
    """The same, and the job is written into the ledger if that does not know it: it is the run's job from now on."""
    job_id = job_of(run, slurm)
    if job_id is not None and not any(event["job_id"] == job_id or event.get("successor") == job_id for event in event_log.read(run.ledger)):
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="found in the queue")
    return job_id


def lost_answer(run: RunDir, slurm: Slurm, err: SubmitError) -> str | None:
    """After a submission that failed: the job that Slurm made all the same, where only the answer was lost.

    Raises SubmissionUnknownError when Slurm cannot say whether it did."""
    unknown = slurm.unsure(err) or isinstance(err, SubmissionUnknownError)
    try:
        return slurm.patiently(lambda: job_of(run, slurm), _ENDING_S if unknown else 0.0)
    except SubmitError as asked:
        if not unknown:
            return None  # sbatch itself refused
        raise SubmissionUnknownError(
            f"{err}\nWhether Slurm made a job is not known ({asked}). The run directory {run.path} is kept: holdfast resume {run.id} takes the job over, or submits it again"
        ) from asked


def require_jobs_of(run: RunDir, job_ids: Iterable[str], slurm: Slurm) -> None:
    """Raises SubmitError unless every live job with one of these ids is a job of this run (or of its array).

    A number alone proves nothing: another cluster, a counter that was reset or a ledger that somebody else wrote has the same one."""
    whole = RunDir(run.path.parent.parent) if run.is_member else run
    name = whole.path.name
    known = {job_id.partition("_")[0] for job_id, _ in slurm.named(name, f"holdfast:{name}", whole.path)}
    for number in sorted({job_id.partition("_")[0] for job_id in job_ids} - known):
        info = slurm.job(number)
        # A job that was submitted by plain sbatch has its own name; its run carries the number, and is ours.
        if info is None or not is_live(info.state) or (name.endswith(f"-j{number}") and whole.path.stat().st_uid == os.geteuid()):
            continue
        raise SubmitError(
            f"job {number} is not a job of {'array' if whole.has_members else 'run'} {whole.id}: Slurm has it as {info.name!r} with comment {info.comment!r}, expected {name!r} and"
            f" 'holdfast:{name}', with its log below {whole.path}. Nothing was signalled. Is this the cluster that the run was submitted to? scontrol show job {number} shows the other job"
        )
