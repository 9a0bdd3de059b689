"""Sweeps on a real Slurm: trials are array tasks, are preempted, killed and given up, and none is lost or run twice."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Cluster, losses, until

from jobs.config.resolver import load
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.sweep import search_space
from launcher.sweeps import study

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SCRIPT = REPOSITORY / "tests/support/scripts/sweep_script.py"


def swept(cluster: Cluster, *words: str, **settings: str) -> RunDir:
    varying = {word.partition("=")[0] for word in words}
    pairs = [f"{key}={value}" for key, value in {**SMALL, "NODES": "1", "GPUS_PER_NODE": "1", **settings}.items() if key not in varying]
    return RunDir(Path(json.loads(cluster.holdfast("sweep", "--json", *words, *pairs).stdout)["path"]))


def causes(run: RunDir) -> list[str]:
    return [attempt.cause.value for attempt in event_log.attempts(event_log.read(run.ledger)) if attempt.cause]


def is_over(run: RunDir) -> bool:
    return causes(run)[-1:] in (["finished"], ["pruned"], ["code_error"])


def step_of(run: RunDir) -> int:
    attempts = event_log.attempts(event_log.read(run.ledger))
    try:
        return int(run.attempt(attempts[-1].number).progress.read_text()) if attempts and attempts[-1].cause is None else 0
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_trials_of_which_some_are_preempted_all_finish_and_none_is_lost_or_run_twice(cluster: Cluster) -> None:
    over = ["--over", "LR=1e-4..1e-1:log", "--over", "PRECISION=bf16,none", "--over", "BATCH_SIZE=16,32"]
    sweep_dir = swept(cluster, *over, "--trials", "12", "--parallel", "2")
    job_id = cluster.job_id(sweep_dir)
    trials = [sweep_dir.member(number) for number in range(12)]

    def preempted() -> list[RunDir]:
        return [run for run in trials if "preempted" in causes(run)]

    while len(preempted()) < 2:
        until(lambda: any(20 <= step_of(run) < 120 for run in trials), 100, "a trial in the middle of its steps")
        high = cluster.slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 0.2", "-o", "/dev/null").strip()
        until(lambda job=high: not cluster.slurm("squeue", "-h", "-j", job, "-t", "PENDING,RUNNING"), 60, "the job that preempts to be over")
    until(lambda: all(is_over(run) for run in trials), 450, f"the end of all trials; there are {[causes(run) for run in trials]}")

    # Each trial is one run that finished once, in one array, and lost nothing to the preemptions.
    for number, run in enumerate(trials):
        attempts = event_log.attempts(event_log.read(run.ledger))
        assert causes(run)[-1] == "finished" and set(causes(run)[:-1]) <= {"preempted"}, cluster.logs(run)
        assert sum(attempt.lost_steps for attempt in attempts) == 0
        assert all(after.start_step == before.step for before, after in zip(attempts, attempts[1:], strict=False)), attempts
        assert {attempt.job_id for attempt in attempts} == {f"{job_id}_{number}"}
        steps = [step for step, _, _ in losses(run)]
        assert steps == sorted(set(steps)) and steps[-1] == 150
    assert any(attempt.step for run in preempted() for attempt in event_log.attempts(event_log.read(run.ledger))[:-1])

    # The study says the same: each number once, the values that were trained, the value that came out.
    sweep = search_space.load(sweep_dir.sweep)
    known = until(
        lambda: (found := study.opened(sweep_dir, sweep).get_trials()) and all(trial.state.is_finished() for trial in found) and found,
        60,
        "the study to hear of the last trial",
    )
    assert [trial.number for trial in known] == list(range(12)) and {trial.state.name for trial in known} == {"COMPLETE"}
    for trial, run in zip(known, trials, strict=True):
        job = load(run.job_yaml)
        assert trial.params["LR"] == job.lr and int(trial.params["BATCH_SIZE"]) == job.batch_size
        assert {"none": "fp32"}.get(trial.params["PRECISION"], trial.params["PRECISION"]) == job.precision
        assert trial.value == losses(run)[-1][2]
    assert len({trial.params["LR"] for trial in known}) == 12

    # Table, best, command, importance and picture.
    told = json.loads(cluster.holdfast("sweep", "show", str(sweep_dir.path), "--json").stdout)
    assert told["counts"] == {"finished": 12}
    best = min(known, key=lambda trial: trial.value)
    assert told["best"] == best.number
    assert [row["value"] for row in told["trials"]] == [trial.value for trial in known]
    assert sum(row["attempts"] for row in told["trials"]) == sum(len(causes(run)) for run in trials)
    assert set(told["importance"]) == {"LR", "PRECISION", "BATCH_SIZE"} and sum(told["importance"].values()) == pytest.approx(1, abs=0.01)
    command = shlex.split(told["command"])
    assert command[:3] == ["holdfast", "submit", "jobs/quickstart.yaml"] and told["left_out"] == "MAX_STEPS=150"
    explained = {row["setting"]: row["value"] for row in json.loads(cluster.holdfast("explain", "--json", *command[2:]).stdout)}
    assert float(explained["lr"]) == best.params["LR"] and explained["seq_len"] == "64" and explained["max_steps"] == "240"
    text = cluster.holdfast("sweep", "show", str(sweep_dir.path)).stdout
    rows = [line.split() for line in text.splitlines() if line[:1].isspace() or line[:1].isdigit()]
    assert [row[0].rstrip("*") for row in rows if row[1] == "finished"] == [str(number) for number in range(12)]
    assert f"{best.number}*" in text and "0 steps lost" in text and "importance" in text
    assert_is_a_picture(sweep_dir.sweep_plot)


def assert_is_a_picture(path: Path) -> None:
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    dark = (pixels[..., :3].mean(axis=2) < 0.7).mean()
    assert 0.005 < dark < 0.5, f"{dark:.3f} of the picture is not background"


def test_a_bad_trial_is_given_up_a_broken_one_fails_and_a_killed_one_comes_back(cluster: Cluster) -> None:
    # A stand-in for training, so that the trials start in no time; everything around it is real.
    sweep_dir = swept(
        cluster, "--over", "LR=1,2,3,900,666", "--sampler", "grid", "--parallel", "3", "--pruner", "median", "--prune-startup", "2",
        ENTRY=str(SCRIPT), MAX_STEPS="60", EVAL_EVERY="20", NODE_PYTHON=sys.executable,
    )  # fmt: skip
    trials = [sweep_dir.member(number) for number in range(5)]
    until(lambda: step_of(trials[0]) == 40, 100, f"trial 0 to be at work\n{cluster.logs(trials[0])}")
    os.kill(int((trials[0].path / "pid").read_text()), signal.SIGKILL)
    until(lambda: all(is_over(run) for run in trials), 120, f"the end of all trials; there are {[causes(run) for run in trials]}")
    assert causes(trials[0]) == ["killed", "finished"], cluster.logs(trials[0])
    assert [causes(run) for run in trials[1:3]] == [["finished"]] * 2
    assert causes(trials[3]) == ["pruned"] and causes(trials[4]) == ["code_error"], cluster.logs(trials[3])
    told = json.loads(cluster.holdfast("sweep", "show", str(sweep_dir.path), "--json").stdout)
    assert told["counts"] == {"finished": 3, "pruned": 1, "failed": 1} and told["best"] == 0
    assert told["trials"][3]["note"].startswith("pruned at step ") and 0 < told["trials"][3]["step"] < 60
    # Not queued again, and no failure for Slurm either.
    job_id = cluster.job_id(sweep_dir)
    until(lambda: job_id not in cluster.slurm("squeue", "-h", "-r", "-o", "%i"), 60, "the array to leave the queue")
    known = study.opened(sweep_dir, search_space.load(sweep_dir.sweep)).get_trials()
    assert [trial.state.name for trial in known] == ["COMPLETE"] * 3 + ["PRUNED", "FAIL"]
    # A person may want it all the same: then it goes on, and nobody gives it up again.
    cluster.holdfast("resume", str(trials[3].path))
    until(lambda: causes(trials[3]) == ["pruned", "finished"], 60, f"the resumed trial to finish\n{cluster.logs(trials[3])}")


def test_a_sweep_of_a_thousand_runs_is_one_sbatch(cluster: Cluster) -> None:
    sweep_dir = swept(cluster, "--over", "SEED=1..1000", SBATCH_OPTIONS="begin=now+1hour")
    submitted = [event for event in event_log.read(sweep_dir.ledger) if event["event"] == "submitted"]
    assert len(submitted) == 1
    assert len(cluster.slurm("squeue", "-h", "-r", "-j", submitted[0]["job_id"]).splitlines()) == 1000
    assert "cancelled 1000 trials" in cluster.holdfast("sweep", "cancel", str(sweep_dir.path)).stdout
    assert json.loads(cluster.holdfast("sweep", "--resume", str(sweep_dir.path), "--json").stdout)["trials"] == 1000
    told = json.loads(cluster.holdfast("sweep", "show", str(sweep_dir.path), "--json").stdout)
    assert told["counts"] == {"waiting": 1000}
    cluster.holdfast("sweep", "cancel", str(sweep_dir.path))
