"""The examples, run on real data as their first lines say: by hand, on the lab, and interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import Stage
from conftest import REPOSITORY, Cluster, until, weights_sha

from jobs import ckpt_format
from jobs.contract import Exit
from jobs.rundir import RunDir
from jobs.sources import read_yaml, setting_name

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


@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_the_image_classifier_is_preempted_and_ends_with_the_weights_of_one_that_was_not(cluster: Cluster) -> None:
    pytest.importorskip("sklearn")
    words = ["examples/digits.yaml", "MAX_STEPS=900", "ENTRY_ARGS=--save-every,300", f"RUNS_DIR={cluster.runs}", "NODE_ENV=OMP_NUM_THREADS=1"]
    run, straight = (RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words).stdout)["path"])) for _ in range(2))
    cluster.at_step(run, 30, seconds=90)
    # Both give way: whichever of them was still at work goes on from where it was.
    Stage(cluster).preempt()
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["preempted", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0 and attempts[0].step and attempts[0].step >= 30
    assert attempts[1].start_step == attempts[0].step
    cluster.finished(straight)
    assert weights_sha(run) == weights_sha(straight)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 901, 10))
    assert lines[-1]["accuracy"] > 0.9
    assert "900/900" in cluster.holdfast("status", str(run.path)).stdout


@pytest.mark.timeout(240)
def test_the_language_model_is_stopped_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = RunDir(tmp_path / "holdfast-run")
    first = by_hand("finetune.py", tmp_path, "--steps", "400", "--save-every", "20")
    until(lambda: ckpt_format.complete(run.checkpoints), 120, "the first checkpoint")
    first.send_signal(signal.SIGTERM)
    said, trouble = first.communicate(timeout=60)
    assert first.returncode == Exit.REQUEUE, said + trouble
    stopped = ckpt_format.step_of(ckpt_format.complete(run.checkpoints)[0])
    assert stopped and f"stopped at step {stopped}\n" in said
    second = by_hand("finetune.py", tmp_path, "--steps", str(stopped + 25), "--save-every", "20")
    said, trouble = second.communicate(timeout=120)
    assert second.returncode == 0, said + trouble
    assert f"goes on from step-{stopped:08d}" in said
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(5, stopped + 26, 5))
    result = json.loads(said.splitlines()[-1])
    assert result["step"] == stopped + 25 and result["last_loss"] < 4 < result["first_loss"]
    assert (run.path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stop_changes_nothing_in_the_weights_of_the_language_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = by_hand("finetune.py", tmp_path / "straight", "--steps", "300")
    assert straight.communicate(timeout=200) and straight.returncode == 0
    stopped, run = tmp_path / "stopped", RunDir(tmp_path / "stopped" / "holdfast-run")
    process = by_hand("finetune.py", stopped, "--steps", "300")
    until(lambda: ckpt_format.complete(run.checkpoints), 120, "the first checkpoint")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == Exit.REQUEUE
    process = by_hand("finetune.py", stopped, "--steps", "300")
    assert process.communicate(timeout=200) and process.returncode == 0
    weights = [(folder / "holdfast-run" / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "straight", stopped)]
    assert weights[0] == weights[1]
