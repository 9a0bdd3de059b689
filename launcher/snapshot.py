"""Freezing the code of a run: what git tracks, what is not committed yet, and what the job lists beside it.

A requeued attempt runs this copy, whatever happened to the working tree in the meantime.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from jobs.errors import SettingError
from jobs.rundir import RunDir

# A copy of a data set or of checkpoints is a mistake, and costs every submit its time.
MAX_BYTES = 200 * 2**20
_OWN_PACKAGES = ("jobs", "slurm", "launcher", "train")


def freeze(run: RunDir, cwd: Path, include: Iterable[str], leave_out: Path) -> None:
    """Copies the working tree around `cwd` into run.code, without `leave_out` (the runs directory).

    Raises SettingError when a listed path does not exist or the copy would be larger than MAX_BYTES."""
    root = _git_root(cwd)
    files = _tracked_and_new(root) if root else []
    origin = root or cwd
    for word in include:
        path = (cwd / word).resolve()
        if not path.exists():
            raise SettingError(f"CODE_INCLUDE: {word!r} does not exist in {cwd}.")
        if not path.is_relative_to(origin):
            raise SettingError(f"CODE_INCLUDE: {word!r} lies outside {origin}, which is what is frozen.")
        files += [p.relative_to(origin) for p in ([path] if path.is_file() else sorted(path.rglob("*"))) if p.is_file()]
    chosen = [path for path in dict.fromkeys(files) if (origin / path).is_file() and not (origin / path).is_relative_to(leave_out)]
    sizes = {path: (origin / path).stat().st_size for path in chosen}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = ", ".join(f"{path} ({sizes[path] / 2**20:.0f} MB)" for path in sorted(sizes, key=lambda p: -sizes[p])[:3])
        raise SettingError(f"the code to freeze has {total / 2**20:.0f} MB, at most {MAX_BYTES // 2**20} are copied. Largest: {largest}. Add what is no code to .gitignore.")
    run.code.mkdir()
    for path in chosen:
        target = run.code / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin / path, target)
    _add_own_packages(run.code)
    git = _git_facts(root) if root else {}
    run.snapshot.write_text(json.dumps({"time": round(time.time(), 3), "from": str(origin), "files": len(chosen), "bytes": total, **git}, indent=1) + "\n")
    run.diff.write_bytes(_git(root, "diff", "HEAD") if root and git.get("commit") else b"")


def _add_own_packages(code: Path) -> None:
    """holdfast itself is part of what is frozen, also where it is an installed package and not the tree that one works in."""
    for name in _OWN_PACKAGES:
        target = code / name
        if not (target / "__init__.py").exists():
            source = Path(str(resources.files(name)))
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def _git_root(cwd: Path) -> Path | None:
    out = _git(cwd, "rev-parse", "--show-toplevel").decode().strip()
    return Path(out) if out else None


def _tracked_and_new(root: Path) -> list[Path]:
    out = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [Path(name.decode(errors="surrogateescape")) for name in out.split(b"\0") if name]


def _git_facts(root: Path) -> dict[str, object]:
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    dirty = bool(_git(root, "status", "--porcelain").strip())
    return {"commit": commit, "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD").decode().strip(), "dirty": dirty} if commit else {}


def _git(cwd: Path | None, *words: str) -> bytes:
    """Output of a git command, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
