"""Checkpoints written by a user script: arbitrary files, committed with the standard naming and manifest (jobs/checkpoint/commit.py).

The script writes into a staging folder and does not flush; `commit` flushes and hashes its files.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jobs.checkpoint import directory
from jobs.checkpoint.commit import DISK, Commit, Disk, make_folder, prune
from jobs.checkpoint.directory import MANIFEST, OWN, STAGING
from jobs.core.errors import CheckpointError


def staging(folder: Path, step: int, attempt: int, disk: Disk = DISK) -> Path:
    """Return the folder for the files of a step; the first rank that asks creates it."""
    path = directory.staging_of(folder, step, attempt)
    make_folder(folder, disk)
    with suppress(FileExistsError):
        disk.mkdir(path)
    return path


def step_of_staging(path: Path) -> int | None:
    """The step in the name of a folder that `staging` made."""
    text = path.name.removeprefix(STAGING).partition(".tmp-")[0]
    return int(text) if path.name.startswith(STAGING) and text.isdigit() else None


def commit(
    source: Path, folder: Path, step: int, attempt: int, keep_last: int, disk: Disk = DISK, warn: Callable[[str], None] | None = None
) -> tuple[Path, int]:
    """Make the checkpoint of a step in `folder` from the files in `source`, and prune older ones. Returns its path and bytes.

    A checkpoint of that step which verifies stays, and `source` is deleted: state is a function of the step. `warn` gets a message for
    each old checkpoint that cannot be deleted. Raises CheckpointError for files that cannot be a checkpoint, OSError when the disk refuses;
    `source` can then be committed again."""
    names = _files(source)
    size = sum((source / name).stat().st_size for name in names)
    work = Commit(folder, step, attempt, disk, staging=source)
    if work.already_there():
        work.abandon()
        return work.final, size
    files = work.adopt(names)
    try:
        work.finish(files, {OWN: True})
    except OSError:
        with suppress(OSError):
            disk.unlink(source / MANIFEST)
        raise
    # Next to checkpoints of later steps it is not among the newest, and still the one that was asked for.
    for problem in prune((path for path in directory.to_prune(folder, keep_last) if path != work.final), disk):
        if warn is not None:
            warn(problem)
    return work.final, size


def newest(folder: Path, attempt: int, may_change: bool) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that verifies, and (present name, reason) of each damaged one.

    With `may_change` damaged ones are set aside. Every rank gets the same path: what is damaged is so for all."""
    if may_change:
        return directory.newest_verified(folder, attempt)
    for path in directory.complete(folder):
        with suppress(CheckpointError):
            directory.verify(path)
            return path, []
    return None, []


def _files(source: Path) -> list[str]:
    """Names of the files in `source`, as paths in it. Raises CheckpointError where they cannot be a checkpoint."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()) if source.is_dir() else []
    if not names:
        raise CheckpointError(f"{source} has no files in it; write the checkpoint there before it is committed")
    if MANIFEST in names:
        raise CheckpointError(f"{source}: {MANIFEST} is the name of the manifest that is written here; give your file another one")
    _refuse_links_out(source)
    return names


def _refuse_links_out(source: Path) -> None:
    """Raise CheckpointError for a symbolic link that will not lead to a file of the checkpoint under its final name: one that is absolute,
    contains .., or is broken."""
    for path in source.rglob("*"):
        if path.is_symlink() and ((to := os.readlink(path)).startswith("/") or ".." in to.split("/") or not path.exists()):
            name = path.relative_to(source).as_posix()
            raise CheckpointError(f"{source}: {name} is a symbolic link to {to}, where the checkpoint does not keep it; copy the file to {name} instead")
