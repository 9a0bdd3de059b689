"""Deletion of files and directory trees relative to an open directory, without ever following a symbolic link."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(name: str | Path, parent: int | None = None, *, follow: bool = False) -> Iterator[int]:
    """The descriptor of a directory, of `name` in the open directory `parent`. A link in its place is refused unless `follow`. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_entry(parent: int, name: str, shown: Path) -> list[str]:
    """Delete the entry `name` of the open directory `parent`: a link is deleted, not what it leads to. Returns what could not be done.

    `shown`: its path in messages. A directory that is replaced by a link meanwhile is not entered."""
    problems: list[str] = []
    _remove(parent, name, shown, problems)
    return problems


def rename_and_remove(parent: int, name: str, trash: str, shown: Path, expected: os.stat_result | None = None) -> list[str]:
    """Rename an entry to `trash`, then delete it: what could not be deleted is never found under its name. Returns what could not be done.

    `expected`: the entry that was looked at; another one that has its name by now is given it back."""
    try:
        os.rename(name, trash, src_dir_fd=parent, dst_dir_fd=parent)
        if expected is not None and not os.path.samestat(os.lstat(trash, dir_fd=parent), expected):
            os.rename(trash, name, src_dir_fd=parent, dst_dir_fd=parent)
            return [f"{shown}: another directory has taken its place"]
    except OSError as err:
        return [f"{shown}: {err.strerror}"]
    return remove_entry(parent, trash, shown.parent / trash)


def _remove(parent: int, name: str, shown: Path, problems: list[str]) -> None:
    try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            os.unlink(name, dir_fd=parent)
            return
        with opened(name, parent) as folder:
            for entry in os.listdir(folder):
                _remove(folder, entry, shown / entry, problems)
        if not problems:
            os.rmdir(name, dir_fd=parent)
    except OSError as err:
        problems.append(f"{shown}: {err.strerror}")
