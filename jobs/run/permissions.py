"""Who may write to a run: its owner and nobody else, since whoever can change a run's files decides what its owner executes."""

import os
import stat
from pathlib import Path

from jobs.core.errors import SettingError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def keep_to_oneself() -> None:
    """From here on this process, and what it starts, makes files that only their owner can write, whatever umask a person has."""
    os.umask(os.umask(_OTHERS_WRITE) | _OTHERS_WRITE)


def close_to_others(path: Path) -> None:
    """Takes write permission from group and others for a file, or for a folder and all that is in it; a copy keeps the mode of
    what was copied."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    for one in paths:
        mode = one.lstat().st_mode
        if mode & _OTHERS_WRITE and not stat.S_ISLNK(mode):
            one.chmod(stat.S_IMODE(mode) & ~_OTHERS_WRITE)


def refuse_foreign(folder: Path, what_for: str) -> None:
    """Raises SettingError when a run directory belongs to somebody else, or when everybody can write to it: what lies in it, code
    and pickles, would then run under the wrong person's name."""
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise SettingError(
            f"{folder} belongs to {_name(facts.st_uid)}, not to you; {what_for} would execute what lies in it. Copy it first: cp -r {folder} somewhere of your own."
        )
    if facts.st_mode & stat.S_IWOTH:
        raise SettingError(f"{folder} can be written by everybody; {what_for} would execute what lies in it. If you trust its content: chmod -R go-w {folder}")


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
