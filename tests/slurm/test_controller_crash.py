"""A crash of slurmctld around the requeue of a run, on a real Slurm: a request that was accepted may be missing from the saved state."""

import json
import signal
import time
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY, Cluster, booted, until

from jobs.core.contract import Event
from jobs.run import event_log
from jobs.run.rundir import RunDir
from slurm.client import Slurm
from slurm.devcluster import lab, proc

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SCRIPT = REPOSITORY / "tests" / "support" / "scripts" / "until_stopped.py"
# Seconds from the `end` line of the attempt to SIGKILL for slurmctld. The save before it begins about a second before that line, the next
# one 5 s after that: in between, slurmctld has accepted the requeue and not saved it.
OFFSETS_S = (0.1, 0.45, 1.1)
SWEEP_S = tuple(round(2.0 * number / 19, 3) for number in range(20))


@pytest.fixture(scope="module")
def crashing() -> Iterator[Cluster]:
    """Runs confirm their requeue here, as they do by default."""
    with booted(lab.LabConfig(nodes=2)) as here:
        del here.env["REQUEUE_CONFIRM_S"]
        yield here


def wait_for_save(cluster: Cluster) -> None:
    """Returns when slurmctld has just written its jobs, by the file itself."""
    saved = cluster.lab.root / "state" / "job_state"
    before = saved.stat().st_mtime_ns if saved.exists() else 0
    job_id = cluster.slurm("sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true").strip()
    until(lambda: saved.exists() and saved.stat().st_mtime_ns != before, 20, "a save of slurmctld")
    cluster.slurm("scancel", job_id)


def crash_after_end(cluster: Cluster, offset_s: float) -> RunDir:
    """A run that was asked to stop right after a save of slurmctld, which is killed `offset_s` seconds after the `end` line and stays away."""
    run = cluster.submit(ENTRY=str(SCRIPT), NODES="1", GPUS_PER_NODE="1")
    until((run.path / "running.1").exists, 60, lambda: f"the script\n{cluster.logs(run)}")
    controller = proc.of_lab(cluster.lab.root).daemons["slurmctld"]
    wait_for_save(cluster)
    cluster.slurm("scancel", "-s", "USR2", cluster.job_id(run))
    limit = time.monotonic() + 120
    while not (ends := [event for event in event_log.read(run.ledger) if event["event"] == Event.END]):
        assert time.monotonic() < limit, cluster.logs(run)
        time.sleep(0.005)
    time.sleep(max(ends[0]["time"] + offset_s - time.time(), 0))
    for process in controller:
        proc.send(process, signal.SIGKILL)
    cluster.lab.kill_controller()
    return run


def state_of_job(cluster: Cluster, job_id: str, *states: str) -> tuple[str, int]:
    """(state, restarts) by Slurm's answer, when the state is one of `states`."""

    def reached() -> tuple[str, int] | None:
        info = Slurm(cluster.env).job(job_id)
        return (info.state, info.restarts) if info is not None and info.state in states else None

    state, restarts = until(reached, 60, lambda: f"job {job_id} to be {' or '.join(states)}")
    return str(state), int(restarts)


def jobs_of(cluster: Cluster, run: RunDir) -> list[str]:
    return sorted(cluster.slurm("squeue", "-h", "-t", "all", "-n", run.id, "-o", "%i").split())


def causes_of(run: RunDir) -> list[str]:
    return [str(attempt.cause) for attempt in event_log.attempts(event_log.read(run.ledger))]


def assert_back_once(cluster: Cluster, run: RunDir) -> None:
    """One job that was restarted once, by Slurm's answer, and two attempts, by the ledger."""
    job_id = cluster.job_id(run)
    assert state_of_job(cluster, job_id, "COMPLETED", "FAILED", "CANCELLED") == ("COMPLETED", 1), cluster.logs(run)
    assert jobs_of(cluster, run) == [job_id], cluster.logs(run)
    assert causes_of(run) == ["requeued", "finished"], cluster.logs(run)


@pytest.mark.parametrize("offset_s", OFFSETS_S)
def test_a_requeue_lost_in_a_crash_of_slurmctld_is_repeated(crashing: Cluster, offset_s: float) -> None:
    run = crash_after_end(crashing, offset_s)
    time.sleep(4)
    crashing.lab.start_controller()
    assert_back_once(crashing, run)


@pytest.mark.slow
@pytest.mark.parametrize("offset_s", SWEEP_S)
def test_a_crash_of_slurmctld_at_any_moment_of_a_requeue_loses_no_run(crashing: Cluster, offset_s: float) -> None:
    run = crash_after_end(crashing, offset_s)
    time.sleep(6)
    crashing.lab.start_controller()
    assert_back_once(crashing, run)


def status_of(cluster: Cluster, run: RunDir) -> tuple[str, str]:
    (row,) = json.loads(cluster.holdfast("status", "--json", str(run.path)).stdout)
    return str(row["state"]), str(row["note"])


def test_a_lost_requeue_is_reported_by_status_and_repaired_by_resume(crashing: Cluster) -> None:
    """The batch script is killed while slurmctld is away, as KillWait does: nothing of the run is left that could repeat the request."""
    run = crash_after_end(crashing, 0.6)
    job_id = crashing.job_id(run)
    scripts = [process for group in proc.of_lab(crashing.lab.root).jobs.values() for process in group if process.name != "slurmstepd"]
    assert scripts, crashing.logs(run)
    for process in scripts:
        proc.send(process, signal.SIGKILL)
    crashing.lab.start_controller()
    assert state_of_job(crashing, job_id, "COMPLETED", "FAILED", "CANCELLED") == ("FAILED", 0), crashing.logs(run)
    assert [event["way"] for event in event_log.read(run.ledger) if event["event"] == Event.REQUEUE] == ["requeued by holdfast"]
    before = run.ledger.read_bytes()
    assert status_of(crashing, run) == ("stopped", f"requeued, not requeued: job {job_id} ended as FAILED; holdfast resume {run.id}")
    assert run.ledger.read_bytes() == before
    crashing.holdfast("resume", str(run.path))
    again = crashing.holdfast("resume", str(run.path), check=False)
    assert "nothing to resume" in again.stdout or "holdfast cancel" in again.stderr, f"a second job\n{again.stdout}{again.stderr}"
    successor = crashing.job_id(run)
    assert state_of_job(crashing, successor, "COMPLETED", "FAILED", "CANCELLED")[0] == "COMPLETED", crashing.logs(run)
    assert jobs_of(crashing, run) == sorted([job_id, successor]) and successor != job_id
    # In its first seconds a new slurmctld may refuse a step, until the nodes have told it their GPUs: such an attempt is `unknown`.
    causes = causes_of(run)
    assert (causes[0], causes[-1]) == ("requeued", "finished") and set(causes[1:-1]) <= {"unknown"}, crashing.logs(run)
    assert status_of(crashing, run)[0] == "finished"


@pytest.mark.slow
def test_a_node_lost_before_the_requeue_is_confirmed_costs_no_run(crashing: Cluster) -> None:
    """The crash lost the request, and the node of the script is gone: slurmctld recovers a running job, gives its node up and requeues the job itself."""
    run = crash_after_end(crashing, 0.6)
    (node,) = event_log.attempts(event_log.read(run.ledger))[0].nodes
    crashing.lab.kill_node(node)
    try:
        crashing.lab.start_controller()
        assert state_of_job(crashing, crashing.job_id(run), "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL") == ("COMPLETED", 1), crashing.logs(run)
        assert causes_of(run) == ["requeued", "finished"] and len(jobs_of(crashing, run)) == 1, crashing.logs(run)
    finally:
        crashing.lab.restart_node(node)


def test_scancel_of_a_requeued_run_that_waits_is_reported_as_cancelled(crashing: Cluster) -> None:
    run = crashing.submit(ENTRY=str(SCRIPT), NODES="1", GPUS_PER_NODE="1", REQUEUE_CONFIRM_S="0")
    until((run.path / "running.1").exists, 60, lambda: f"the script\n{crashing.logs(run)}")
    job_id = crashing.job_id(run)
    crashing.slurm("scancel", "-s", "USR2", job_id)
    state_of_job(crashing, job_id, "PENDING")
    crashing.slurm("scancel", job_id)
    state_of_job(crashing, job_id, "CANCELLED")
    assert status_of(crashing, run) == ("cancelled", f"scancel of job {job_id}; holdfast resume {run.id} goes on")


def test_scancel_while_a_requeue_is_confirmed_is_recorded_as_cancelled(crashing: Cluster) -> None:
    run = crashing.submit(ENTRY=str(SCRIPT), NODES="1", GPUS_PER_NODE="1")
    until((run.path / "running.1").exists, 60, lambda: f"the script\n{crashing.logs(run)}")
    job_id = crashing.job_id(run)
    crashing.slurm("scancel", "-s", "USR2", job_id)
    until(lambda: any(event["event"] == Event.REQUEUE for event in event_log.read(run.ledger)), 30, lambda: f"the requeue\n{crashing.logs(run)}")
    crashing.slurm("scancel", job_id)
    state_of_job(crashing, job_id, "CANCELLED")
    assert status_of(crashing, run)[0] == "cancelled", crashing.logs(run)
    time.sleep(8)
    assert causes_of(run) == ["requeued"] and not crashing.slurm("squeue", "-h", "-j", job_id).strip(), crashing.logs(run)
