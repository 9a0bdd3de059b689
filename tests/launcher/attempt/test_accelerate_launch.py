"""The process that runs accelerate launch on a node: its words, its signals, its exit code (the lab test is in test_slurm_runs.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, until

from jobs.config.settings import Job
from jobs.config.validation import check
from jobs.core.contract import Exit
from launcher.attempt.rendezvous import free_port
from train.distributed.accelerate_launcher import launch_words

WHERE = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "20007"}


def test_the_words_name_every_machine_its_rank_and_the_meeting_place() -> None:
    words = launch_words(["-m", "train", "--run-dir", "/r"], nodes=2, per_node=8, node=1, config=None, environ=WHERE)
    text = " ".join(words)
    assert "--num_machines 2 --num_processes 16 --machine_rank 1" in text and "--main_process_ip gpu1 --main_process_port 20007" in text
    assert text.endswith("--multi_gpu --module train --run-dir /r") and "--mixed_precision no" in text
    assert "--multi_gpu" not in launch_words(["a.py"], nodes=1, per_node=1, node=0, config=None, environ=WHERE)
    own = launch_words(["my/train.py", "--x", "1"], nodes=2, per_node=8, node=0, config="zero3.yaml", environ=WHERE)
    assert own[-5:] == ["--config_file", "zero3.yaml", "my/train.py", "--x", "1"] and "--mixed_precision" not in own


def test_a_config_file_is_for_a_script_of_ones_own() -> None:
    for settings in ({"launch": "accelerate"}, {"entry": "a.py"}):
        (problem,) = check(Job(job_name="a", accelerate_config="c.yaml", **settings), {})[0]  # type: ignore[arg-type]
        assert "LAUNCH=accelerate and ENTRY" in problem
    assert not check(Job(job_name="a", accelerate_config="c.yaml", launch="accelerate", entry="a.py"), {})[0]


def start(folder: Path, script: str, per_node: int) -> "subprocess.Popen[str]":
    (folder / "own.py").write_text(script)
    env = {
        **os.environ,
        "HOLDFAST_RUN_DIR": str(folder),
        "HOLDFAST_ATTEMPT": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(Path.cwd(), str(os.getpid()), per_node)),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("RANK", None)
    command = [
        sys.executable,
        "-m",
        "train.distributed.accelerate_launcher",
        "--nodes",
        "1",
        "--per-node",
        str(per_node),
        "--peer-wait",
        "20",
        "--",
        str(folder / "own.py"),
    ]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


WAITS = """
import os, pathlib, signal, sys, time
heard = []
signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
place = pathlib.Path(os.environ["HOLDFAST_RUN_DIR"])
(place / f"ready.{os.environ['RANK']}").touch()
while not heard:
    time.sleep(0.05)
time.sleep(0.5)
(place / f"saved.{os.environ['RANK']}").write_text(str(len(heard)))
# As ranks that save together do: the first that leaves makes accelerate end the others (TERM), saved or not.
end = time.monotonic() + 30
while len(list(place.glob("saved.*"))) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(75)
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_warning_reaches_every_rank_once_and_their_code_is_the_nodes(tmp_path: Path, ranks: int) -> None:
    node = start(tmp_path, WAITS, ranks)
    try:
        until(lambda: len(list(tmp_path.glob("ready.*"))) == ranks or node.poll() is not None, 80, "the ranks")
        node.send_signal(signal.SIGUSR2)
        said, _ = node.communicate(timeout=60)
        assert node.returncode == Exit.REQUEUE, said
        assert [path.read_text() for path in tmp_path.glob("saved.*")] == ["1"] * ranks
    finally:
        node.kill()


@pytest.mark.timeout(900)
def test_a_rank_that_is_killed_ends_the_node_with_its_signal(tmp_path: Path) -> None:
    node = start(tmp_path, "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n", 2)
    try:
        begun = time.monotonic()
        said, _ = node.communicate(timeout=100)
        assert node.returncode == 128 + signal.SIGKILL, said
        assert time.monotonic() - begun < 55  # the other one was not waited for
    finally:
        node.kill()
