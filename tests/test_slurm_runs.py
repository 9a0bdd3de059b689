"""The main promise, on a real Slurm: whatever interrupts a run, it ends with the weights of a run that nobody interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Cluster, losses, until, weights_sha

from jobs import ledger
from jobs.rundir import RunDir
from launcher.local import pid_of_rank

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

TWO_BY_TWO = {"NODES": "2", "GPUS_PER_NODE": "2"}
# Half the processes, most of whose time is `import torch`, where what is shown does not need two on a node.
PAIR = {"NODES": "2", "GPUS_PER_NODE": "1"}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> RunDir:
    """2 nodes x 2 ranks, fp32, from the first step to the last in one attempt."""
    return straight(cluster, TWO_BY_TWO)


@pytest.fixture(scope="module")
def undisturbed_pair(cluster: Cluster) -> RunDir:
    """The same on 2 nodes x 1 rank."""
    return straight(cluster, PAIR)


def straight(cluster: Cluster, ranks: dict[str, str]) -> RunDir:
    run = cluster.submit(**ranks)
    attempts = cluster.finished(run)
    assert len(attempts) == 1, cluster.logs(run)
    return run


def assert_same_result(run: RunDir, reference: RunDir) -> None:
    assert weights_sha(run) == weights_sha(reference)
    assert losses(run) == losses(reference)


def test_a_preempted_run_is_requeued_resumed_and_ends_with_identical_weights(cluster: Cluster, undisturbed: RunDir) -> None:
    run = cluster.submit(**TWO_BY_TWO)
    cluster.at_step(run, 25)
    cluster.slurm("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0
    assert attempts[1].start_step == attempts[0].step
    assert_same_result(run, undisturbed)


def test_a_run_at_its_time_limit_is_warned_requeued_and_ends_with_identical_weights(cluster: Cluster) -> None:
    # The warning comes 21 to 39 s after the start: late enough for imports on a busy machine, and the steps wait so that they are
    # not through by then. Should imports take longer, such attempts are no progress, and as many as it takes are allowed here.
    limits = {"TIME_LIMIT": "1", "STOP_LEAD_S": "30", "PREFLIGHT_S": "0", "MAX_NO_PROGRESS": "30"}
    model = {"MODEL": "tests.patient:build", "MAX_STEPS": "360", "EVAL_EVERY": "120", "CHECKPOINT_EVERY": "120"}
    run = cluster.submit(**{**PAIR, **model, **limits, "MODEL_OPTIONS": f"pause=0.1,{SMALL['MODEL_OPTIONS']}"})
    reference = cluster.submit(**PAIR, **model)
    attempts = cluster.finished(run, seconds=200)
    causes = [attempt.cause.value for attempt in attempts if attempt.cause]
    assert len(causes) >= 2 and set(causes[:-1]) == {"time_limit"}, cluster.logs(run)
    assert sum(attempt.lost_steps for attempt in attempts) == 0
    cluster.finished(reference)
    assert_same_result(run, reference)


def test_accelerate_launch_keeps_the_contract_and_leads_to_the_same_weights(cluster: Cluster, undisturbed: RunDir) -> None:
    config = cluster.runs / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nuse_cpu: false\ndebug: false\nnum_machines: 9\nnum_processes: 9\n"
    )
    own = cluster.submit(
        LAUNCH="accelerate",
        NODES="2",
        GPUS_PER_NODE="1",
        ENTRY=str(REPOSITORY / "tests" / "own_script.py"),
        ENTRY_ARGS="patient",
        ACCELERATE_CONFIG=str(config),
    )
    run = cluster.submit(LAUNCH="accelerate", **TWO_BY_TWO)
    cluster.at_step(run, 25)
    until(lambda: (own.path / "count.0").exists(), 60, "the first steps of the other script")
    cluster.slurm("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    attempts = cluster.finished(run, 180)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0 and attempts[1].start_step == attempts[0].step
    assert_same_result(run, undisturbed)
    # Its code is the rank's own, which the launcher that comes with Accelerate would have turned into 1.
    assert {event["exit_code"] for event in ledger.read(run.ledger) if event["event"] == "end"} == {75, 0}
    attempts = cluster.finished(own, 180)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(own)
    assert "in bf16" in own.log(attempts[1].job_id, 0).read_text()


def test_scontrol_requeue_loses_nothing(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 45)
    cluster.slurm("scontrol", "requeue", cluster.job_id(run))
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["requeued", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0
    assert_same_result(run, undisturbed_pair)


def test_a_killed_rank_costs_at_most_one_checkpoint_interval(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 60)
    kill_rank(run, 1)
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["killed", "finished"], cluster.logs(run)
    assert "rank 1" in attempts[0].evidence
    assert 0 < attempts[0].lost_steps <= int(SMALL["CHECKPOINT_EVERY"])
    # The newest checkpoint, whichever that was when the signal arrived.
    assert attempts[1].start_step >= 40 and attempts[1].start_step % int(SMALL["CHECKPOINT_EVERY"]) == 0
    assert_same_result(run, undisturbed_pair)


def test_scancel_stops_a_run_for_good_and_resume_goes_on(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 20)
    cluster.slurm("scancel", cluster.job_id(run))
    until(lambda: [a for a in ledger.attempts(ledger.read(run.ledger)) if a.cause], 30, "the end of the attempt")
    until(
        lambda: not cluster.slurm("squeue", "-h", "-j", cluster.job_id(run), "-t", "all", "-o", "%T").replace("CANCELLED", "").strip(), 30, "the job to leave"
    )
    attempt = ledger.attempts(ledger.read(run.ledger))[0]
    assert attempt.cause is not None and attempt.cause.value == "cancelled", cluster.logs(run)
    assert "cancelled" in cluster.holdfast("status", str(run.path)).stdout
    cluster.holdfast("resume", str(run.path))
    assert len(cluster.finished(run)) == 2
    assert_same_result(run, undisturbed_pair)


def test_the_script_submitted_by_hand_leads_to_the_same_training(cluster: Cluster, undisturbed: RunDir) -> None:
    settings = {**SMALL, "HOLDFAST_SITE": "lab", "HOLDFAST_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=4G", "--time=10", "-o", "/dev/null", "slurm/train.sbatch"],
        cwd=REPOSITORY, env={**cluster.env, **settings}, capture_output=True, text=True, check=True, timeout=90,
    )  # fmt: skip
    run = until(lambda: [RunDir(path) for path in cluster.runs.glob(f"*-j{done.stdout.strip()}")], 30, "the run directory of the job")[0]
    cluster.finished(run)
    assert_same_result(run, undisturbed)
    assert shape(run.path) == shape(undisturbed.path) - {"submitit"}
    # And the script inside the run directory, submitted by hand once more, finds nothing left to do.
    job = cluster.slurm("sbatch", "--parsable", str(run.script)).strip()
    until(lambda: not cluster.slurm("squeue", "-h", "-j", job), 30, "the second job to end")
    assert_same_result(run, undisturbed)


def test_twenty_small_runs_go_as_one_array_through_one_sbatch(cluster: Cluster) -> None:
    settings = {**SMALL, "NODES": "1", "GPUS_PER_NODE": "1", "MAX_STEPS": "3", "EVAL_SAMPLES": "8", "ARRAY_PARALLEL": "3"}
    answer = json.loads(cluster.holdfast("submit", "--json", "--array", "SEED=1..20", *(f"{k}={v}" for k, v in settings.items() if k != "SEED")).stdout)
    assert answer["members"] == 20
    array = RunDir(Path(answer["path"]))
    members = [array.member(index) for index in range(20)]
    for member in members:
        cluster.finished(member, seconds=200)
    assert len({weights_sha(member) for member in members}) == 20
    assert {event["job_id"].partition("_")[0] for member in members for event in ledger.read(member.ledger)} == {answer["job_id"]}


def kill_rank(run: RunDir, rank: int) -> None:
    pid = pid_of_rank(run, rank)
    assert pid is not None, f"no process of rank {rank} of {run.id}"
    os.kill(pid, signal.SIGKILL)


def shape(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}
