"""The array jobs of a sweep that Slurm has, whether or not the sweep's ledger knows of them.

It does not where the answer of sbatch was lost, or where a launcher was killed between sbatch and the ledger.
"""

from collections.abc import Sequence

from jobs.core.contract import Event
from jobs.core.errors import SubmissionUnknownError, SubmitError
from jobs.run import event_log, permissions
from jobs.run.rundir import RunDir
from slurm.client import Slurm
from slurm.job_number import job_number

# For so long a controller that lost an answer is asked whether it made the job.
_PATIENCE_S = 40.0


def taken_over(run: RunDir, slurm: Slurm) -> set[str]:
    """Ids of the array jobs of a sweep that wait or run. Those that its ledger does not know are written into it: they are the
    sweep's from now on. Raises SubmitError when Slurm does not say."""
    queued = _queued(run, slurm)
    for job_id in sorted(queued - {str(event["job_id"]) for event in event_log.read(run.ledger)}):
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="found in the queue")
    return queued


def submit(run: RunDir, numbers: Sequence[int], parallel: int, slurm: Slurm) -> str:
    """Submits trials of a sweep once more, and returns the job's id; also that of a job that sbatch made although it reported
    a lost connection. Raises SubmitError."""
    script = permissions.script_to_submit(run, numbers)
    known, tasks = _queued(run, slurm), ranges(numbers)
    try:
        job_id = job_number(slurm.run("sbatch", "--parsable", f"--array={tasks}%{parallel}", str(script)))
    except SubmitError as err:
        made = slurm.patiently(lambda: _queued(run, slurm) - known, _PATIENCE_S) if slurm.unsure(err) or isinstance(err, SubmissionUnknownError) else set()
        if not made:
            raise
        job_id = max(made, key=int)
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="sweep --resume", tasks=tasks)
    return job_id


def ranges(numbers: Sequence[int]) -> str:
    """0-3,7 for 0, 1, 2, 3 and 7: what --array takes."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[1]}" for part in parts)


def _queued(run: RunDir, slurm: Slurm) -> set[str]:
    return {job_id.partition("_")[0] for job_id, _ in slurm.named(run.path.name, f"holdfast:{run.path.name}", run.path)}
