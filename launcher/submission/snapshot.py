"""Freezing the code of a run: what git tracks, what is not committed yet, and what the job lists beside it.

A requeued attempt runs this copy, whatever happened to the working tree in the meantime. Files that exist to keep secrets
(.env, private keys, credentials) stay out of it, tracked or not, unless CODE_INCLUDE names them one by one.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jobs.config import secrets_scan
from jobs.core import safe_read
from jobs.core.errors import DamagedFileError, SettingError
from jobs.run import permissions, store
from jobs.run.rundir import ALONE, RunDir

# A copy of a data set or of checkpoints is a mistake, and costs every submit its time.
MAX_BYTES = 200 * 2**20
# Larger files are data, in which nobody writes a token by hand.
_SEARCHED_BYTES = 2**20
# Bytes of a code.diff that a rerun copies.
_DIFF_BYTES = 2**30
# Beside the runs: what is being made, and what is being deleted.
_UNFINISHED = (store.STAGING, store.TRASH)
_OWN_PACKAGES = ("jobs", "slurm", "launcher", "train")
# What `import holdfast` in a person's own script means.
_HELPER = "holdfast.py"
_LIBRARIES = ("torch", "accelerate", "numpy", "transformers", "datasets", "transformer-engine", "torchao", "safetensors")


def place_of(entry: str, cwd: Path) -> str:
    """A person's own script as it is found in the frozen copy: from the top of the working tree. One outside of it stays where it is."""
    root, path = (_git_root(cwd) or cwd).resolve(), (cwd / entry).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def freeze(
    run: RunDir, cwd: Path, include: Iterable[str], leave_out: Path, environ: Mapping[str, str], entry: str | None = None
) -> tuple[list[Path], dict[Path, str]]:
    """Copies the working tree around `cwd` into run.code, without the runs in `leave_out` (the runs directory) and what scripts left
    that were started by hand. Returns the files of git that were not copied because they may keep secrets, and what else of git was not, with
    the reason.

    `entry` is a person's own script (`place_of`) or `-m module`; the script is copied also where git does not track it.
    Raises SettingError when a listed path does not exist, the copy would be larger than MAX_BYTES, or a file holds the value of
    a secret variable of `environ`."""
    root = _git_root(cwd)
    tracked, new = _tracked_and_new(root) if root else ([], [])
    found = [*tracked, *new]
    kept_back = [path for path in found if secrets_scan.is_secret_file(path) and (root / path).is_file()] if root else []
    files = [path for path in found if not secrets_scan.is_secret_file(path)]
    origin = (root or cwd).resolve()
    is_of_runs = _of_runs(origin, leave_out.resolve())
    files += _entry_file(entry, origin)
    for word in include:
        path = (cwd / word).resolve()
        if not path.exists():
            raise SettingError(f"CODE_INCLUDE: {word!r} does not exist in {cwd}.")
        if not path.is_relative_to(origin):
            raise SettingError(f"CODE_INCLUDE: {word!r} lies outside {origin}, which is what is frozen.")
        files += [
            p.relative_to(origin)
            for p in ([path] if path.is_file() else sorted(path.rglob("*")))
            if p.is_file() and (p == path or not (secrets_scan.is_secret_file(p) or ".git" in p.relative_to(path).parts))
        ]
    wanted = [path for path in dict.fromkeys(files) if not is_of_runs(path) and ALONE not in path.parts]
    chosen = [path for path in wanted if (origin / path).is_file()]
    sizes = {path: (origin / path).stat().st_size for path in chosen}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = ", ".join(f"{path} ({sizes[path] / 2**20:.0f} MB)" for path in sorted(sizes, key=lambda p: -sizes[p])[:3])
        raise SettingError(
            f"the code to freeze has {total / 2**20:.0f} MB, at most {MAX_BYTES // 2**20} are copied. Largest: {largest}. Add what is no code to .gitignore."
        )
    _refuse_secrets(origin, sizes, environ)
    run.code.mkdir()
    for path in chosen:
        target = run.code / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin / path, target)
    links = _add_links(run.code, origin, [path for path in wanted if _is_folder_link(origin / path)])
    _add_own_packages(run.code, entry)
    permissions.close_to_others(run.code)
    git = _git_facts(root) if root else {}
    facts = {"time": round(time.time(), 3), "from": str(origin), "files": len(chosen), "bytes": total, **git, "versions": versions_here()}
    run.snapshot.write_text(json.dumps(facts, indent=1) + "\n")
    run.code_sums.write_text(json.dumps(sums_of(run.code), indent=0) + "\n")
    run.diff.write_bytes(_uncommitted(root, environ) if root and git.get("commit") else b"")
    there = set(chosen)
    kept_back = [path for path in kept_back if path not in there]
    there |= {*links, *kept_back, *(folder for path in chosen for folder in path.parents)}
    return kept_back, _missing(origin, [path for path in tracked if path not in there], [path for path in new if path not in there], is_of_runs)


def _of_runs(origin: Path, runs_dir: Path) -> Callable[[Path], bool]:
    """Tells whether a path of the tree is no code of it: it lies in the runs directory or, where that holds the tree itself, in a run."""
    if not origin.is_relative_to(runs_dir):
        return lambda path: (origin / path).is_relative_to(runs_dir)
    # With RUNS_DIR=. the runs stand among the code. Both files, since a folder of the project may well have a job.yaml.
    runs = {
        path.name
        for path in (origin.iterdir() if origin == runs_dir else ())
        if path.name.startswith(_UNFINISHED) or (RunDir(path).job_yaml.exists() and RunDir(path).origins.exists())
    }
    return lambda path: path.parts[0] in runs


def _is_folder_link(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _add_links(code: Path, origin: Path, links: list[Path]) -> list[Path]:
    """Puts links to folders into the frozen code, as they are. Returns those that lead to a folder in it; the others do not stay."""
    for path in links:
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        (code / path).symlink_to(os.readlink(origin / path))
    # One that is taken away may have been the way of another.
    while lost := [path for path in links if not ((code / path).is_dir() and (code / path).resolve().is_relative_to(code.resolve()))]:
        for path in lost:
            (code / path).unlink()
        links = [path for path in links if path not in lost]
    return links


def _missing(origin: Path, tracked: Iterable[Path], new: Iterable[Path], is_of_runs: Callable[[Path], bool]) -> dict[Path, str]:
    """Of what git lists and was not copied: what a run may miss, and why it is not there."""
    missing = {}
    for path in tracked:
        if ALONE in path.parts or not os.path.lexists(origin / path):
            continue
        if is_of_runs(path):
            # A .gitignore or .gitkeep is why the folder exists, and no code.
            if not path.name.startswith("."):
                missing[path] = "lies in RUNS_DIR"
        elif (origin / path).is_symlink():
            missing[path] = "a link to what is not frozen"
        elif (origin / path).is_dir():
            missing[path] = "a submodule that is not there; git submodule update --init"
    for path in new:
        if (origin / path).is_dir() and not (origin / path).is_symlink() and not is_of_runs(path):
            missing[path] = f"a repository of its own; CODE_INCLUDE={path} copies it"
    return missing


def _refuse_secrets(origin: Path, sizes: Mapping[Path, int], environ: Mapping[str, str]) -> None:
    """Raises SettingError for a file with the value of a secret in it: the copy outlives the key's being changed."""
    wanted = {name: value.encode() for name, value in secrets_scan.secrets_of(environ).items()}
    if not wanted:
        return
    for path, size in sizes.items():
        content = (origin / path).read_bytes() if size <= _SEARCHED_BYTES else b""
        for name, value in wanted.items():
            if value in content:
                raise SettingError(
                    f"{path} holds the value of {name}, and the code is copied into the run directory, where others may read it. Let the code read it when it runs: os.environ[{name!r}]."
                )


def _uncommitted(root: Path, environ: Mapping[str, str]) -> bytes:
    """What differs from the commit, without the files that keep secrets and with what looks like one masked."""
    changed = [Path(name.decode(errors="surrogateescape")) for name in _git(root, "diff", "HEAD", "--name-only", "--no-renames", "-z").split(b"\0") if name]
    hidden = [f":(top,exclude,literal){path}" for path in changed if secrets_scan.is_secret_file(path)]
    text = _git(root, "diff", "HEAD", "--", ":/", *hidden).decode(errors="surrogateescape")
    for value in secrets_scan.secrets_of(environ).values():
        text = text.replace(value, "***")
    return secrets_scan.masked(text).encode(errors="surrogateescape")


def refuse_without_code(run: RunDir) -> None:
    """Raises SettingError for a run whose frozen code `clean --keep-checkpoints` took away: nothing of it can be started again."""
    if not run.code.is_dir():
        raise SettingError(
            f"the frozen code of run {run.id} is gone (holdfast clean --keep-checkpoints removes it), so it cannot go on; a new run takes its weights with INIT_FROM={run.path}."
        )


def freeze_again(run: RunDir, source: RunDir) -> None:
    """Copies the frozen code of another run, byte for byte. Raises SettingError when it is no longer what was frozen."""
    known = read_sums(source)
    refuse_without_code(source)
    changed = [path for path, digest in known.items() if _sum(source.code / path) != digest]
    if changed:
        raise SettingError(
            f"the frozen code of run {source.id} was changed since it was submitted ({', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}), so it cannot be run again as it was;"
            " --with-current-code takes the working tree instead."
        )
    for path in known:
        (run.code / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source.code / path, run.code / path, follow_symlinks=not _is_folder_link(source.code / path))
    run.code_sums.write_text(json.dumps(known, indent=0) + "\n")
    run.snapshot.write_text(json.dumps({**facts_of(source), "rerun_of": source.id, "versions": versions_here()}, indent=1) + "\n")
    top = RunDir(source.path.parent.parent) if source.is_member else source
    run.diff.write_bytes(safe_read.read_bytes(top.diff, _DIFF_BYTES) if top.diff.exists() else b"")


def facts_of(run: RunDir) -> dict[str, Any]:
    """What snapshot.json says about the code of a run; empty where there is none. Raises DamagedFileError."""
    top = RunDir(run.path.parent.parent) if run.is_member else run
    try:
        facts = safe_read.read_object(top.snapshot)
    except FileNotFoundError:
        return {}
    if not isinstance(facts.get("versions", {}), dict):
        raise DamagedFileError(f"{top.snapshot}: versions is {safe_read.describe(facts['versions'])}; allowed: a version for each name")
    return facts


def read_sums(run: RunDir) -> dict[str, str]:
    """Path -> sha256 of the frozen files as they were; as they are, where the run is older than this list. Raises DamagedFileError."""
    try:
        sums = safe_read.read_object(run.code_sums)
    except FileNotFoundError:
        return sums_of(run.code)
    for path, digest in sums.items():
        if not isinstance(digest, str) or not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise DamagedFileError(f"{run.code_sums}: {safe_read.describe(path)} is {safe_read.describe(digest)}; allowed: a sha256 for a path inside code/")
    return sums


def sums_of(code: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder but compiled ones; of a link to a folder, where it leads."""
    paths = sorted(
        path.relative_to(code).as_posix() for path in code.rglob("*") if (path.is_file() or _is_folder_link(path)) and "__pycache__" not in path.parts
    )
    return {path: _sum(code / path) for path in paths}


def _sum(path: Path) -> str:
    try:
        if _is_folder_link(path):
            return f"link to {os.readlink(path)}"
        with safe_read.open_file(path, links=True) as file:
            digest = hashlib.sha256()
            while part := safe_read.read_some(file, path, 2**20):
                digest.update(part)
            return digest.hexdigest()
    except (OSError, DamagedFileError):
        return ""


def versions_here() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a training computes, as they are installed here."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _entry_file(entry: str | None, origin: Path) -> list[Path]:
    """The script of `ENTRY` as a file to copy; nothing where it is a module or lies elsewhere. Raises SettingError."""
    if entry is None:
        return []
    if entry.startswith("-m "):
        top = entry[3:].strip().partition(".")[0]
        if top in _OWN_PACKAGES and not (origin / top / "__init__.py").exists():
            raise SettingError(f"ENTRY: -m {top} would start holdfast's own package of that name; give the path of your script ({top}.py) instead.")
        return []
    if not (origin / entry).is_file():
        raise SettingError(f"ENTRY: {entry!r} does not exist in {origin}.")
    return [] if Path(entry).is_absolute() else [Path(entry)]


def _add_own_packages(code: Path, entry: str | None) -> None:
    """holdfast itself is part of what is frozen, also where it is an installed package and not the tree that one works in.

    Raises SettingError where the working tree has another package under one of our names."""
    # A person's own script needs no `train` of ours, and may well have one of its own.
    for name in _OWN_PACKAGES if entry is None else _OWN_PACKAGES[:-1]:
        target, source = code / name, Path(str(resources.files(name)))
        if not (target / "__init__.py").exists():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        elif any(not (target / path.relative_to(source)).exists() for path in source.rglob("*.py")):
            raise SettingError(
                f"the package {name}/ in your working tree has the name of one of holdfast's own, which the run could then not find; rename it or put it into a folder."
            )
    if not (code / _HELPER).exists():
        shutil.copy2(Path(str(resources.files("jobs"))).parent / _HELPER, code / _HELPER)


def _git_root(cwd: Path) -> Path | None:
    out = _git(cwd, "rev-parse", "--show-toplevel").decode().strip()
    return Path(out) if out else None


def _tracked_and_new(root: Path) -> tuple[list[Path], list[Path]]:
    """What git tracks and what it would add, with what submodules hold in their own place."""
    tracked, new = _listed(root, "--cached"), _listed(root, "--others", "--exclude-standard")
    # A folder that git lists as if it were a file.
    for path in [path for path in tracked if (root / path / ".git").exists() and not (root / path).is_symlink()]:
        below = _tracked_and_new(root / path)
        tracked.remove(path)
        tracked += [path / name for name in below[0]]
        new += [path / name for name in below[1]]
    return tracked, new


def _listed(root: Path, *which: str) -> list[Path]:
    return [Path(name.decode(errors="surrogateescape")) for name in _git(root, "ls-files", "-z", *which).split(b"\0") if name]


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
