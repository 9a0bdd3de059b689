"""Checkpoints that a person's own script writes: any files, made complete under the names and the manifest of ours.

The script writes into a folder aside and does not flush; `commit` does all that stands between those files and a checkpoint
that is there after a power cut, in the order of train/checkpoint/commit.py: flush, sums, manifest, flush, rename, flush, and only then prune.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from jobs.checkpoint import directory
from jobs.checkpoint.directory import DAMAGED, MANIFEST, OWN, STAGING, TRASH, FileEntry, Manifest
from jobs.core.errors import CheckpointError


def staging(folder: Path, step: int, attempt: int) -> Path:
    """The folder to write the checkpoint of a step into; made if it is not there, by whichever rank is first."""
    path = directory.staging_of(folder, step, attempt)
    path.mkdir(parents=True, exist_ok=True)
    return path


def step_of_staging(path: Path) -> int | None:
    """The step in the name of a folder that `staging` made."""
    text = path.name.removeprefix(STAGING).partition(".tmp-")[0]
    return int(text) if path.name.startswith(STAGING) and text.isdigit() else None


def commit(source: Path, folder: Path, step: int, attempt: int, keep_last: int) -> tuple[Path, int]:
    """Gives `source` the name of the checkpoint of a step in `folder`, and prunes the older ones.

    Returns the checkpoint and its bytes. A checkpoint of that step which is there and verifies stays, and `source` goes: state
    belongs to its step. Raises CheckpointError for files that cannot be a checkpoint, OSError when the disk refuses."""
    final = directory.path_of(folder, step)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()) if source.is_dir() else []
    if not names:
        raise CheckpointError(f"{source} has no files in it; write the checkpoint there before it is committed")
    if MANIFEST in names:
        raise CheckpointError(f"{source}: {MANIFEST} is the name of the manifest that is written here; give your file another one")
    _refuse_links_out(source)
    for name in names:
        _flush(source / name)
    sums = directory.hash_files(source, names)
    manifest = Manifest(step, attempt, {name: FileEntry((source / name).stat().st_size, sums[name]) for name in names}, {OWN: True})
    with open(source / MANIFEST, "x") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    for path in sorted((path for path in source.rglob("*") if path.is_dir()), reverse=True):
        _flush(path)
    _flush(source)
    if os.path.lexists(final):
        try:
            directory.verify(final)
        except CheckpointError:
            directory.set_aside(final, attempt)
        else:
            _discard(source, folder)
            return final, manifest.bytes
    folder.mkdir(parents=True, exist_ok=True)
    # Rename last: a directory under its final name is complete by definition.
    os.rename(source, final)
    _flush(folder)
    for old in directory.to_prune(folder, keep_last):
        # Beside checkpoints of later steps it is not among the newest, and yet what was asked for.
        if old != final:
            _discard(old, folder)
    return final, manifest.bytes


def newest(folder: Path, attempt: int, may_change: bool) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that verifies, and (present name, reason) of each damaged one.

    With `may_change` damaged ones are set aside. Every rank comes to the same answer: what is damaged is so for all."""
    if may_change:
        return directory.newest_verified(folder, attempt)
    for path in directory.complete(folder):
        with suppress(CheckpointError):
            directory.verify(path)
            return path, []
    return None, []


def clear_leftovers(folder: Path, attempt: int) -> None:
    """Deletes what earlier attempts began and never finished."""
    with suppress(OSError):
        for path in folder.iterdir():
            mine = attempt > 0 and path.name.endswith(f".tmp-{attempt}")
            if path.name.startswith((STAGING, TRASH)) and not path.name.startswith(DAMAGED) and not mine:
                _discard(path, folder)


def _refuse_links_out(source: Path) -> None:
    """Raises CheckpointError for a symbolic link that will not lead to a file of the checkpoint under its final name: one that is absolute,
    goes upwards, or leads nowhere already."""
    for path in source.rglob("*"):
        if path.is_symlink() and ((to := os.readlink(path)).startswith("/") or ".." in to.split("/") or not path.exists()):
            name = path.relative_to(source).as_posix()
            raise CheckpointError(f"{source}: {name} is a symbolic link to {to}, where the checkpoint does not keep it; copy the file to {name} instead")


def _discard(path: Path, folder: Path) -> None:
    """Renamed and flushed first: a deletion that is cut short must leave nothing damaged under a final name."""
    trash = folder / f"{TRASH}{path.name.lstrip('.')}-{os.urandom(4).hex()}"
    with suppress(OSError):
        os.rename(path, trash)
        _flush(folder)
        shutil.rmtree(trash, ignore_errors=True)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
