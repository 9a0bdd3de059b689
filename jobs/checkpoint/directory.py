"""Checkpoints on disk, for everyone who does not need the tensors: names, manifest, which one is whole, which are kept.

    checkpoints/step-00001200/
      model.safetensors       fp32 weights and buffers, by name
      optimizer.safetensors   moments of the optimizer, as <parameter>/<moment>
      manifest.json           the state beside the tensors; name, bytes and sha256 of every file; written last
    checkpoints/.step-00001200.tmp-3      being written, by attempt 3
    checkpoints/.trash-...                being deleted
    checkpoints/.damaged-step-00001200-4  did not verify when attempt 4 wanted it; kept for a person to look at

A sharded run has files for each process, model.00000-of-00002.safetensors, with its own rows of every tensor. What is larger than 2 GiB
lies in several files, so that several processors write, hash and verify it.
A directory under a step's name is complete by definition: jobs/checkpoint/commit.py is the protocol that makes that true.
"""

import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jobs.core import safe_read
from jobs.core.errors import CheckpointError, DamagedFileError

FORMAT = 2
MODEL, OPTIMIZER, MANIFEST = "model", "optimizer", "manifest.json"
STAGING, TRASH, DAMAGED = ".step-", ".trash-", ".damaged-"
# In the state of a checkpoint that a person's own script wrote (jobs/checkpoint/user_checkpoint.py).
OWN = "own"
_STEP = re.compile(r"step-([0-9]{8,})")
# Hashing is one core's work per file and releases the interpreter's lock. After each block it needs the lock again, and a thread that
# imports gives it up every 5 ms only: in blocks of 256 KiB, as hashlib.file_digest reads, a busy interpreter lets 30 MB/s through.
_HASH_THREADS = 4
_HASH_BLOCK = 64 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint as its manifest knows it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself. `state` is what a resume needs beside the tensors (train/checkpoint/state_dict.py)."""

    step: int
    attempt: int
    files: dict[str, FileEntry]
    state: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """JSON with a sum over itself: a bit that flips in the manifest must not go unseen either."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "attempt": self.attempt,
            "state": self.state,
            "files": {name: vars(entry) for name, entry in self.files.items()},
        }
        return json.dumps({**body, "sum": _sum_of(body)}, indent=1) + "\n"

    def of_kind(self, kind: str) -> list[str]:
        """Names of the files that hold `model` or `optimizer`, at least one per process that wrote."""
        return sorted(name for name in self.files if name.startswith(f"{kind}."))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def _sum_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_name(kind: str, number: int = 0, files: int = 1) -> str:
    return f"{kind}.safetensors" if files == 1 else f"{kind}.{number:05d}-of-{files:05d}.safetensors"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def staging_of(folder: Path, step: int, attempt: int) -> Path:
    """The attempt stands in the name: what a process of an older attempt still writes can never get a final name."""
    return folder / f".step-{step:08d}.tmp-{attempt}"


def step_of(path: Path) -> int | None:
    """The step in a complete checkpoint's name; None for anything else in the folder."""
    found = _STEP.fullmatch(path.name)
    step = int(found.group(1)) if found else None
    return step if step is not None and path_of(path.parent, step) == path else None


def complete(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first."""
    try:
        found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, true to its own sum. Raises CheckpointError."""
    try:
        body = safe_read.read_object(path / MANIFEST)
        stated = body.pop("sum")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path.name}: its manifest has format {body['format']!r}, this version reads {FORMAT}")
        if stated != _sum_of(body):
            raise CheckpointError(f"{path.name}: its manifest does not match its own sum")
        for name, entry in body["files"].items():
            if "\0" in name or not safe_read.is_count(entry["bytes"]) or not isinstance(entry["sha256"], str):
                raise CheckpointError(f"{path.name}: its manifest cannot be read (wrong entry for {safe_read.describe(name)}: {safe_read.describe(entry)})")
        files = {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()}
        _check_state(path, body)
        manifest = Manifest(body["step"], body["attempt"], files, body["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{path.name}: its manifest cannot be read ({_said(err).removeprefix(f'{path / MANIFEST}: ')})") from err
    if manifest.step != step_of(path):
        raise CheckpointError(f"{path.name}: its manifest belongs to step {manifest.step}")
    if manifest.state.get(OWN):
        # Files of a person's own script: of any name, in folders too, but not outside of this one.
        if not files or any(name.startswith("/") or ".." in name.split("/") for name in files):
            raise CheckpointError(f"{path.name}: its manifest lists no file, or one outside of it")
        return manifest
    if any(os.sep in name or name.startswith(".") for name in files) or not (manifest.of_kind(MODEL) and manifest.of_kind(OPTIMIZER)):
        raise CheckpointError(f"{path.name}: its manifest does not list a model and an optimizer")
    return manifest


def _check_state(path: Path, body: Mapping[str, Any]) -> None:
    """Checks the types of the values in a manifest that commands calculate with or show. Raises CheckpointError."""
    state = body["state"]
    wrong = [name for name in ("step", "attempt") if not safe_read.is_count(body[name])] + ([] if isinstance(state, dict) else ["state"])
    if not wrong:
        wrong = [name for name in ("tokens", "world") if state.get(name) is not None and not safe_read.is_count(state[name])]
        wrong += ["val_loss"] if type(state.get("val_loss", 0.0)) not in (int, float, type(None)) else []
        wrong += ["versions"] if not isinstance(state.get("versions", {}), dict) else []
    if wrong:
        raise CheckpointError(f"{path.name}: its manifest cannot be read (wrong value for {wrong[0]}: {safe_read.describe(body.get(wrong[0], state))})")


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is there with the right content. Raises CheckpointError otherwise."""
    manifest = read_manifest(path)
    # Sizes first: they cost nothing and find most of what goes wrong.
    for name, entry in manifest.files.items():
        try:
            with _open(path, name) as file:
                found = os.fstat(file.fileno()).st_size
        except OSError as err:
            raise CheckpointError(f"{path.name}: {name} cannot be read ({_said(err)})") from err
        if found != entry.bytes:
            raise CheckpointError(f"{path.name}: {name} has {found} bytes, the manifest says {entry.bytes}")
    for name, digest in hash_files(path, manifest.files).items():
        if digest != manifest.files[name].sha256:
            raise CheckpointError(f"{path.name}: the content of {name} does not match its sum")
    return manifest


def hash_files(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> sha256 of files of a checkpoint. Raises CheckpointError when one cannot be read."""
    listed = list(names)
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        return dict(zip(listed, threads.map(lambda name: hash_file(path, name), listed), strict=True))


class Ahead:
    """Verifies the newest checkpoint while Python still imports torch: hashing is one core's work per file, 8 s for 15 GB, and releases
    the interpreter's lock."""

    def __init__(self, folder: Path):
        self._path = next(iter(complete(folder)), None)
        self._found: Manifest | CheckpointError | None = None
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
        if self._path is not None:
            self._thread.start()

    def _run(self) -> None:
        assert self._path is not None
        with suppress(Exception):  # whatever it is, it is met again by whoever asks
            try:
                self._found = verify(self._path)
            except CheckpointError as err:
                self._found = err

    def verify(self, path: Path) -> Manifest:
        """As `verify`, by what was found ahead where that was this checkpoint."""
        if path == self._path:
            self._thread.join()
            if isinstance(self._found, CheckpointError):
                raise self._found
            if self._found is not None:
                return self._found
        return verify(path)


def newest_verified(folder: Path, attempt: int, ahead: Ahead | None = None) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that verifies, and (present name, reason) of each damaged one that was set aside on the way."""
    damaged = []
    for path in complete(folder):
        try:
            ahead.verify(path) if ahead else verify(path)
        except CheckpointError as err:
            damaged.append((set_aside(path, attempt), str(err)))
            continue
        return path, damaged
    return None, damaged


def set_aside(path: Path, attempt: int) -> str:
    """Takes its final name from a damaged checkpoint. Returns the name that it has now: the old one where the disk refuses."""
    target = damaged_path(path, attempt)
    try:
        os.rename(path, target)
    except OSError:
        return path.name
    return target.name


def damaged_path(path: Path, attempt: int) -> Path:
    """A free name for a damaged checkpoint that attempt `attempt` sets aside."""
    name = f"{DAMAGED}{path.name}-{attempt}"
    while os.path.lexists(path.parent / name):
        name += "+"
    return path.parent / name


def clear_leftovers(folder: Path, keep_attempt: int = 0) -> None:
    """Delete what earlier attempts began and never finished. Only the owner of the run may call this.

    `keep_attempt`: the staging folders of this attempt stay, because another rank may have made one already."""
    try:
        leftovers = [path for path in folder.iterdir() if path.name.startswith((STAGING, TRASH))]
    except OSError:
        return
    for path in leftovers:
        if keep_attempt and path.name.endswith(f".tmp-{keep_attempt}"):
            continue
        doomed = path
        if path.name.startswith(STAGING):
            # Renamed before its files go: a writer of an older attempt that is still alive could otherwise give a
            # half-deleted folder its final name.
            doomed = path.parent / f"{TRASH}{path.name.lstrip('.')}-{os.urandom(3).hex()}"
            try:
                os.rename(path, doomed)
            except OSError:
                continue
        shutil.rmtree(doomed, ignore_errors=True)


def to_prune(folder: Path, keep_last: int, keep_every: int = 0, keep_best: int = 0) -> list[Path]:
    """Complete checkpoints that need not be kept: neither among the newest, nor at an N-th step, nor among the best by validation."""
    older = complete(folder)[keep_last:]
    best: list[Path] = []
    if keep_best:
        scored = [(loss, -(step_of(path) or 0), path) for path in complete(folder) if (loss := val_loss_of(path)) is not None]
        best = [path for _, _, path in sorted(scored)[:keep_best]]
    return [path for path in older if path not in best and not (keep_every and (step_of(path) or 0) % keep_every == 0)]


def val_loss_of(path: Path) -> float | None:
    """The validation loss of the step of a checkpoint, if it was validated and is a number: NaN is no best one."""
    try:
        value = read_manifest(path).state.get("val_loss")
    except CheckpointError:
        return None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def few(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    listed = list(names)
    if not listed:
        return "none"
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def hash_file(path: Path, name: str) -> str:
    """sha256 of one file of a checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        with _open(path, name) as file:
            # Read, not mapped: a mapped file that another client cuts short is a SIGBUS.
            block = memoryview(bytearray(min(_HASH_BLOCK, os.fstat(file.fileno()).st_size + 1)))
            digest = hashlib.sha256()
            while count := file.readinto(block):  # type: ignore[attr-defined]  # a raw file has it
                digest.update(block[:count])
            return digest.hexdigest()
    except OSError as err:
        raise CheckpointError(f"{path.name}: {name} cannot be read ({_said(err)})") from err


def _open(path: Path, name: str) -> BinaryIO:
    """Opens a file of a checkpoint. A user script may have made a link to another file of the same checkpoint (jobs/checkpoint/user_checkpoint.py);
    a link that leads elsewhere, a FIFO or a device is refused. Raises CheckpointError, FileNotFoundError."""
    try:
        inside = os.path.realpath(path / name).startswith(os.path.realpath(path) + os.sep)
        return safe_read.open_file(path / name, links=inside)
    except (DamagedFileError, ValueError) as err:
        raise CheckpointError(f"{path.name}: {name} {str(err).removeprefix(f'{path / name}: ')}") from err


def _said(err: BaseException) -> str:
    return (err.strerror if isinstance(err, OSError) else None) or str(err) or type(err).__name__
