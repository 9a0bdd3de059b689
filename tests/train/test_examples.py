"""The examples, run on real data as their first lines say: by hand, on the lab, and interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, until, weights_sha

from jobs.checkpoint import directory
from jobs.config.setting_names import setting_name
from jobs.config.yaml_io import read_yaml
from jobs.core.contract import Exit
from jobs.run import event_log
from jobs.run.rundir import RunDir
from tools.chaos import Stage

EXAMPLES = REPOSITORY / "examples"
QUIET = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def by_hand(name: str, cwd: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-u", str(EXAMPLES / name), *args], cwd=cwd, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_example_has_a_job_file_that_names_it() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        job = read_yaml(path, path.name)
        assert job["entry"] == f"examples/{path.stem}.py" and (REPOSITORY / job["entry"]).is_file()
        assert all(setting_name(name) for name in job)
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {path.stem for path in EXAMPLES.glob("*.yaml")}


def digits(cluster: Cluster, *more: str) -> RunDir:
    words = ["examples/digits.yaml", *more, "MAX_STEPS=1500", "ENTRY_ARGS=--save-every,500", f"RUNS_DIR={cluster.runs}", "NODE_ENV=OMP_NUM_THREADS=1"]
    return RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words).stdout)["path"]))


@pytest.fixture(scope="module")
def preempted(cluster: Cluster) -> RunDir:
    """The image classifier on two nodes, thrown out once."""
    pytest.importorskip("sklearn")
    run = digits(cluster)
    cluster.at_step(run, 30, seconds=90)
    Stage(cluster).preempt()
    cluster.finished(run)
    return run


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_image_classifier_is_preempted_and_loses_nothing(cluster: Cluster, preempted: RunDir) -> None:
    attempts = event_log.attempts(event_log.read(preempted.ledger))
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(preempted)
    assert attempts[0].lost_steps == 0 and attempts[0].step and attempts[0].step >= 30
    assert attempts[1].start_step == attempts[0].step
    lines = [json.loads(line) for line in preempted.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 1501, 10))
    assert lines[-1]["accuracy"] > 0.9
    assert "1,500/1,500" in cluster.holdfast("status", str(preempted.path)).stdout


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_ends_with_the_weights_of_one_that_nobody_disturbed(cluster: Cluster, preempted: RunDir) -> None:
    straight = digits(cluster)
    assert len(cluster.finished(straight)) == 1
    assert weights_sha(preempted) == weights_sha(straight)


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_accelerate_launch_it_loses_nothing_either(cluster: Cluster) -> None:
    run = digits(cluster, "LAUNCH=accelerate")
    cluster.at_step(run, 30, seconds=150)
    cluster.slurm("scontrol", "requeue", cluster.job_id(run))
    attempts = cluster.finished(run, 200)
    assert [(str(attempt.cause), attempt.lost_steps) for attempt in attempts] == [("requeued", 0), ("finished", 0)], cluster.logs(run)
    assert attempts[1].start_step == attempts[0].step


@pytest.mark.trains
@pytest.mark.timeout(900)
def test_the_language_model_learns_and_leaves_its_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = RunDir(tmp_path / "holdfast-run")
    said, trouble = (process := by_hand("finetune.py", tmp_path, "--steps", "30", "--save-every", "10")).communicate(timeout=300)
    assert process.returncode == 0, said + trouble
    assert [path.name for path in directory.complete(run.checkpoints)] == ["step-00000030", "step-00000020"]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == list(range(5, 31, 5))
    result = json.loads(said.splitlines()[-1])
    assert result["step"] == 30 and result["last_loss"] < 4.5 < result["first_loss"]
    assert (run.path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_costs_the_language_model_no_step_and_no_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    process = by_hand("finetune.py", straight, "--steps", "600")
    assert process.communicate(timeout=300) and process.returncode == 0
    run = RunDir(stopped / "holdfast-run")
    process = by_hand("finetune.py", stopped, "--steps", "600")
    until(lambda: directory.complete(run.checkpoints), 120, "the first checkpoint")
    process.send_signal(signal.SIGTERM)
    said, trouble = process.communicate(timeout=120)
    assert process.returncode == Exit.REQUEUE, said + trouble
    step = directory.step_of(directory.complete(run.checkpoints)[0])
    assert step and step < 600 and f"stopped at step {step}\n" in said
    process = by_hand("finetune.py", stopped, "--steps", "600")
    said, trouble = process.communicate(timeout=300)
    assert process.returncode == 0 and f"goes on from step-{step:08d}" in said, said + trouble
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == list(range(5, 601, 5))
    weights = [(folder / "holdfast-run" / "model" / "model.safetensors").read_bytes() for folder in (straight, stopped)]
    assert weights[0] == weights[1]
