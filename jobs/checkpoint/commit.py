"""Commit protocol of checkpoints, for those of `train` and of user scripts. It handles files, not tensors.

    1  mkdir    .step-N.tmp-ATTEMPT      rank 0; a temporary name, which carries the attempt
    2  create, write, fsync, close       each writer its own files, hashed while they are written
       open, fsync, close                files that a user script wrote, hashed afterwards
    3  create, write, fsync, close       manifest.json, by rank 0, when all writers have reported
    4  fsync    .step-N.tmp-ATTEMPT      and the folders in it, else it may come back from a power cut without its files
    5  rename   .step-N.tmp-ATTEMPT -> step-N
    6  fsync    checkpoints/             from here on it is acknowledged
    7  prune: rename step-K -> .trash-..., fsync checkpoints/, and only then delete

A failed fsync is never tried again: Linux marks the pages clean, and a second fsync would succeed though the data are lost.
All system calls go through `Disk`, so that tests can crash at, fail, record or drop each one.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.checkpoint import directory
from jobs.checkpoint.directory import FileEntry, Manifest
from jobs.core.atomic_write import replace_file
from jobs.core.errors import CheckpointError

# Large enough that a call costs nothing beside its data, small enough that hash and write overlap.
_CHUNK = 16 * 2**20


class Disk:
    """The calls that change a disk, as the operating system has them."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        # Exclusive: a file that is there already belongs to somebody else.
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def open_file(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open_folder(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


DISK = Disk()


class Commit:
    """One checkpoint that is being committed. Rank 0 calls `begin` and `finish`, each writer `write`; all raise OSError.

    `adopt` takes the place of `begin` and `write` for a folder that another program filled."""

    def __init__(self, folder: Path, step: int, attempt: int, disk: Disk = DISK, staging: Path | None = None):
        """`staging`: the folder that becomes the checkpoint, on the file system of `folder`; by default that of this attempt."""
        self.folder, self.step, self.attempt, self.disk = folder, step, attempt, disk
        self.final = directory.path_of(folder, step)
        self.staging = staging or directory.staging_of(folder, step, attempt)

    def begin(self) -> None:
        """Makes the staging folder. What an earlier try of this very attempt left there goes to the trash first."""
        make_folder(self.folder, self.disk)
        if os.path.lexists(self.staging):
            delete(self._to_trash(self.staging), self.disk)
        self.disk.mkdir(self.staging)

    def write(self, name: str, parts: Iterable[memoryview | bytes]) -> FileEntry:
        """Writes one file of this process and flushes it to disk."""
        return write_file(self.staging / name, parts, self.disk)

    def adopt(self, names: Sequence[str]) -> dict[str, FileEntry]:
        """Flush and hash files that are in the staging folder already, as paths in it. Raises OSError and CheckpointError."""
        make_folder(self.folder, self.disk)
        for name in names:
            _flush(self.disk.open_file(self.staging / name), self.disk)
        sums = directory.hash_files(self.staging, names)
        return {name: FileEntry((self.staging / name).stat().st_size, sums[name]) for name in names}

    def finish(self, files: dict[str, FileEntry], state: dict[str, Any]) -> Path:
        """Manifest, flush, rename, flush. Raises OSError; the outcome is then unknown, and either one is whole."""
        manifest = Manifest(self.step, self.attempt, files, state)
        self.write(directory.MANIFEST, [manifest.text().encode()])
        for path in sorted((path for path in self.staging.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
            flush_folder(path, self.disk)
        flush_folder(self.staging, self.disk)
        if os.path.lexists(self.final):
            self._make_room()
        # Rename last: a directory under its final name is complete by definition.
        self.disk.rename(self.staging, self.final)
        flush_folder(self.folder, self.disk)
        return self.final

    def already_there(self) -> bool:
        """Whether this step has its final name already and verifies. State is a function of the step: it is not written twice.

        The name is flushed, since it may be of a commit whose last fsync failed. Raises OSError where the disk refuses that."""
        if not os.path.lexists(self.final):
            return False
        try:
            directory.verify(self.final)
        except CheckpointError:
            return False
        flush_folder(self.folder, self.disk)
        return True

    def abandon(self) -> None:
        """Takes the unfinished folder away, as far as the disk lets us."""
        with suppress(OSError):
            if os.path.lexists(self.staging):
                delete(self._to_trash(self.staging), self.disk)

    def _make_room(self) -> None:
        """A final name that does not verify is set aside, never overwritten and never deleted."""
        self.disk.rename(self.final, directory.damaged_path(self.final, self.attempt))

    def _to_trash(self, path: Path) -> Path:
        trash = trash_name(path)
        self.disk.rename(path, trash)
        return trash


def amend(path: Path, **state: Any) -> None:
    """Puts these values into the state of a checkpoint that is complete. One rename: before and after it the checkpoint verifies.

    Raises OSError and CheckpointError."""
    manifest = directory.read_manifest(path)
    replace_file(path / directory.MANIFEST, replace(manifest, state={**manifest.state, **state}).text())


def prune(paths: Iterable[Path], disk: Disk = DISK) -> list[str]:
    """Deletes checkpoints. Returns what could not be done, as messages: a prune that fails must not fail the save."""
    problems = []
    for path in paths:
        trash = trash_name(path)
        try:
            # Renamed and flushed first: a deletion that is cut short must leave nothing damaged under a final name.
            disk.rename(path, trash)
            flush_folder(path.parent, disk)
        except OSError as err:
            problems.append(f"{path.name} could not be taken away: {err.strerror or err}")
            continue
        delete(trash, disk)
    return problems


def trash_name(path: Path) -> Path:
    return path.parent / f"{directory.TRASH}{path.name.lstrip('.')}-{os.urandom(4).hex()}"


def delete(path: Path, disk: Disk = DISK) -> None:
    """Deletes a folder that has no final name. What is left where the disk refuses is cleared at the next start."""
    with suppress(OSError):
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink():
                delete(child, disk)
            else:
                disk.unlink(child)
        disk.rmdir(path)


def write_file(path: Path, parts: Iterable[memoryview | bytes], disk: Disk = DISK) -> FileEntry:
    """A new file with these bytes, on disk when this returns. Hashing and writing run side by side and free the interpreter."""
    digest, size = hashlib.sha256(), 0
    fd = disk.create(path)
    try:
        with ThreadPoolExecutor(1) as hasher:
            for chunk in _chunks(parts):
                hashed = hasher.submit(digest.update, chunk)
                rest = chunk
                while len(rest):
                    rest = rest[disk.write(fd, rest) :]
                size += len(chunk)
                hashed.result()
        disk.fsync(fd)
    except BaseException:
        with suppress(OSError):
            disk.close(fd)
        raise
    # Not suppressed here: a network file system may tell of a failed write only now.
    disk.close(fd)
    return FileEntry(size, digest.hexdigest())


def flush_folder(path: Path, disk: Disk = DISK) -> None:
    """A rename or a new file is safe only when the folder that holds its name is on disk."""
    _flush(disk.open_folder(path), disk)


def make_folder(path: Path, disk: Disk = DISK) -> None:
    """Create a folder and those above it that are missing. The parent of each is flushed: a power cut would otherwise remove the folder
    with everything that was acknowledged in it. Several processes may do so at once."""
    if path.is_dir():
        return
    make_folder(path.parent, disk)
    with suppress(FileExistsError):
        disk.mkdir(path)
    flush_folder(path.parent, disk)


def _flush(fd: int, disk: Disk) -> None:
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def _chunks(parts: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    for part in parts:
        if not memoryview(part).nbytes:
            continue
        view = memoryview(part).cast("B")
        for at in range(0, len(view), _CHUNK):
            yield view[at : at + _CHUNK]
