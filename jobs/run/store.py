"""The runs of a folder: how one comes into being, is found again by a word for it, and is taken away."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from jobs.core.errors import NotFoundError, SettingError
from jobs.run import permissions
from jobs.run.rundir import RunDir

_ID_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
STAGING, TRASH = ".staging-", ".trash-"


def new_id() -> str:
    """Four letters and digits that are hard to misread: 810,000 ids."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(4))


def place(runs_dir: Path, job_name: str, run_id: str) -> RunDir:
    """Where a run of this name and id lives."""
    return RunDir(Path(os.path.abspath(runs_dir)) / f"{job_name}-{run_id}")


def stage(final: RunDir) -> RunDir:
    """An empty directory beside `final` to prepare the run in; `publish` gives it its name.

    Raises SettingError when the runs directory cannot be written."""
    staging = final.path.parent / f"{STAGING}{final.path.name}-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
        permissions.close_new_directory(staging)
    except OSError as err:
        raise SettingError(f"RUNS_DIR {str(final.path.parent)!r} cannot be written: {err.strerror}. Choose another with RUNS_DIR=...") from err
    return RunDir(staging)


def publish(staging: RunDir, final: RunDir) -> None:
    """Gives a staged directory its final name. Raises SettingError when that name is taken."""
    try:
        os.rename(staging.path, final.path)
    except OSError as err:
        shutil.rmtree(staging.path, ignore_errors=True)
        raise SettingError(f"run directory {final.path} cannot be made: {err.strerror}") from err


def discard(run: RunDir, with_parent: bool = False) -> None:
    """Takes a run directory away: renamed first, so that no half-deleted run is ever found under its name.

    `with_parent` also takes the runs directory, if nothing else is in it."""
    doomed = run.path.parent / f"{STAGING}{run.path.name}-{secrets.token_hex(4)}"
    try:
        os.rename(run.path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)
    if with_parent:
        with contextlib.suppress(OSError):
            run.path.parent.rmdir()


def all_runs(runs_dir: Path) -> list[RunDir]:
    """Every run under a runs directory, array members included, oldest first. One that is taken away meanwhile is left out."""
    found: list[RunDir] = []
    for path in _children(runs_dir):
        run = RunDir(path.absolute())
        found += members_of(run) if run.has_members else [run]
    return _oldest_first(found)


def runs_and_arrays(runs_dir: Path) -> list[RunDir]:
    """Every run and array directly under a runs directory, oldest first."""
    return _oldest_first([RunDir(path.absolute()) for path in _children(runs_dir)])


def _oldest_first(found: list[RunDir]) -> list[RunDir]:
    made = [(time, run) for run in found if (time := _made(run)) is not None]
    return [run for _, run in sorted(made, key=lambda pair: (pair[0], pair[1].path.parts))]


def members_of(array: RunDir) -> list[RunDir]:
    """The folders of an array's tasks, in no order."""
    return [RunDir(path.absolute()) for path in _children(array.members)]


def _made(run: RunDir) -> int | None:
    """When a run was made; None where there is none."""
    try:
        return run.job_yaml.lstat().st_mtime_ns
    except OSError:
        return None


def runs_in(run: RunDir) -> list[RunDir]:
    """The run itself, or the runs of an array that have been made, by their number."""
    if not run.has_members:
        return [run]
    made = [RunDir(path.absolute()) for path in _children(run.members) if (path / "job.yaml").is_file()]
    return sorted(made, key=lambda member: (len(member.path.name), member.path.name))


def find(word: str | None, runs_dir: Path) -> RunDir:
    """The run or array that a person means: a directory, an id, a name (the newest of it), or nothing (the newest run of all).

    Raises NotFoundError that names what there is."""
    if word:
        for candidate in (Path(word), runs_dir / word):
            run = RunDir(candidate.absolute())
            if run.job_yaml.is_file():
                return run
    runs = all_runs(runs_dir)
    if not word:
        if runs:
            return runs[-1]
        raise NotFoundError(f"there is no run in {runs_dir}/ yet; holdfast submit makes one")
    # Arrays before their tasks: a name or an id that an array shares with them means all of it.
    for run in [*reversed(runs_and_arrays(runs_dir)), *reversed(runs)]:
        name, _, run_id = run.id.rpartition("-")
        if word in (run.id, run_id, name):
            return run
    known = ", ".join(run.id for run in runs[-5:]) or "none"
    raise NotFoundError(f"no run {word!r} in {runs_dir}/; the last ones: {known}")


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
