"""A reader that closes its pipe early changes neither what a command does nor its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from launcher import subprocesses

# Each prints something, on one of the two streams at least.
COMMANDS = [
    ("explain", 0),
    ("explain --json", 0),
    ("render", 0),
    ("--help", 0),
    ("--version", 0),
    ("completion bash", 0),
    ("status", 0),
    ("sweep show nothing-here", 2),
    ("logs nothing-here", 2),
    ("render PRECISON=x", 2),
    ("submit LR=-1", 2),
    ("no-such-command", 2),
]


def code_without_reader(command: list[str], streams: str, cwd: Path, env: dict[str, str], unbuffered: bool) -> tuple[int, str]:
    """Exit code and what was on the open stream, where the pipe of `streams` has no reader from the start."""
    read, write = os.pipe()
    os.close(read)
    try:
        out, err = (write if name in streams else subprocess.PIPE for name in ("out", "err"))
        variables = {**env, **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})}
        done = subprocess.run(command, stdout=out, stderr=err, cwd=cwd, env=variables, text=True, timeout=120)
    finally:
        os.close(write)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.parametrize(("words", "code"), COMMANDS)
def test_closed_pipe_keeps_exit_code(words: str, code: int, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOLDFAST_RUNS_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for streams in ("out", "err", "out err"):
        for unbuffered in (False, True):
            found, text = code_without_reader([sys.executable, "-m", "launcher.cli.app", *words.split()], streams, tmp_path, env, unbuffered)
            assert found == code, (streams, unbuffered, text)
            assert "Broken" not in text and "Exception ignored" not in text


def test_closed_pipe_of_completion(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path)}
    words = ["completion", "--line", "holdfast "]
    assert code_without_reader([sys.executable, "-m", "launcher.cli.app", *words], "out", REPOSITORY, env, False) == (0, "")


def test_closed_pipe_of_modules_that_a_command_starts(tmp_path: Path) -> None:
    """`holdfast ckpt export` and others run train.* with their own output."""
    command = subprocesses.command("train.checkpoint.export", "--help")
    assert code_without_reader(command, "out", tmp_path, dict(os.environ), False) == (0, "")


def test_full_disk_is_reported() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "launcher.cli.app", "explain"], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.trains
def test_training_in_the_foreground_outlives_its_reader(tmp_path: Path) -> None:
    """The log of the run is complete, too."""
    settings = "MODEL=nano DEVICE=cpu NODES=1 GPUS_PER_NODE=1 SEQ_LEN=16 BATCH_SIZE=2 MAX_STEPS=3 EVAL_EVERY=3 CHECKPOINT_EVERY=3"
    command = [sys.executable, "-m", "launcher.cli.app", "run", *settings.split(), f"RUNS_DIR={tmp_path}"]
    code, text = code_without_reader(command, "out", REPOSITORY, {**os.environ, "OMP_NUM_THREADS": "1"}, False)
    assert code == 0, text
    (log,) = tmp_path.glob("*/logs/*.0.out")
    assert "finished" in (log.parents[1] / "ledger.jsonl").read_text() and "3" in log.read_text()
