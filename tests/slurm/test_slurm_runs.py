"""The main promise, on a real Slurm: a preempted run ends with the weights of a run that nobody interrupted, however it was launched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Cluster, assert_same_result, until, weights_sha

from jobs.run import event_log
from jobs.run.rundir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

TWO_BY_TWO = {"NODES": "2", "GPUS_PER_NODE": "2"}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> RunDir:
    """2 nodes x 2 ranks, fp32, from the first step to the last in one attempt."""
    return cluster.straight(**TWO_BY_TWO)


def test_a_preempted_run_is_requeued_resumed_and_ends_with_identical_weights(cluster: Cluster, undisturbed: RunDir) -> None:
    run = cluster.submit(**TWO_BY_TWO)
    cluster.at_step(run, 25)
    cluster.slurm("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0
    assert attempts[1].start_step == attempts[0].step
    assert_same_result(run, undisturbed)


def test_accelerate_launch_keeps_the_contract_and_leads_to_the_same_weights(cluster: Cluster, undisturbed: RunDir) -> None:
    config = cluster.runs / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nuse_cpu: false\ndebug: false\nnum_machines: 9\nnum_processes: 9\n"
    )
    own = cluster.submit(
        LAUNCH="accelerate",
        NODES="2",
        GPUS_PER_NODE="1",
        ENTRY=str(REPOSITORY / "tests" / "support" / "scripts" / "own_script.py"),
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
    assert {event["exit_code"] for event in event_log.read(run.ledger) if event["event"] == "end"} == {75, 0}
    attempts = cluster.finished(own, 180)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(own)
    assert "in bf16" in own.log(attempts[1].job_id, 0).read_text()


def test_the_script_submitted_by_hand_leads_to_the_same_training(cluster: Cluster, undisturbed: RunDir) -> None:
    settings = {**SMALL, "HOLDFAST_SITE": "lab", "HOLDFAST_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=4G", "--time=10", "-o", "/dev/null", "slurm/train.sbatch"],
        cwd=REPOSITORY, env={**cluster.env, **settings}, capture_output=True, text=True, check=True, timeout=90,
    )  # fmt: skip
    run = until(lambda: [RunDir(path) for path in cluster.runs.glob(f"*-j{done.stdout.strip()}")], 30, "the run directory of the job")[0]
    cluster.finished(run)
    assert_same_result(run, undisturbed)
    # What the watchdog learnt is there where it looked twice while steps were done, once in two seconds at most.
    assert shape(run.path) - {"pace.json"} == shape(undisturbed.path) - {"pace.json", "submitit"}
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
    assert {event["job_id"].partition("_")[0] for member in members for event in event_log.read(member.ledger)} == {answer["job_id"]}


def shape(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}
