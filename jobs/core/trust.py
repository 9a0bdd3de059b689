"""Ownership checks for files whose content is executed: those of labs, runs and caches.

A path is trusted when the effective user owns it, neither group nor others can write to it, and it is a directory or a regular file
itself: symbolic links are never followed. Reading needs no trust.
"""

import os
import stat
from pathlib import Path
from typing import Literal

Kind = Literal["directory", "file"]
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def find_problem(path: Path, kind: Kind, *, allow_root: bool = False) -> str:
    """Return why `path` is not trusted, as the end of a sentence about it; empty if it is trusted. Raises OSError if it is absent.

    `allow_root`: it may belong to root too."""
    return _problem_of(os.lstat(path), kind, allow_root)


def is_owner(facts: os.stat_result) -> bool:
    """Return whether this user, or root, owns what `facts` describe."""
    return facts.st_uid in (0, os.geteuid())


def _problem_of(facts: os.stat_result, kind: Kind, allow_root: bool = False) -> str:
    if stat.S_ISLNK(facts.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISDIR if kind == "directory" else stat.S_ISREG)(facts.st_mode):
        return f"is not a {'directory' if kind == 'directory' else 'regular file'}"
    if not (facts.st_uid == os.geteuid() or (allow_root and is_owner(facts))):
        return f"belongs to {user_name(facts.st_uid)}, not to you"
    if facts.st_mode & _OTHERS_WRITE:
        return f"can be written by {'everybody' if facts.st_mode & stat.S_IWOTH else 'its group'} (mode {stat.S_IMODE(facts.st_mode):04o})"
    return ""


def find_parent_problem(path: Path) -> tuple[Path, str] | None:
    """Return the first parent of an absolute path in which another user could replace what lies below it, and why.

    A parent must belong to this user or to root, and may be writable by others only with the sticky bit."""
    for parent in path.parents:
        try:
            facts = os.lstat(parent)
        except FileNotFoundError:
            continue
        if facts.st_uid not in (0, os.geteuid()):
            return parent, f"belongs to {user_name(facts.st_uid)}"
        if stat.S_ISDIR(facts.st_mode) and facts.st_mode & _OTHERS_WRITE and not facts.st_mode & stat.S_ISVTX:
            who = "everybody" if facts.st_mode & stat.S_IWOTH else "its group"
            return parent, f"can be written by {who} (mode {stat.S_IMODE(facts.st_mode):04o})"
    return None


def make_private_directory(path: Path) -> Path:
    """Create a directory with mode 0700, or check that an existing one is this user's own, and close it to others. Returns `path`.

    Raises OSError if it cannot be made, PermissionError if it is not trusted."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        problem = find_problem(path, "directory")
        if problem:
            raise PermissionError(f"{path} {problem}") from None
    # By descriptor: a link that takes its place meanwhile is not followed.
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if problem := _problem_of(os.fstat(handle), "directory"):
            raise PermissionError(f"{path} {problem}")
        os.fchmod(handle, 0o700)
    finally:
        os.close(handle)
    return path


def user_name(uid: int) -> str:
    """Return the name of a user, or "user UID" where it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
