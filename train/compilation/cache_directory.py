"""Directories of the compile caches on this node (torch.compile, Triton): private, with owner and mode verified.

What is in them is executed. torch's own default is a predictable name in the temporary folder (torchinductor_USER), which another user
can create first. Here it is a directory of mode 0700 that is checked each time, and a variable that names another one is checked too.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.core import trust
from jobs.core.errors import SettingError

# The variables by which torch and Triton are told where to keep what they compiled, and load it from.
INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


def use_private_caches(say: Callable[[str], None]) -> None:
    """Set TORCHINDUCTOR_CACHE_DIR to a private directory unless the user named one, and check what the user named. Called before torch is
    imported where that is possible.

    Raises SettingError for a directory that another user controls; one under the default name is left alone, with a message by `say`."""
    for name in (INDUCTOR, TRITON):
        given = os.environ.get(name)
        if given and not _is_default_of_torch(given):
            _check(name, Path(os.path.abspath(given)))
    given = os.environ.get(INDUCTOR)
    if not given or _is_default_of_torch(given):
        folder, why = _private_directory()
        if why:
            say(f"  WARNING: {why}; nothing in it is loaded. What is compiled goes to {folder}")
        os.environ[INDUCTOR] = str(folder)


def _is_default_of_torch(given: str) -> bool:
    """Whether torch set it, which it does when some of its modules are imported (torch/_inductor/runtime/cache_dir_utils.py)."""
    path = Path(os.path.abspath(given))
    return path.parent == Path(os.path.abspath(tempfile.gettempdir())) and path.name.startswith("torchinductor_")


def _check(name: str, path: Path) -> None:
    """Raise SettingError unless only this user can change what `path`, and where it leads to, holds. Creates a missing one."""
    try:
        # A link is followed where it is this user's own, or root's: it was set on purpose.
        if path.is_symlink() and not trust.is_owner(os.lstat(path)):
            raise PermissionError(f"{path} is a symbolic link of another user")
        for place in dict.fromkeys([path, Path(os.path.realpath(path))]):
            if found := trust.find_parent_problem(place):
                raise PermissionError(f"{found[0]} {found[1]}")
        resolved = Path(os.path.realpath(path))
        if not resolved.exists():
            trust.make_private_directory(resolved)
        elif problem := trust.find_problem(resolved, "directory", allow_root=True):
            raise PermissionError(f"{resolved} {problem}")
    except OSError as err:
        raise SettingError(
            f"{name}={path}: {err}. What a compile cache holds is executed, so only you may be able to write to it. Name another directory, or unset {name}."
        ) from err


def _private_directory() -> tuple[Path, str]:
    """A private directory for this user on this node, and why it is not the one of the default name."""
    path = Path(os.path.realpath(tempfile.gettempdir())) / f"holdfast-compile-{os.geteuid()}"
    if found := trust.find_parent_problem(path):
        return trust.make_private_directory(Path.home() / ".cache" / "holdfast" / "compile"), f"{found[0]} {found[1]}"
    try:
        return trust.make_private_directory(path), ""
    except PermissionError as err:
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent)), str(err)
