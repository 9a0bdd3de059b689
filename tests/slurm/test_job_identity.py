"""The identity of Slurm jobs on real private clusters: exported client variables, output of sbatch wrappers, reused job numbers."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Cluster, until

from jobs.core.errors import SubmissionUnknownError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from slurm.devcluster import lab
from slurm.job_number import job_number

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(lab.missing_programs()), reason="needs Slurm")]

# What users export for their own interactive squeue, sacct, sinfo, scontrol and scancel.
EXPORTED = {
    "SQUEUE_STATES": "SUSPENDED",
    "SQUEUE_PARTITION": "high",
    "SQUEUE_ACCOUNT": "other",
    "SQUEUE_QOS": "other",
    "SQUEUE_NAMES": "other",
    "SQUEUE_LICENSES": "other",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_SORT": "i",
    "SINFO_PARTITION": "other",
    "SACCT_FORMAT": "jobid",
    "SCONTROL_ALL": "0",
    "SCANCEL_STATE": "SUSPENDED",
    "SCANCEL_NAME": "other",
    "SLURM_TIME_FORMAT": "%s",
    "SLURM_CLUSTERS": "other",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, one rank, on a cluster of this module only."""
    folder = tmp_path_factory.mktemp("identity")
    here = lab.start(folder / "lab", lab.LabConfig(nodes=1))
    try:
        yield Cluster(here, folder / "runs")
    finally:
        here.stop()


def held(cluster: Cluster, **env: str) -> RunDir:
    """Submit a run that stays in the queue."""
    words = [f"{key}={value}" for key, value in {**SMALL, "NODES": "1", "GPUS_PER_NODE": "1", "SBATCH_OPTIONS": "hold="}.items()]
    return RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words, **env).stdout)["path"]))


def jobs_in(cluster: Cluster, run: RunDir) -> list[str]:
    return cluster.slurm("squeue", "-h", "-r", "-n", run.path.name, "-o", "%i").split()


def row(cluster: Cluster, run: RunDir, **env: str) -> dict[str, object]:
    return dict(json.loads(cluster.holdfast("status", "--json", run.id, **env).stdout)[0])


def submitted(run: RunDir) -> dict[str, object]:
    return [event for event in event_log.read(run.ledger) if event["event"] == "submitted"][-1]


def test_exported_client_variables_change_no_answer(small: Cluster) -> None:
    """Status, resume and cancel work with every filter and format variable exported."""
    run = held(small, **EXPORTED)
    assert row(small, run, **EXPORTED)["state"] == "waiting"
    small.holdfast("resume", run.id, check=False, **EXPORTED)
    assert len(jobs_in(small, run)) == 1
    small.holdfast("cancel", run.id, **EXPORTED)
    until(lambda: not jobs_in(small, run), 10, "the end of the job")


def wrapped(folder: Path, **programs: str) -> str:
    """PATH with scripts of these names before the real programs; REAL in a text is the real program."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/bash\n" + text.replace("REAL", str(shutil.which(name))) + "\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    "wrapper",
    [
        'echo "Welcome. This is job 3 of at most 50"; REAL "$@"',
        'REAL "$@"; echo "Your account is charged for job 7."',
        'REAL --parsable "$@" | sed "s/;.*//"',
        'out=$(REAL --parsable "$@") || exit; echo "${out%%;*};lab"',
        'REAL "$@" >/dev/null && echo queued',
    ],
    ids=["banner before", "banner behind", "bare number", "number and cluster", "no number"],
)
def test_submit_finds_its_job_behind_a_wrapper(small: Cluster, tmp_path: Path, wrapper: str) -> None:
    path = wrapped(tmp_path / "bin", sbatch=f'case "$*" in *--test-only*) exec REAL "$@";; esac\n{wrapper}')
    run = held(small, PATH=path)
    number = small.job_id(run)
    assert small.slurm("squeue", "-h", "-j", number, "-o", "%j").strip() == run.path.name
    small.holdfast("cancel", str(run.path))
    until(lambda: not small.slurm("squeue", "-h", "-j", number, "-t", "PENDING").strip(), 20, "the cancellation")


def test_run_directory_is_kept_while_its_job_may_exist(small: Cluster, tmp_path: Path) -> None:
    path = wrapped(
        tmp_path / "bin",
        sbatch='case "$*" in *--test-only*) exec REAL "$@";; esac\nREAL "$@" >/dev/null; echo "no number here"',
        squeue='echo "slurm_load_jobs error: Invalid account" >&2; exit 1',
    )
    words = [f"{key}={value}" for key, value in {**SMALL, "NODES": "1", "GPUS_PER_NODE": "1", "SBATCH_OPTIONS": "hold=", "JOB_NAME": "kept"}.items()]
    done = small.holdfast("submit", "--json", *words, check=False, PATH=path)
    (run,) = [RunDir(folder) for folder in small.runs.iterdir() if folder.name.startswith("kept")]
    assert done.returncode != 0 and "is kept" in done.stderr and run.id in done.stderr
    assert run.script.exists()
    assert "took" in (again := small.holdfast("resume", str(run.path))).stdout + again.stderr or small.job_id(run)
    assert len(small.slurm("squeue", "-h", "-n", run.path.name, "-o", "%i").split()) == 1, "and no second job was submitted"
    small.holdfast("cancel", str(run.path))


def test_cancel_refuses_a_job_that_is_not_of_the_run(small: Cluster) -> None:
    run = held(small)
    number = small.job_id(run)
    other = small.slurm("sbatch", "--parsable", "--hold", "--output=/dev/null", "--job-name=unrelated", "--wrap=sleep 60").strip()
    run.ledger.write_text(run.ledger.read_text().replace(f'"job_id": "{number}"', f'"job_id": "{other}"'))
    done = small.holdfast("cancel", str(run.path), check=False)
    assert done.returncode != 0 and "is not a job of run" in done.stderr and "unrelated" in done.stderr
    assert small.slurm("squeue", "-h", "-j", other, "-o", "%T").strip() == "PENDING"
    assert not [event for event in event_log.read(run.ledger) if event["event"] == "cancel"]
    small.slurm("scancel", other, number)


def test_job_number_is_a_line_of_its_own() -> None:
    assert job_number("This is job 3 of at most 50\nSubmitted batch job 12 on cluster b\nthanks, user 9\n") == "12"
    assert job_number("4711\n") == "4711" and job_number("4711;cluster\n") == "4711"
    with pytest.raises(SubmissionUnknownError):
        job_number("This is job 3 of at most 50\n")
