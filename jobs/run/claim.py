"""One run, one owner: an attempt is claimed by making its folder, and whoever claims the next number fences the one before.

A folder is made whole under its final name by one rename, which fails when the name is taken: so of two jobs that begin at
once, one gets the number. Ranks of an attempt that has a successor are zombies (of a node thought dead, of a second job) and
must not write under any name that others read.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.core import safe_read
from jobs.core.errors import DamagedFileError
from jobs.run.rundir import RunDir

_ASIDE = ".claim-"


def newest(run: RunDir) -> int:
    """The highest attempt number that was ever claimed; 0 when there is none. Raises DamagedFileError."""
    try:
        names = os.listdir(run.attempt(0).path.parent)
    except FileNotFoundError:
        return 0
    except OSError as err:
        raise DamagedFileError(f"{run.attempt(0).path.parent}: cannot be read: {err.strerror}") from err
    return max((number for name in names if (number := safe_read.index_of(name)) is not None), default=0)


def claim(run: RunDir, number: int, owner: Mapping[str, Any]) -> bool:
    """Takes the attempt `number` for `owner`; False when another one was faster. Raises OSError when the disk refuses."""
    folder = run.attempt(number).path
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f"{_ASIDE}{number}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        (aside / run.attempt(number).owner.name).write_text(json.dumps(dict(owner)))
        os.rename(aside, folder)
    except OSError as err:
        # Over NFS a rename that worked may be reported as failed: the file inside says whose folder it is.
        mine = owner_of(run, number) == dict(owner)
        shutil.rmtree(aside, ignore_errors=True)
        if mine:
            return True
        if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            return False
        raise
    return True


def owner_of(run: RunDir, number: int) -> dict[str, Any]:
    """Who claimed an attempt; empty when that cannot be read."""
    try:
        return safe_read.read_object(run.attempt(number).owner)
    except (OSError, DamagedFileError):
        return {}


def superseded(run: RunDir, number: int) -> bool:
    """Whether a later attempt was claimed, so that this one must not write any more. One metadata call."""
    return number > 0 and os.path.exists(run.attempt(number + 1).path)


def alive(pid: int) -> bool:
    """Whether a process of this machine still works (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def process_stamp(pid: int) -> str:
    """Tells this process from every other one with the same number: boot of the machine and start of the process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def elsewhere(run: RunDir, number: int, host: str) -> str:
    """What is said of an attempt that another machine began without Slurm."""
    return f"begun on {host} without Slurm, and from here nobody can see whether it still runs. If it does not, delete {run.attempt(number).owner}."
