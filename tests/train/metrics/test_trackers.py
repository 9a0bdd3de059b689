"""Trackers: one run to them however many attempts there were, and never a reason for training to stop or to wait."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from training import Farm, curve, events, farm, logs  # noqa: F401

from jobs.config.resolver import resolve
from jobs.config.settings import Job
from jobs.core.errors import SettingError
from jobs.run.rundir import RunDir
from launcher.attempt.watchdog import suspects
from slurm import site_file
from train.metrics import tracking
from train.metrics.tracking import Trackers, chosen


def resolved(*words: str) -> Job:
    return resolve(words, {}, Path.cwd(), lambda word: site_file.find(word, Path.cwd())).job


def scalars(run: RunDir, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them: over all files of the run, purged as its own reader purges."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


@pytest.mark.parametrize(("words", "expected"), [((), ("auto",)), (("TRACKERS=none",), ()), (("--trackers", "tensorboard,wandb"), ("tensorboard", "wandb"))])
def test_trackers_are_named_by_a_setting(words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert resolved(*words).trackers == expected


@pytest.mark.parametrize(("word", "said"), [("tensorbord", "Did you mean 'tensorboard'?"), ("wandb,notes", "'notes'"), ("auto,wandb", "auto beside others")])
def test_an_unknown_tracker_is_refused_with_the_nearest(word: str, said: str) -> None:
    with pytest.raises(SettingError, match="TRACKERS") as refused:
        resolved(f"TRACKERS={word}")
    assert said in str(refused.value)


def test_the_default_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object() if name == "tensorboard" else None)
    assert chosen(Job()) == ("tensorboard",)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert chosen(Job()) == ()
    assert chosen(Job(trackers=("wandb",))) == ("wandb",)


def test_tensorboard_shows_each_step_once_after_a_fault_and_training_is_the_same(farm: Farm) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    same = {"LOG_EVERY": "1", "DATA": "faults:build"}
    plain = farm.finished(TRACKERS="none", **same)
    # Four steps beyond the checkpoint of step 8 are logged, and logged again by the second attempt.
    run = farm.finished(TRACKERS="tensorboard", NODE_ENV="FAULT=raise:12:0", MAX_CODE_ERROR="1", ASYNC_SAVE="false", **same)
    assert len(events(run, "start")) == 2, logs(run)
    assert len(list(run.tensorboard.glob("events.*"))) == 2
    assert curve(run) == curve(plain)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for name in ("loss", "val_loss", "lr"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        assert scalars(run, name) == expected, name
    assert not plain.tensorboard.exists()


def test_a_tracker_that_cannot_start_costs_one_warning(farm: Farm) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    run = farm.prepare(TRACKERS="tensorboard")
    run.tensorboard.write_text("in the way")
    farm.train(run)
    text = logs(run)
    assert "ended: finished" in text or events(run, "end")[-1]["cause"] == "finished", text
    assert text.count("tracker tensorboard is off from here") == 1


def test_wandb_is_offline_with_the_id_of_the_run_unless_the_user_says_otherwise(farm: Farm) -> None:  # noqa: F811
    pytest.importorskip("wandb")
    run = farm.prepare(TRACKERS="wandb", GPUS_PER_NODE="1")
    farm.train(run)
    (folder,) = run.wandb.glob("offline-run-*")
    assert folder.name.endswith(f"-{run.id}") and (folder / f"run-{run.id}.wandb").stat().st_size > 0
    assert f"wandb sync {run.wandb}/offline-run-*" in logs(run) and "WARNING" not in logs(run)


def test_wandb_gets_the_same_run_at_every_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    run = RunDir(tmp_path / "gpt-a2b3")
    first, later = (Trackers(Job(job_name="gpt", trackers=(), node_env={"A_B": "hidden"}), run, kept, print)._wandb() for kept in (0, 120))
    assert first["id"] == later["id"] == "gpt-a2b3" and first["resume"] == later["resume"] == "allow"
    assert "hidden" not in json.dumps(first["config"])


class Fake:
    """A tracker as Accelerate has them, that does what the test wants."""

    requires_logging_directory = False
    made: list["Fake"] = []

    def __init__(self, run_name: str):
        self.run_name, self.lines, self.finished = run_name, [], False
        Fake.made.append(self)

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *kinds: type[Fake]) -> tuple[Trackers, list[str]]:
    names = ("mlflow", "aim")[: len(kinds)]
    for name, kind in zip(names, kinds, strict=True):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setenv("SOME_API_KEY", "k3y-that-nobody-may-see")
    said: list[str] = []
    return Trackers(Job(job_name="gpt", trackers=names), RunDir(tmp_path / "gpt-a2b3"), 0, said.append), said


LINE = {"step": 10, "loss": 2.5, "attempt": 1, "time": 1.0}


def test_each_line_reaches_a_tracker_of_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trackers, said = used(monkeypatch, tmp_path, Fake)
    for step in (10, 20):
        trackers.log({**LINE, "step": step})
    trackers.close(stopped=False)
    (fake,) = Fake.made
    assert fake.run_name == "gpt-a2b3" and fake.lines == [(10, {"loss": 2.5}), (20, {"loss": 2.5})] and fake.finished and not said
    assert fake.config["batch_size"] == Job().batch_size


@pytest.mark.parametrize("where", ["__init__", "start", "log", "finish"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit("wandb: no key k3y-that-nobody-may-see"), ModuleNotFoundError("No module named 'mlflow'")]
)
def test_a_failing_tracker_warns_once_and_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, error: BaseException) -> None:
    def fail(self: Fake, *words: Any, **more: Any) -> None:
        raise error

    trackers, said = used(monkeypatch, tmp_path, type("Failing", (Fake,), {where: fail}), Fake)
    for step in range(1, 30):
        trackers.log({**LINE, "step": step})
    trackers.close(stopped=False)
    assert len(said) == 1 and "mlflow is off from here" in said[0] and "k3y" not in said[0], said
    assert len(Fake.made[-1].lines) == 29 and Fake.made[-1].finished


def test_a_tracker_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "_STOP_S", 0.2)
    trackers, said = used(monkeypatch, tmp_path, type("Hanging", (Fake,), {"start": lambda self: time.sleep(600)}))
    begun = time.monotonic()
    for step in range(3 * tracking._MOST_WAITING):
        trackers.log({**LINE, "step": step})
    trackers.close(stopped=True)
    assert time.monotonic() - begun < 60  # hours of lines, while the tracker sleeps for ten minutes
    assert len(said) == 1 and "cannot keep up" in said[0]


def test_without_trackers_nothing_is_imported_and_no_thread_started(tmp_path: Path) -> None:
    before = set(sys.modules)
    trackers = Trackers(Job(trackers=()), RunDir(tmp_path), 0, print)
    trackers.log(LINE)
    trackers.close(stopped=False)
    assert trackers._thread is None and not {name for name in set(sys.modules) - before if "wandb" in name or "tensorboard" in name}


def test_the_threads_of_trackers_make_nobody_suspect_of_a_hang() -> None:
    def thread(word: str, *frames: str) -> str:
        return f"{word} 0x00007f01 (most recent call first):\n" + "".join(
            f'  File "{file}", line 3 in {name}\n' for file, name in (frame.split(":") for frame in frames)
        )

    training = thread("Current thread", "/r/code/train/train_step.py:all_reduce", "/r/code/train/trainer.py:train")
    ours = thread("Thread", "/usr/lib/python3.11/socket.py:sendall", "/v/site-packages/wandb/sdk/wandb_run.py:log", "/r/code/train/metrics/tracking.py:_work")
    theirs = thread("Thread", "/v/site-packages/tensorboard/summary/writer/event_file_writer.py:_run")
    busy = thread("Current thread", "/r/code/train/data/loader.py:crunch", "/r/code/train/trainer.py:train")
    assert suspects({0: ours + theirs + training, 1: training}, 2).ranks == ()
    assert suspects({0: ours + theirs + training, 1: busy}, 2).ranks == (1,)
    assert suspects({0: ours + theirs + busy, 1: training}, 2).ranks == (0,)
