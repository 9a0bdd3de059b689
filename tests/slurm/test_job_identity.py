"""The identity of Slurm jobs on real private clusters: exported client variables, output of sbatch wrappers, reused job numbers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Cluster, until

from jobs.run import event_log
from jobs.run.rundir import RunDir
from slurm.devcluster import lab

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
