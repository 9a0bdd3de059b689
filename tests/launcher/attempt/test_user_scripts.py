"""User scripts without the helper on a real Slurm: exit 0 after a stop, a long tail of one rank, the time limit without a signal."""

import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, until

from jobs.run import event_log
from jobs.run.rundir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SCRIPT = str(REPOSITORY / "tests" / "support" / "scripts" / "foreign_script.py")
PAIR = {"NODES": "2", "GPUS_PER_NODE": "1", "PREFLIGHT_S": "0"}
LIMIT = {**PAIR, "TIME_LIMIT": "1", "STOP_LEAD_S": "30"}


def start(cluster: Cluster, kind: str, **settings: str) -> RunDir:
    run = cluster.submit(ENTRY=SCRIPT, ENTRY_ARGS=kind, **{**PAIR, **settings})
    until(lambda: all((run.path / f"seen.{rank}").exists() for rank in range(2)), 60, lambda: f"both ranks\n{cluster.logs(run)}")
    return run


def causes(run: RunDir) -> list[str]:
    return [str(attempt.cause) for attempt in event_log.attempts(event_log.read(run.ledger)) if attempt.cause]


def ended(cluster: Cluster, run: RunDir, seconds: float = 120) -> list[str]:
    until(lambda: causes(run), seconds, lambda: f"the first attempt to end\n{cluster.logs(run)}")
    return causes(run)


def lines(run: RunDir, rank: int = 0) -> str:
    return Path(run.path / f"seen.{rank}").read_text()


def test_exit_0_after_a_preemption_is_continued(cluster: Cluster) -> None:
    run = start(cluster, "leaves")
    cluster.slurm("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    assert ended(cluster, run) == ["preempted"], cluster.logs(run)
    cluster.finished(run)
    assert causes(run) == ["preempted", "finished"], cluster.logs(run)


def test_exit_0_after_a_requeue_is_continued(cluster: Cluster) -> None:
    run = start(cluster, "leaves", LAUNCH="accelerate")
    cluster.slurm("scontrol", "requeue", cluster.job_id(run))
    assert ended(cluster, run) == ["requeued"], cluster.logs(run)
    cluster.finished(run)


@pytest.mark.parametrize("by", ["scancel", "holdfast"])
def test_exit_0_after_a_cancel_is_cancelled(cluster: Cluster, by: str) -> None:
    run = start(cluster, "leaves")
    if by == "scancel":
        cluster.slurm("scancel", cluster.job_id(run))
    else:
        cluster.holdfast("cancel", str(run.path))
    assert ended(cluster, run) == ["cancelled"], cluster.logs(run)


@pytest.mark.parametrize("launch", ["srun", "accelerate"])
def test_a_rank_works_on_after_the_others_ended_with_0(cluster: Cluster, launch: str) -> None:
    run = start(cluster, "tail", LAUNCH=launch)
    cluster.finished(run)
    assert causes(run) == ["finished"], cluster.logs(run)
    assert "1 end" in lines(run)


def test_a_hung_rank_is_killed_after_another_failed(cluster: Cluster) -> None:
    begun = time.time()
    run = start(cluster, "fails", PEER_EXIT_WAIT_S="5")
    assert ended(cluster, run) == ["code_error"], cluster.logs(run)
    assert time.time() - begun < 60
    assert "task 1 of your script ended with 3" in event_log.attempts(event_log.read(run.ledger))[0].evidence


@pytest.mark.parametrize("kind", ["deaf", "ignores", "leaves"])
def test_a_script_at_its_time_limit_is_not_signalled_and_continued(cluster: Cluster, kind: str) -> None:
    run = start(cluster, kind, **LIMIT)
    assert ended(cluster, run, 150) == ["time_limit"], cluster.logs(run)
    cluster.finished(run)
    assert causes(run) == ["time_limit", "finished"], cluster.logs(run)
    # Slurm's TERM at most; USR2 is 12.
    assert "signal 12" not in lines(run)


def test_the_stop_signal_of_the_setting_is_sent(cluster: Cluster) -> None:
    run = start(cluster, "leaves", **LIMIT, STOP_SIGNAL="USR1")
    assert ended(cluster, run, 150) == ["time_limit"], cluster.logs(run)
    cluster.finished(run)
    assert "1 signal 10" in lines(run) and "1 signal 10" in lines(run, 1)


def test_a_script_with_the_helper_hears_the_warning(cluster: Cluster) -> None:
    helped = {"ENTRY": str(REPOSITORY / "tests" / "support" / "scripts" / "helped_script.py"), "ENTRY_ARGS": "100000,1000,0.05"}
    run = cluster.submit(**{**helped, **LIMIT, "NODES": "1"})
    until(lambda: causes(run), 150, lambda: f"the end\n{cluster.logs(run)}")
    attempt = event_log.attempts(event_log.read(run.ledger))[0]
    assert str(attempt.cause) == "time_limit" and attempt.lost_steps == 0 and attempt.step > 0, cluster.logs(run)
    (run.path / "hurry").touch()
    cluster.finished(run)
