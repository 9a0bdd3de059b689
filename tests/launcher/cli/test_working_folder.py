"""Commands execute no module that another user put into the working folder. A second user id plants them."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from colleague import REPOSITORY, Users, needs_two_users, two_users

pytestmark = needs_two_users
HOLDFAST = (sys.executable, "-P", "-m", "launcher.cli.app")
# Of Python, installed, of holdfast; loaded early and late.
_NAMES = ("json", "runpy", "argparse", "typing", "numpy", "torch", "yaml", "submitit", "launcher", "train", "jobs", "slurm")


@pytest.fixture
def mine() -> Iterator[Users]:
    with two_users(owner=os.geteuid()) as made:
        yield made


@pytest.fixture
def victim(mine: Users) -> Path:
    """What a planted module creates if the owner imports it."""
    path = mine.private / "EXECUTED"
    text = f"import pathlib; pathlib.Path('{path}').touch()"
    mine.plant('for name in $N; do printf "%s\\n" "$P" >"$S/$name.py"; done', N=Path(" ".join(_NAMES)), P=Path(text), S=mine.shared)
    return path


def _run(mine: Users, *command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return mine.owner(*command, cwd=mine.shared, env=env, timeout=300)


@pytest.mark.parametrize("path", ["", ":", "."], ids=["plain", "empty entry", "working folder"])
def test_data_build_imports_nothing_from_the_working_folder(mine: Users, victim: Path, path: str) -> None:
    """PYTHONPATH with an empty entry, as `PYTHONPATH=$PYTHONPATH:DIR` makes it, means the working folder."""
    (mine.private / "a.txt").write_text("some text\n" * 200)
    out = mine.private / "tokens"
    done = _run(mine, *HOLDFAST, "data", "build", f"{mine.private}/a.txt", f"--out={out}")
    assert not victim.exists(), "a planted module was executed"
    assert done.returncode == 0 and (out / "train.bin").exists(), done.stdout + done.stderr
    if path:
        program = f"from launcher import subprocesses; import os; os.execvpe({sys.executable!r}, subprocesses.command('train.data.build', '--help'), {{**os.environ, 'PYTHONPATH': {path!r}}})"
        done = _run(mine, sys.executable, "-P", "-c", program)
        assert not victim.exists(), "a planted module was executed"
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("module", ["train.checkpoint.export", "train.bench", "train.precision.check", "launcher.sweeps.pruner"])
@pytest.mark.parametrize("user_code", [False, True])
def test_modules_that_commands_start_import_nothing_from_the_working_folder(mine: Users, victim: Path, module: str, user_code: bool) -> None:
    """`ckpt export`, `precision`, `verify autocast` and the pruner; those that want the user's code search the folder last."""
    start = f"import os, inspect; from launcher import subprocesses as s; more = {{'user_code': {user_code}}} if 'user_code' in inspect.signature(s.command).parameters else {{}}"
    program = f"{start}; c = s.command({module!r}, '--help', **more); os.execv(c[0], c)"
    done = _run(mine, sys.executable, "-P", "-c", program)
    assert not victim.exists(), "a planted module was executed"
    assert done.returncode == 0 or module == "launcher.sweeps.pruner", done.stderr


@pytest.mark.trains
def test_verify_autocast_finds_a_model_in_the_working_folder(mine: Users, victim: Path) -> None:
    text = (REPOSITORY / "tests" / "support" / "models" / "overflowing.py").read_text()
    (mine.shared / "mine.py").write_text(text)
    done = _run(mine, *HOLDFAST, "verify", "autocast", "mine:build", "--json", "DEVICE=cpu", XDG_CACHE_HOME=str(mine.private))
    assert not victim.exists(), "a planted module was executed"
    assert "Explode" in done.stdout, done.stdout + done.stderr


@pytest.mark.trains
def test_local_submission_imports_nothing_from_the_working_folder(mine: Users, victim: Path) -> None:
    (mine.shared / "fit.py").write_text(f"import pathlib; pathlib.Path('{mine.private}/own').touch()\n")
    words = ("ENTRY=fit.py", "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1", f"RUNS_DIR={mine.private}/runs", "--wait")
    done = _run(mine, *HOLDFAST, "submit", "--local", *words)
    assert not victim.exists(), "a planted module was executed"
    assert done.returncode == 0 and (mine.private / "own").exists(), done.stdout + done.stderr


def test_completion_imports_nothing_from_the_working_folder(mine: Users, victim: Path) -> None:
    script = _run(mine, *HOLDFAST, "completion", "bash").stdout
    line = next(line for line in script.splitlines() if "launcher.cli.app" in line)
    command = shlex.split(line[line.index(sys.executable) :])
    done = _run(mine, *command[: command.index("launcher.cli.app") + 1], "completion", "--line", "holdfast ")
    assert not victim.exists(), "a planted module was executed"
    assert "No module named" not in done.stderr, done.stderr


def test_job_by_hand_imports_nothing_from_the_working_folder(mine: Users, victim: Path) -> None:
    (mine.shared / "fit.py").write_text("")
    (mine.private / "train.sbatch").write_text((REPOSITORY / "slurm" / "train.sbatch").read_text())
    job = {
        "SLURM_JOB_ID": "77",
        "RUNS_DIR": str(mine.private / "runs"),
        "ENTRY": "fit.py",
        "DEVICE": "cpu",
        "JOB_NAME": "own",
        "HOLDFAST_PYTHON": sys.executable,
    }
    (mine.private / "stop.sh").write_text("exit 0\n")
    done = _run(mine, "bash", str(mine.private / "train.sbatch"), SETUP_SCRIPT=str(mine.private / "stop.sh"), SLURM_CONF="/nonexistent", **job)
    assert not victim.exists(), "a planted module was executed"
    assert (mine.private / "runs" / "own-j77" / "submit.sbatch").exists(), done.stdout + done.stderr


def test_frozen_code_is_imported_whatever_the_shell_exports(mine: Users) -> None:
    """PYTHONSAFEPATH takes the working directory, where the frozen code of a run is, from the path."""
    project = mine.private / "project"
    project.mkdir()
    (project / "fit.py").write_text("import os, pathlib, sys; assert 'PYTHONSAFEPATH' not in os.environ; pathlib.Path(sys.path[0], 'own').touch()\n")
    words = ("ENTRY=fit.py", "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1", "RUN_ID=r1", "JOB_NAME=own", f"RUNS_DIR={mine.private}/runs")
    done = mine.owner(*HOLDFAST, "run", *words, cwd=project, env={"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
