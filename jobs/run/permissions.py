"""Run-directory permissions: only the owner may write, and no run is started that another user controls.

A process can start a run in three ways: `launcher.local.executor.run_attempts`, sbatch of its script, and `launcher.attempt adopt`.
Each calls `check_run` first; the batch script checks the owner of its directory again on the node.
"""

import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from jobs.core import safe_read, trust
from jobs.core.contract import RankEnv
from jobs.core.errors import SettingError
from jobs.run.rundir import RunDir

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Linux's form (posix_acl_xattr.h): 4 bytes of version, then for each entry tag, permissions (2 bytes each, little endian) and id (4 bytes).
_DEFAULT_ACL = "system.posix_acl_default"
_ACL_USER_OBJ, _ACL_WRITE = 0x01, 0x02


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


def close_new_directory(path: Path) -> None:
    """Take write permission on a directory just made, and on all that will be made in it, from group and others.

    A default access list, inherited from the folder around, overrules the umask; who may read stays as it says."""
    with suppress(OSError, AttributeError):  # not every file system or platform has access lists
        acl = bytearray(os.getxattr(path, _DEFAULT_ACL, follow_symlinks=False))
        for tag, permissions in ((start, start + 2) for start in range(4, len(acl), 8)):
            if acl[tag] != _ACL_USER_OBJ:
                acl[permissions] &= ~_ACL_WRITE
        os.setxattr(path, _DEFAULT_ACL, bytes(acl), follow_symlinks=False)
    close_to_others(path)


def check_run(run: RunDir, action: str, members: Iterable[int] = (), *, trees: bool = True) -> None:
    """Raise SettingError if another user controls any file that starting `run` executes or takes its settings from.

    Each must be a directory or regular file itself, not a symbolic link, belong to this user or to root, and not be writable by group
    or others. The folder around the run may be shared: an entry that another user put there does not belong to this user.

    `members`: tasks of the array that will be started. `trees`: also every file of the frozen code, of the compiled programs and of
    what submitit reads back."""
    array = run.array if run.is_member else run
    member_runs = [run] if run.is_member else [run.member(number) for number in members]
    directories = [array.path, array.members, array.code, array.submitit, array.compiled("").parent]
    files = [array.script, array.job_yaml, array.origins, array.code_sums, array.snapshot, array.sweep, array.study]
    for member in member_runs:
        directories += [member.path]
        files += [member.job_yaml, member.origins, member.trial]
    for one in dict.fromkeys([array, *member_runs]):
        directories += [one.attempt(0).path.parent]
        files += [one.ledger]
    found = [(path, _problem(path, "directory")) for path in directories] + [(path, _problem(path, "file")) for path in files]
    if trees:
        found += [(path, problem) for tree in (array.code, array.submitit, array.compiled("").parent) for path, problem in _tree_problems(tree, tree)]
    for path, problem in found:
        if problem:
            raise SettingError(f"{path} {problem}; {action} would execute what it holds. {_remedy(run, path, problem)}")


def is_owned(path: Path) -> bool:
    """Return whether `path` itself, not what a link leads to, belongs to this user or to root."""
    with suppress(OSError):
        facts = os.lstat(path)
        return trust.is_owner(facts) and not stat.S_ISLNK(facts.st_mode)
    return False


def script_to_submit(run: RunDir, members: Iterable[int] = ()) -> Path:
    """Return the batch script of a run, or of its array, once nothing that it executes is under the control of another user.

    Raises SettingError, also for a script of a directory that was moved: it would execute what is at the old place."""
    check_run(run, "its job", members)
    place = run.array.members if run.is_member else run.members if run.has_members else run.path
    start = f"export {RankEnv.RUN_DIR}="
    with suppress(OSError, ValueError):
        line = next((line for line in safe_read.read_text(run.script).splitlines() if line.startswith(start)), "")
        written = "".join(shlex.split(line.removeprefix(start))).removesuffix("/$SLURM_ARRAY_TASK_ID")
        if written and os.path.realpath(written) != os.path.realpath(place):
            raise SettingError(
                f"{run.script} starts the run in {written}, not in {place}: the run directory was moved or copied. Move it back, or start it as a new run: holdfast rerun {run.path}"
            )
    return run.script


def _problem(path: Path, kind: trust.Kind) -> str:
    try:
        return trust.find_problem(path, kind, allow_root=True)
    except OSError as err:
        return "" if isinstance(err, FileNotFoundError) else f"cannot be read ({err.strerror})"


def _tree_problems(folder: Path, top: Path) -> Iterator[tuple[Path, str]]:
    """Every entry below `folder` that is not trusted. A link of this user is, where it leads to a place below `top`."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_symlink():
            if not trust.is_owner(os.lstat(path)) or not path.resolve().is_relative_to(top.resolve()):
                yield path, f"is a symbolic link to {os.readlink(path)}, outside {top}"
            continue
        is_directory = entry.is_dir(follow_symlinks=False)
        problem = _problem(path, "directory" if is_directory else "file")
        if problem:
            yield path, problem
        elif is_directory:
            yield from _tree_problems(path, top)


def _remedy(run: RunDir, path: Path, problem: str) -> str:
    if "can be written" in problem:
        return f"If you trust its content: chmod -R go-w {path}"
    if "symbolic link" in problem:
        return "A run is started from its own directory, without links: put the file or directory itself there."
    if "belongs to" in problem:
        whole = run.array if run.is_member else run
        again = Path("COPY", *run.path.relative_to(whole.path).parts)
        return (
            f"Only runs of your own are started. If you have read it and trust it, run a copy as your own: cp -r {whole.path} COPY && holdfast rerun {again}."
            f"{' On a network file system nobody can also mean that user ids are not mapped.' if 'belongs to nobody' in problem else ''}"
        )
    return "Restore it, or submit the run again."
