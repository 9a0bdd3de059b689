"""Submitting through submitit: the one module that imports it.

submitit queues, names and watches the job; the text it submits is ours. What Slurm runs is therefore the script in the run
directory and nothing else, so that `sbatch` of the same file by hand leads to the same training.
"""

import contextlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.contract import Event
from jobs.core.errors import SettingError, SubmissionUnknownError, SubmitError
from jobs.run import event_log, permissions
from jobs.run.rundir import RunDir
from launcher.submission.create_run import in_parallel
from launcher.submission.reconcile import lost_answer, taken_over
from slurm.client import Slurm, explain
from slurm.environment import clean_environment
from slurm.job_number import job_number

# What submitit replaces in the name of its folder (`submitit.core.utils.JobPaths`).
_TAGS = ("%j", "%t", "%A", "%a")


class ScriptExecutor(submitit.SlurmExecutor):
    """A Slurm executor whose submission text is the run's own script, for single jobs and for arrays."""

    def __init__(self, run: RunDir, job: Job):
        super().__init__(folder=run.submitit)
        self._script = safe_read.read_text(permissions.script_to_submit(run))
        # submitit counts the tasks of a job from these; the script says the same to Slurm.
        self.update_parameters(nodes=job.nodes, ntasks_per_node=job.gpus_per_node, time=job.time_limit)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        # The base class takes the first number behind "job", which may be a site's banner, and knows no bare number.
        return job_number(string.decode(errors="replace") if isinstance(string, bytes) else string)

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[submitit.Job[Any]]:
        # The base class builds arrays with its own class and would lose our text; the script already says --array.
        first: submitit.Job[Any] = self._submit_command(self._submitit_command_str)
        if len(delayed_submissions) == 1:
            return [first]
        # One object for each run and none for each of its ranks: the ledger tells how they ended, and a thousand runs are many.
        return [submitit.SlurmJob(folder=self.folder, job_id=f"{first.job_id}_{index}", tasks=[0]) for index in range(len(delayed_submissions))]


def train_run(run_dir: str) -> int:
    """What submitit is told that it runs; on Slurm the script does it, locally submitit calls this."""
    from launcher.local.executor import run_attempts

    return int(run_attempts(RunDir(Path(run_dir)), os.environ))


def to_slurm(run: RunDir, job: Job, environ: Mapping[str, str], members: int = 0) -> str:
    """Submits a run (or the array in its directory). Returns Slurm's job id. Raises SubmitError with sbatch's own words."""
    _refuse_tags(run)
    permissions.check_run(run, "its job", trees=False)
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise SubmitError("sbatch and srun are not on this machine; is this a login node of the cluster? `holdfast submit --local` needs no Slurm")
    if job.run_id is not None and not members:
        # The person may be saying it for the second time, because the first answer was lost.
        queued = taken_over(run, Slurm(environ))
        if queued is not None:
            return queued
    run.submitit.mkdir(exist_ok=True)
    # submitit prints what sbatch said before it raises; it is said once, in our message.
    with _environment(clean_environment(environ)), contextlib.redirect_stderr(io.StringIO()):
        executor = ScriptExecutor(run, job)
        try:
            jobs = (
                executor.submit_array([_Call(str(run.member(i).path)) for i in range(members)]) if members > 1 else [executor.submit(train_run, str(run.path))]
            )
            job_id = jobs[0].job_id.partition("_")[0]
        except SubmissionUnknownError as err:
            made = lost_answer(run.member(0) if members else run, Slurm(environ), err)
            if made is None:
                raise
            job_id = made.partition("_")[0]
        except (FailedJobError, FailedSubmissionError) as err:
            refused = SubmitError(explain("sbatch", _words_of(err)))
            made = lost_answer(run.member(0) if members else run, Slurm(environ), refused)
            if made is None:
                raise refused from err
            job_id = made.partition("_")[0]
    if members:
        in_parallel(lambda index: event_log.append(run.member(index).ledger, Event.SUBMITTED, attempt=0, job_id=f"{job_id}_{index}", by="submitit"), members)
    else:
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="submitit")
    return job_id


def to_local(run: RunDir, job: Job) -> "submitit.Job[int]":
    """Starts a run on this machine by submitit's local executor, in the background."""
    _refuse_tags(run)
    # submitit's own process loads the pickle that is written here.
    permissions.check_run(run, "holdfast submit --local")
    executor = submitit.LocalExecutor(folder=run.submitit, python=sys.executable)
    # The time limit is that of the job; a local run has no queue behind it, so the warning is one minute at most.
    executor.update_parameters(
        timeout_min=job.time_limit, tasks_per_node=1, signal_delay_s=min(job.stop_lead_s, 60), gpus_per_node=0 if job.device == "cpu" else job.gpus_per_node
    )
    run.submitit.mkdir(exist_ok=True)
    # `python -m` of submitit looks for modules in its working directory first: the frozen code, and not whatever folder this is.
    with _detached(run.submitit / "controller.out"), contextlib.chdir(run.code):
        local: submitit.Job[int] = executor.submit(train_run, str(run.path))
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=f"local-{local.job_id}", by="submitit, local")
    return local


def resubmit(run: RunDir, job: Job, environ: Mapping[str, str]) -> str:
    """Submits the script of a run that exists once more; of an array only this task. Returns Slurm's job id."""
    if run.is_member:
        job_id = f"{job_number(Slurm(environ).run('sbatch', '--parsable', f'--array={run.path.name}', str(permissions.script_to_submit(run))))}_{run.path.name}"
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="resume")
        return job_id
    return to_slurm(run, job, environ)


def _refuse_tags(run: RunDir) -> None:
    """Raises SettingError for a folder in whose name submitit would put numbers: it finds out when sbatch has made the job."""
    found = [tag for tag in _TAGS if tag in str(run.submitit)]
    if found:
        raise SettingError(
            f"RUNS_DIR: {str(run.submitit.parent.parent)!r} has {found[0]}, which submitit takes for a number of the job; choose a folder without {', '.join(_TAGS)} in its path."
        )


@contextlib.contextmanager
def _detached(log: Path) -> Iterator[None]:
    """What is started in here keeps no hold of this process's terminal or pipes, and outlives the terminal's end.

    submitit's controller inherits both; whoever reads our output would otherwise wait until the run is over."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (0, 1, 2)]
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, number in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, number)
        os.close(null)
        os.close(out)
        yield
    finally:
        for source, number in zip(kept, (0, 1, 2), strict=True):
            os.dup2(source, number)
            os.close(source)
        signal.signal(signal.SIGHUP, hangup)


class _Call:
    """A picklable call of `train_run` for one member of an array."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def __call__(self) -> int:
        return train_run(self.run_dir)


class _environment:
    """os.environ without what an outer job left in it, for as long as sbatch is called."""

    def __init__(self, environ: Mapping[str, str]):
        self._wanted = dict(environ)

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self._wanted)

    def __exit__(self, *error: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


def _words_of(err: Exception) -> str:
    """What sbatch itself said, without submitit's frame around it."""
    text = str(err)
    said = [line.strip() for line in text.splitlines() if "sbatch:" in line or "error:" in line.lower()]
    return " ".join(line.removeprefix("sbatch: ") for line in said) or " ".join(text.split())
