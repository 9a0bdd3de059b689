"""The frozen code is what the working tree has: nothing is missing in it silently, and no other run lies in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.core.errors import SettingError
from jobs.run.rundir import RunDir
from launcher.submission import snapshot
from launcher.submission.create_run import prepare, resolve_here


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


def test_what_submodules_hold_and_links_to_folders_are_frozen_and_kept_by_a_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = project(tmp_path / "p")
    git(project(tmp_path / "inner"), "submodule", "add", str(project(tmp_path / "innermost")), "deep")
    git(tmp_path / "inner", "commit", "-m", "x")
    git(here, "submodule", "add", str(tmp_path / "inner"), "vendor/inner")
    git(here, "submodule", "update", "--init", "--recursive")
    (here / "vendor/inner/deep/new.py").touch()
    (here / "vendor/inner/deep/.env").touch()
    (here / "settings").symlink_to("conf")
    (here / "conf/back").symlink_to("../vendor/inner")
    git(here, "add", ".")
    run = frozen(here)
    inner = {f"vendor/inner/{at}{name}" for at in ("", "deep/") for name in ("mine.py", "conf/job.yaml")}
    assert code_of(run) - {".gitmodules", "vendor/inner/.gitmodules"} == {
        "mine.py", "conf/job.yaml", "conf/back", "settings", *inner, "vendor/inner/deep/new.py"
    }  # fmt: skip
    assert (run.code / "settings/back/deep/mine.py").is_file() and (run.code / "settings").readlink() == Path("conf")
    said = capsys.readouterr().err
    assert "secrets may stand there: vendor/inner/deep/.env" in said and "not copied with the code: " not in said
    again = RunDir(tmp_path / "again")
    again.path.mkdir()
    snapshot.freeze_again(again, run)
    assert code_of(again) == code_of(run) and snapshot.sums_of(again.code) == snapshot.read_sums(run)
    (run.code / "settings").unlink()
    (run.code / "settings").symlink_to("vendor")
    with pytest.raises(SettingError, match="was changed since it was submitted .settings"):
        snapshot.freeze_again(RunDir(tmp_path / "third"), run)


def test_whatever_git_has_and_the_frozen_code_has_not_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = project(tmp_path / "p")
    git(here, "submodule", "add", str(project(tmp_path / "inner")), "empty")
    git(here, "submodule", "deinit", "-f", "empty")
    (here / ".gitignore").write_text("big/\n")
    (here / "big").mkdir()
    for name, target in {"ignored": "big", "via": "ignored", "data": str(tmp_path), "up": "..", "nowhere": "nothing"}.items():
        (here / name).symlink_to(target)
    (here / "runs").mkdir()
    for name in ("kept.py", ".gitkeep"):
        (here / "runs" / name).touch()
    git(here, "add", ".")
    (here / "conf" / "job.yaml").unlink()
    project(here / "clone")
    run = frozen(here)
    assert code_of(run) == {"mine.py", ".gitignore", ".gitmodules"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not copied with the code: ")]
    assert set(line.removeprefix("not copied with the code: ").removesuffix(".").split(", ")) == {
        *(f"{name} (a link to what is not frozen)" for name in ("ignored", "via", "data", "up", "nowhere")),
        "runs/kept.py (lies in RUNS_DIR)", "empty (a submodule that is not there; git submodule update --init)",
        "clone (a repository of its own; CODE_INCLUDE=clone copies it)",
    }  # fmt: skip
    included = code_of(frozen(here, "CODE_INCLUDE=clone"))
    assert "clone/mine.py" in included and not [path for path in included if "clone/.git/" in path]
    assert "(a repository" not in capsys.readouterr().err
