"""Runs of real training on this machine for the tests: prepared, started, killed and resumed in some tenths of a second."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, REPOSITORY, SMALL, weights_sha

from jobs.checkpoint import directory
from jobs.core.contract import Exit, RankEnv
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.local import executor
from launcher.submission.create_run import prepare, resolve_here

# Smaller than what the Slurm tests train: here it is saved and killed much more often.
TINY = {**SMALL, "MODEL_OPTIONS": "n_layers=1,d_model=32,n_heads=2,d_ff=64", "SEQ_LEN": "32", "BATCH_SIZE": "12", "MAX_STEPS": "40", "EVAL_EVERY": "20",
        "EVAL_SAMPLES": "16", "CHECKPOINT_EVERY": "8", "DATA": "synthetic", "NODES": "1", "GPUS_PER_NODE": "2", "DEVICE": "cpu", "MAX_KILLED": "99", "MAX_NO_PROGRESS": "99"}  # fmt: skip


class Rank:
    """A forked rank, with as much of Popen as launcher.local.executor uses."""

    def __init__(self, farm: "Farm", pid: int):
        self._farm, self.pid, self.returncode = farm, pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._farm.ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that ranks are forked from: `tests/support/zygote.py`, which has imported what training needs."""

    def __init__(self) -> None:
        self.environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))], env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


class Farm:
    """Runs that live in one folder, whose ranks are forked. Without a zygote it makes one of its own."""

    def __init__(self, root: Path, zygote: Zygote | None = None):
        self.root = root
        self._zygote = zygote or Zygote()
        self._is_own = zygote is None
        self.ranks: list[Rank] = []
        self.before: str | None = None

    def ask(self, request: dict[str, Any]) -> Any:
        return self._zygote.ask(request)

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
        if self._is_own:
            self._zygote.close()

    def spawn(self, job: Any, run: RunDir, environ: dict[str, str], foreground: bool) -> list[Rank]:
        """In place of launcher.local.executor.spawn."""
        self.ranks = []
        for rank in range(job.world_size):
            env = {
                **environ,
                RankEnv.RANK: str(rank),
                RankEnv.WORLD_SIZE: str(job.world_size),
                RankEnv.LOCAL_RANK: str(rank),
                RankEnv.LOCAL_WORLD_SIZE: str(job.world_size),
                "MASTER_ADDR": "127.0.0.1",
            }
            # Only what differs from the environment that the fork has already.
            env = {name: value for name, value in env.items() if self._zygote.environ.get(name) != value}
            log = str(run.log(environ["HOLDFAST_JOB_ID"], rank))
            self.ranks.append(Rank(self, self.ask({"spawn": {"env": env, "cwd": str(REPOSITORY), "log": log, "before": self.before}})))
        return self.ranks

    def prepare(self, **settings: str) -> RunDir:
        words = [f"{key}={value}" for key, value in {**TINY, "RUNS_DIR": str(self.root), **settings}.items()]
        return prepare(resolve_here(words, {}, REPOSITORY), REPOSITORY, sys.executable)[0]

    def train(self, run: RunDir, kill: Callable[["Farm", RunDir], None] | None = None) -> Exit:
        """Attempts until the run is over. `kill` runs beside them in a thread."""
        thread = threading.Thread(target=kill, args=(self, run), daemon=True) if kill else None
        if thread:
            thread.start()
        code = executor.run_attempts(run, {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")})
        if thread:
            thread.join(20)
        return code

    def finished(self, **settings: str) -> RunDir:
        run = self.prepare(**settings)
        code = self.train(run)
        assert code == Exit.DONE, logs(run)
        return run

    def kill_all(self) -> None:
        for rank in list(self.ranks):
            rank.kill()


def logs(run: RunDir) -> str:
    files = [run.ledger, *sorted(run.logs.glob("*.out"))]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files if path.exists())


def at_step(run: RunDir, step: int, attempt: int = 1, seconds: float = 60) -> bool:
    limit = time.monotonic() + PATIENCE * seconds
    while time.monotonic() < limit:
        try:
            if int(run.attempt(attempt).progress.read_text()) >= step:
                return True
        except (OSError, ValueError):
            pass
        time.sleep(0.002)
    return False


def saved(run: RunDir, step: int, seconds: float = 60) -> bool:
    """Waits until the checkpoint of a step, or a later one, has its final name: saves run behind training."""
    limit = time.monotonic() + PATIENCE * seconds
    while time.monotonic() < limit:
        if any((directory.step_of(path) or 0) >= step for path in directory.complete(run.checkpoints)):
            return True
        time.sleep(0.005)
    return False


def in_a_save(run: RunDir, seconds: float = 20) -> bool:
    """Waits until a staging folder is there."""
    limit = time.monotonic() + PATIENCE * seconds
    while time.monotonic() < limit:
        try:
            if any(name.startswith(".step-") for name in os.listdir(run.checkpoints)):
                return True
        except OSError:
            pass
    return False


def curve(run: RunDir) -> list[tuple[int, float, float | None]]:
    return [(line["step"], line["loss"], line.get("val_loss")) for line in map(json.loads, run.metrics.read_text().splitlines())]


def events(run: RunDir, word: str) -> list[dict[str, Any]]:
    return [event for event in event_log.read(run.ledger) if event["event"] == word]


def result(run: RunDir) -> tuple[str, list[tuple[int, float, float | None]]]:
    return weights_sha(run), curve(run)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Farm]:
    here = Farm(tmp_path_factory.mktemp("runs"), zygote)
    before = executor.spawn
    executor.spawn = here.spawn  # type: ignore[assignment]
    try:
        yield here
    finally:
        executor.spawn = before
        here.close()
