"""Resume is exact: whatever ends an attempt, at whatever moment, size and precision, the run comes to the same result."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import weights_sha
from training import TINY, Farm, at_step, curve, events, farm, in_a_save, logs, result, saved

from jobs.checkpoint import directory
from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import ImpossibleJobError, SettingError
from jobs.run import sample_audit
from jobs.run.rundir import RunDir
from launcher.attempt.lifecycle import begin
from launcher.submission.reconfigure import change
from train.checkpoint import state_dict
from train.checkpoint.changes import changes, refusal
from train.data.synthetic import AffineTokens
from train.data.tokens import write_tokens

__all__ = ["farm"]
pytestmark = pytest.mark.timeout(900)


def killer(kills: int, seed: int, torn: list[int]):
    """Kills all ranks with -9, `kills` times, at random steps and every other time inside a save: `torn` says in which attempts."""
    rng = random.Random(seed)

    def kill(farm: Farm, run: RunDir) -> None:
        for attempt in range(1, kills + 1):
            if not at_step(run, 0, attempt, seconds=30):
                return
            begun = int(run.attempt(attempt).progress.read_text())
            if attempt % 2:
                in_a_save(run)
                time.sleep(rng.uniform(0, 0.1))
            else:
                at_step(run, min(begun + rng.randint(1, 14), int(TINY["MAX_STEPS"]) - 1), attempt)
            farm.kill_all()
            while any(rank.poll() is None for rank in farm.ranks):
                time.sleep(0.002)
            if any(path.name.startswith(".step-") for path in run.checkpoints.glob(".*")):
                torn.append(attempt)

    return kill


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_at_random_moments_also_inside_saves_ends_with_identical_bits(farm: Farm, precision: str) -> None:
    straight = farm.finished(PRECISION=precision)
    run = farm.prepare(PRECISION=precision)
    torn: list[int] = []
    # A save of this size is over in a hundredth of a second, less than it takes to see that it has begun.
    farm.before = "disk_not_quite_as_slow"
    try:
        assert farm.train(run, killer(4, seed=11, torn=torn)) == Exit.DONE, logs(run)
    finally:
        farm.before = None
    assert result(run) == result(straight), logs(run)
    assert len(events(run, "end")) >= 4
    assert torn, "no kill came inside a save"
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_random_kills_change_no_bit(farm: Farm, precision: str) -> None:
    longer = {"PRECISION": precision, "MAX_STEPS": "120"}
    straight = farm.finished(**longer)
    run = farm.prepare(**longer)
    assert farm.train(run, killer(20, seed=3, torn=[])) == Exit.DONE, logs(run)
    assert result(run) == result(straight)
    assert len(events(run, "end")) >= 15


def through_worlds(farm: Farm, worlds: list[int], seed: int, **settings: str) -> RunDir:
    """A run that goes on at another number of processes after each kill."""
    rng = random.Random(seed)
    run = farm.prepare(GPUS_PER_NODE=str(worlds[0]), MAX_KILLED="0", LOG_SAMPLES="true", **settings)
    for index, world in enumerate(worlds):
        if index:
            change(run, [f"GPUS_PER_NODE={world}"], allow=False, executable="python3")
        last = index == len(worlds) - 1

        def kill(farm: Farm, run: RunDir, attempt: int = index + 1) -> None:
            assert at_step(run, 0, attempt)
            begun = int(run.attempt(attempt).progress.read_text())
            at_step(run, begun + rng.randint(9, 12), attempt)
            # Saves run behind training: a slow one may not be whole yet, and then the next world would begin at zero instead of going on.
            every = int(TINY["CHECKPOINT_EVERY"])
            assert saved(run, begun // every * every + every)
            farm.kill_all()

        # A new job id, as another job would have: the budget of kills is used up on purpose.
        pid = os.getpid() + 100_000 * (index + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda pid=pid: pid)
            code = farm.train(run, None if last else kill)
        assert code == (Exit.DONE if last else Exit.FAILED) or not last, logs(run)
    return run


@pytest.mark.parametrize("worlds", [[2, 1, 2]], ids=str)
def test_another_number_of_processes_sees_the_same_samples_and_nearly_the_same_losses(farm: Farm, worlds: list[int]) -> None:
    straight = farm.finished(GPUS_PER_NODE="2", LOG_SAMPLES="true")
    run = through_worlds(farm, worlds, seed=5)
    assert order_of(run) == order_of(straight)
    verdict = sample_audit.of_run(run)
    assert not verdict.faults and verdict.steps == 40
    # Sums over 2 ranks and over 1 round differently, by some 1e-7 per step; 40 steps of training spread that.
    for ours, theirs in zip(curve(run), curve(straight), strict=True):
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], rel=1e-4)
    said = (run.logs / sorted(os.listdir(run.logs))[-1]).parent
    assert any("world size was 2, now 1" in path.read_text() for path in said.glob("*.0.out")), logs(run)
    assert events(run, "changed")[0]["changes"]["gpus_per_node"] == [2, 1]


def order_of(run: RunDir) -> dict[tuple[int, int], int]:
    """(step, place in the batch) -> sample, over all attempts; a place that ever had two samples fails."""
    order: dict[tuple[int, int], int] = {}
    for path in run.path.glob("attempts/*/samples.*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for slot, sample in zip(line["slots"], line["ids"], strict=True):
                assert order.setdefault((line["step"], slot), sample) == sample
    return order


SMALL_EPOCH = {"DATA": "training_data:hundred"}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_sample_of_an_epoch_is_used_once_through_kills_and_world_sizes_4_2_3(farm: Farm, seed: int) -> None:
    run = through_worlds(farm, [4, 2, 3], seed, **SMALL_EPOCH)
    verdict = sample_audit.of_run(run)
    assert not verdict.faults, verdict.faults
    assert verdict.used == 40 * 12 and verdict.epochs == 4 and verdict.repeated > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(20))
def test_exactly_once_over_twenty_runs(farm: Farm, seed: int) -> None:
    verdict = sample_audit.of_run(through_worlds(farm, [4, 2, 3], 100 + seed, **SMALL_EPOCH))
    assert not verdict.faults and verdict.used == 40 * 12


def test_the_checker_of_samples_finds_a_repeated_a_missing_and_a_skipped_one() -> None:
    def line(step: int, ids: list[int], attempt: int = 1) -> dict[str, object]:
        return {"attempt": attempt, "step": step, "batch": 2, "samples": 4, "slots": [0, 1], "ids": ids}

    good = [line(0, [3, 1]), line(1, [0, 2]), line(2, [1, 0])]
    assert not sample_audit.check(good, {1: 0}).faults
    assert sample_audit.check([*good, line(1, [0, 2], attempt=2), line(2, [1, 0], attempt=2)], {1: 0, 2: 1}).repeated == 4
    assert "used 2 times" in str(sample_audit.check([line(0, [3, 1]), line(1, [1, 2])], {1: 0}).faults)
    assert "never used" in str(sample_audit.check([line(0, [3, 1]), line(1, [1, 2])], {1: 0}).faults)
    assert "never trained" in str(sample_audit.check([line(0, [3, 1]), line(2, [1, 0])], {1: 0}).faults)
    assert "resumed from 2" in str(sample_audit.check([*good, line(1, [0, 2], attempt=2)], {1: 0, 2: 2}).faults)
    torn = [line(0, [3, 1]), {**line(1, [0]), "slots": [0]}]
    assert "the batch has 2" in str(sample_audit.check(torn, {1: 0}).faults)


def test_another_precision_goes_on_from_the_same_weights_and_says_so(farm: Farm) -> None:
    run = farm.prepare(MAX_KILLED="0", PRECISION="bf16", CHECKPOINT_EVERY="16")

    def kill(farm: Farm, run: RunDir) -> None:
        assert saved(run, 16)
        farm.kill_all()

    farm.train(run, kill)
    before = directory.verify(directory.path_of(run.checkpoints, 16)).files
    change(run, ["PRECISION=fp32"], allow=False, executable="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 1)
        assert farm.train(run) == Exit.DONE, logs(run)
    assert "precision was bf16, now fp32" in logs(run)
    assert curve(run)[-1][0] == 40
    assert before and events(run, "resumed")[-1]["step"] >= 16


def test_a_changed_horizon_needs_an_explicit_word_at_the_command_and_at_the_start_of_training(farm: Farm) -> None:
    run = farm.finished(MAX_STEPS="8")
    text = run.job_yaml.read_text()
    for word in ("MAX_STEPS=16", "SEED=8", "BATCH_SIZE=24", "LR=0.1", "DATA=stdlib"):
        with pytest.raises(SettingError, match="--allow-change"):
            change(run, [word], allow=False, executable="python3")
    with pytest.raises(SettingError, match="keeps its model"):
        change(run, ["MODEL=124m"], allow=True, executable="python3")
    with pytest.raises(ImpossibleJobError, match="not divisible"):
        change(run, ["GPUS_PER_NODE=5"], allow=False, executable="python3")
    assert run.job_yaml.read_text() == text and not events(run, "changed")
    # By hand in job.yaml: training itself refuses.
    run.job_yaml.write_text(text.replace("max_steps: 8", "max_steps: 16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 1)
        assert farm.train(run) == Exit.IMPOSSIBLE
        assert "MAX_STEPS was 8, is now 16" in logs(run)
        run.job_yaml.write_text(text)
        change(run, ["MAX_STEPS=16"], allow=True, executable="python3")
        assert load(run.job_yaml).max_steps == 16
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 2)
        assert farm.train(run) == Exit.DONE, logs(run)
    assert curve(run)[-1][0] == 16


def test_data_that_changed_under_its_name_are_refused_unless_somebody_allowed_it(farm: Farm, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 20_000)
    write_tokens(tmp_path / "t.bin", tokens, 256)
    run = farm.finished(MAX_STEPS="8", DATA=f"tokens:{tmp_path / 't.bin'}", GPUS_PER_NODE="1")
    with pytest.MonkeyPatch.context() as patch:
        for number, (changed, said) in enumerate(((np.tile(tokens, 2), r"of 593 samples, is now .* of 1,187"), (tokens[::-1], "with content .*, is now"))):
            write_tokens(tmp_path / "t.bin", changed, 256)
            patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda number=number: 1 + number)
            assert farm.train(run) == Exit.IMPOSSIBLE
            assert re.search(rf"DATA was t\.bin\[train\] {said}", logs(run)), logs(run)
        change(run, [], allow=True, executable="python3")
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 3)
        assert farm.train(run) == Exit.DONE, logs(run)
    # A checkpoint of a version that did not write it down says nothing.
    state = state_dict.TrainStateRecord(8, 0, 7, 8, 12, AffineTokens(seq_len=8, vocab_size=16, split="train").name, "fp32", 1)
    assert "data" not in changes(state, load(run.job_yaml), AffineTokens(seq_len=8, vocab_size=16, split="train"), 1)


def test_a_change_is_allowed_from_the_checkpoints_that_were_there_and_from_no_later_one() -> None:
    data = {"data": ("t of 5 samples", "t of 6")}
    events: list[dict[str, Any]] = [
        {"event": "checkpoint", "step": 8},
        {"event": "changed", "allow": True, "changes": {"lr": [1, 2]}},
        {"event": "checkpoint", "step": 16},
    ]
    assert "DATA was t of 5 samples, is now t of 6" in (refusal(data, events[:1], 8) or "")
    # However often, also when the later one was damaged.
    assert refusal(data, events[:2], 8) is refusal(data, events, 8) is None
    # Data that changed once more since.
    assert refusal(data, events, 16)
    assert refusal({"seed": (1, 2)}, events, 8)


# --- stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_before_the_ranks_are_there_starts_none(farm: Farm, number: int) -> None:
    run = farm.prepare(MAX_STEPS="8")

    def asked(*arguments: Any) -> dict[str, str]:
        values = begin(*arguments)
        os.kill(os.getpid(), number)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.local.executor.begin", asked)
        assert farm.train(run) == Exit.REQUEUE
    assert [event["cause"] for event in events(run, "end")] == ["requeued"] and not events(run, "resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 1)
        assert farm.train(run) == Exit.DONE, logs(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_while_the_ranks_are_started_reaches_them(farm: Farm, number: int) -> None:
    run = farm.prepare(MAX_STEPS="100000", EVAL_EVERY="0", CHECKPOINT_EVERY="100000")

    def started(*arguments: Any) -> Any:
        ranks = farm.spawn(*arguments)
        assert at_step(run, 0)
        os.kill(os.getpid(), number)
        return ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.local.executor.spawn", started)
        assert farm.train(run) == Exit.REQUEUE, logs(run)
    assert [event["cause"] for event in events(run, "end")] == ["requeued"]


def test_a_second_and_a_third_signal_during_a_save_do_not_tear_it(farm: Farm) -> None:
    farm.before = "slow_disk"
    try:
        run = farm.prepare(MAX_STEPS="16")

        def ask(farm: Farm, run: RunDir) -> None:
            at_step(run, 10)
            for rank in farm.ranks:
                rank.send_signal(signal.SIGTERM)
            in_a_save(run)
            for number in (signal.SIGUSR2, signal.SIGTERM):
                time.sleep(0.2)
                for rank in farm.ranks:
                    rank.send_signal(number)

        farm.train(run, ask)
    finally:
        farm.before = None
    ends = events(run, "end")
    assert [end["cause"] for end in ends] == ["requeued", "finished"] and ends[0]["lost_steps"] == 0, logs(run)


def test_a_save_that_does_not_finish_before_the_kill_leaves_the_one_before(farm: Farm) -> None:
    farm.before = "slow_disk"
    try:
        run = farm.prepare(MAX_STEPS="24")

        def stop_and_kill(farm: Farm, run: RunDir) -> None:
            at_step(run, 12)
            for rank in farm.ranks:
                rank.send_signal(signal.SIGTERM)
            assert in_a_save(run)
            # The save of step 8 is in flight; the next one is begun by the stop. Slurm's KillWait is over in the middle of it.
            while not any(".tmp-1" in name and "00000008" not in name for name in os.listdir(run.checkpoints)):
                time.sleep(0.01)
            time.sleep(0.3)
            farm.kill_all()

        farm.train(run, stop_and_kill)
    finally:
        farm.before = None
    resumed = [event["step"] for event in events(run, "resumed")]
    assert resumed == [0, 8], logs(run)
    assert events(run, "end")[-1]["cause"] == "finished"


@pytest.mark.parametrize(("fault", "step"), [("data_that_hangs", 10), ("validation_data_that_hangs", 20), ("compilation_that_hangs", 0)])
def test_a_stop_is_heard_while_training_waits_for_samples_or_for_a_compilation(farm: Farm, fault: str, step: int) -> None:
    farm.before = fault
    try:
        run = farm.prepare()
        times: list[float] = []

        def ask(farm: Farm, run: RunDir) -> None:
            at_step(run, step)
            time.sleep(0.5)
            times.append(time.monotonic())
            for rank in farm.ranks:
                rank.send_signal(signal.SIGTERM)
            while not events(run, "end"):
                time.sleep(0.05)
            times.append(time.monotonic())

        farm.train(run, ask)
    finally:
        farm.before = None
    ends = events(run, "end")
    assert [end["cause"] for end in ends] == ["requeued", "finished"], logs(run)
    assert ends[0]["lost_steps"] == 0
    # A step boundary is there at once when only samples are missing; before the first step patience is 5 s.
    assert times[1] - times[0] < (3 if step else 9)
    assert weights_sha(run)


def test_an_unfinished_validation_is_finished_by_the_next_attempt_without_a_second_line(farm: Farm, tmp_path: Path) -> None:
    from train.metrics.logger import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20, "val_loss": 1}\n{"step": 30}\n')
    log = MetricsFile(path, 20, again=True)
    log.write(step=20, val_loss=2)
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 10}, {"step": 20, "val_loss": 2}]


def test_a_run_goes_from_ddp_to_fsdp_and_back_at_another_size_with_the_same_samples(farm: Farm) -> None:
    straight = farm.finished(LOG_SAMPLES="true")
    run = farm.prepare(MAX_KILLED="0", LOG_SAMPLES="true")
    farm.before = "small_files"
    for index, words in enumerate((["PARALLEL=fsdp"], ["PARALLEL=fsdp", "GPUS_PER_NODE=3"], ["PARALLEL=ddp", "GPUS_PER_NODE=2"])):

        def kill(farm: Farm, run: RunDir, attempt: int = index + 1) -> None:
            assert at_step(run, 0, attempt)
            begun = int(run.attempt(attempt).progress.read_text())
            assert saved(run, begun + 8)
            farm.kill_all()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda pid=index: 100_000 + pid)
            farm.train(run, kill)
        change(run, words, allow=False, executable="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 200_000)
        assert farm.train(run) == Exit.DONE, logs(run)
    farm.before = None
    assert len(directory.verify(directory.complete(run.checkpoints)[0]).of_kind("optimizer")) > 2
    assert [event["step"] > 0 for event in events(run, "resumed")] == [False, True, True, True], logs(run)
    assert not sample_audit.of_run(run).faults and order_of(run) == order_of(straight)
    for ours, theirs in zip(curve(run), curve(straight), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_killed_also_inside_saves_ends_with_identical_bits(farm: Farm) -> None:
    straight = farm.finished(PARALLEL="fsdp")
    run = farm.prepare(PARALLEL="fsdp")
    assert farm.train(run, killer(4, seed=2, torn=[])) == Exit.DONE, logs(run)
    assert curve(run) == curve(straight)
    ours, theirs = (directory.verify(directory.complete(which.checkpoints)[0]).files for which in (run, straight))
    assert ours.keys() == theirs.keys() and len(ours) == 4
    assert all(ours[name].sha256 == theirs[name].sha256 for name in ours)


def test_the_resume_command_takes_settings_and_the_run_goes_on_with_them(farm: Farm, capfd: pytest.CaptureFixture[str]) -> None:
    from launcher.cli.app import run_app
    from launcher.status.lookup import split_run_words

    run = farm.prepare(MAX_KILLED="0")

    def kill(farm: Farm, run: RunDir) -> None:
        assert saved(run, 16)
        farm.kill_all()

    farm.train(run, kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 300_000)
        assert run_app(["resume", str(run.path), "SEED=3", "--local"]) == Exit.USAGE
        assert "--allow-change" in capfd.readouterr().err
        assert run_app(["resume", str(run.path), "GPUS_PER_NODE=1", "CHECKPOINT_EVERY=10", "--local"]) == Exit.DONE, logs(run)
    out = capfd.readouterr().out
    assert "changed: " in out and "GPUS_PER_NODE 2 -> 1" in out and "MICRO_BATCH_SIZE 6 -> 12" in out
    assert "--ntasks-per-node=1" in run.script.read_text()
    assert json.loads(run.origins.read_text())["gpus_per_node"] == "holdfast resume"
    assert [event["step"] for event in events(run, "checkpoint")][-2:] == [30, 40]
    assert split_run_words(["abcd", "RUNS_DIR=x", "--precision", "fp32", "RUN=y", "NODES=1"], {}) == (
        ["abcd", "RUNS_DIR=x", "RUN=y"],
        ["--precision", "fp32", "NODES=1"],
    )
