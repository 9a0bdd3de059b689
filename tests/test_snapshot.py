"""The frozen code is what the working tree has: nothing is missing in it silently, and no other run lies in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.rundir import RunDir
from launcher.prepare import prepare, resolve_here


def git(cwd: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", *words], cwd=cwd, check=True, capture_output=True)


def project(folder: Path) -> Path:
    (folder / "conf").mkdir(parents=True)
    (folder / "mine.py").write_text("print('mine')\n")
    (folder / "conf" / "job.yaml").write_text("lr: 0.1\n")
    git(folder, "init")
    git(folder, "add", "."), git(folder, "commit", "-m", "x")
    return folder


def frozen(here: Path, *words: str) -> RunDir:
    return prepare(resolve_here(["ENTRY=mine.py", "DEVICE=cpu", *words], {}, here), here, sys.executable)[0]


def code_of(run: RunDir) -> set[str]:
    """What lies in the frozen code, without what is holdfast's."""
    paths = (path.relative_to(run.code) for path in run.code.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.as_posix() for path in paths if path.parts[0] not in ("jobs", "slurm", "launcher", "train", "holdfast.py")}


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("runs_dir", [".", "..", "../.."])
def test_a_runs_directory_around_the_tree_keeps_runs_out_of_the_code_and_nothing_else(tmp_path: Path, runs_dir: str, tracked: bool) -> None:
    here = project(tmp_path / "a" / "b")
    (here / ".staging-x-1").mkdir()
    (here / ".staging-x-1" / "half.py").touch()
    include = ()
    if not tracked:
        subprocess.run(["rm", "-rf", here / ".git"], check=True)
        include = ("CODE_INCLUDE=.",)
    wanted = {"mine.py", "conf/job.yaml"} | (set() if runs_dir == "." else {".staging-x-1/half.py"})
    for _ in range(2):
        assert code_of(frozen(here, f"RUNS_DIR={runs_dir}", *include)) == wanted


def test_runs_are_kept_out_of_the_code_also_where_the_folder_is_reached_by_a_link(tmp_path: Path) -> None:
    project(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        assert code_of(frozen(tmp_path / "link")) == {"mine.py", "conf/job.yaml"}
