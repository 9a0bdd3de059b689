"""Checkpoints: what one holds, how it comes to be complete, and which one is resumed from.

    checkpoints/step-00001200/
      model.safetensors       fp32 weights and buffers, by name
      optimizer.safetensors   moments of the optimizer, as <parameter>/<moment>
      state.json              step, tokens, seed, horizon, data, and what else a resume needs
      manifest.json           name, bytes and sha256 of every file; written last

A directory under its final name is complete: it is written aside under a name that carries the attempt, flushed file by
file, and renamed. Nothing that is read here can run code.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from jobs.errors import CheckpointError
from train.optim import load_state_by_name, state_by_name

FORMAT = 1
_PREFIX = "step-"
_MODEL, _OPTIMIZER, _STATE, _MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class State:
    """Everything beside weights and moments. `pending` is a log line whose validation is still to be done."""

    step: int
    tokens: int
    seed: int
    max_steps: int
    batch_size: int
    data: str
    precision: str
    world: int
    pending: dict[str, Any] | None = None
    scaler: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a complete checkpoint's name; None for anything else in the folder."""
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdigit() else None


def complete(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first."""
    try:
        found = [path for path in folder.iterdir() if step_of(path) is not None]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and saved buffers, each once: a tied weight goes by the first of its names."""
    parameters = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {**parameters, **buffers}


def save(folder: Path, attempt: int, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int) -> Path:
    """Writes and commits a checkpoint; then prunes. Raises CheckpointError, and the older ones stand as they were."""
    final = path_of(folder, state.step)
    staging = folder / f".{final.name}.tmp-{attempt}"
    try:
        folder.mkdir(exist_ok=True)
        if staging.exists():
            _throw_away(staging)
        staging.mkdir()
        weights = {name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous() for name, tensor in named_tensors(model).items()}
        moments = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state_by_name(optimizer, model).items()}
        save_file(weights, staging / _MODEL)
        save_file(moments, staging / _OPTIMIZER)
        (staging / _STATE).write_text(json.dumps(asdict(state), indent=1))
        files = {}
        for name in (_MODEL, _OPTIMIZER, _STATE):
            files[name] = {"bytes": (staging / name).stat().st_size, "sha256": _flush_and_hash(staging / name)}
        (staging / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": state.step, "attempt": attempt, "files": files}, indent=1))
        _flush_and_hash(staging / _MANIFEST)
        _flush_folder(staging)
        if final.exists():
            # The same step saved twice (after a resume that trained no further): the newer one replaces it.
            _throw_away(final)
        # Rename last: a directory under its final name is complete by definition.
        os.rename(staging, final)
        _flush_folder(folder)
    except OSError as err:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {state.step} could not be written to {folder}: {err.strerror or err}. The ones before it are untouched.") from err
    _prune(folder, keep_last)
    return final


def verify(path: Path) -> None:
    """Raises CheckpointError when a file of the checkpoint is missing, has another size, or another content."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if manifest["format"] != FORMAT or int(manifest["step"]) != step_of(path) or not {_MODEL, _OPTIMIZER, _STATE} <= set(files):
            raise CheckpointError(f"{path.name}: its manifest belongs to another step or format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path.name}: its manifest cannot be read ({err})") from err
    for name, (size, digest) in files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{path.name}: {name} has {found} bytes, the manifest says {size}")
            if _hash(path / name) != digest:
                raise CheckpointError(f"{path.name}: the content of {name} does not match its sum")
        except OSError as err:
            raise CheckpointError(f"{path.name}: {name} cannot be read ({err.strerror})") from err


def newest_verified(folder: Path, attempt: int) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that verifies, and (new name, reason) of each damaged one that was set aside on the way."""
    damaged = []
    for path in complete(folder):
        try:
            verify(path)
        except CheckpointError as err:
            aside = folder / f".damaged-{path.name}-{attempt}"
            os.rename(path, aside)
            damaged.append((aside.name, str(err)))
            continue
        return path, damaged
    return None, damaged


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[State, list[str]]:
    """Puts a verified checkpoint into model and optimizer. Returns its state and remarks for the log.

    Raises CheckpointError that names missing and unknown weights."""
    try:
        weights = load_file(path / _MODEL)
        known = json.loads((path / _STATE).read_text())
        state = State(**{name: value for name, value in known.items() if name in State.__dataclass_fields__})
        tensors = named_tensors(model)
        missing, unknown = sorted(set(tensors) - set(weights)), sorted(set(weights) - set(tensors))
        if missing or unknown:
            raise CheckpointError(f"{path.name} does not fit this model: missing {_few(missing)}, unknown {_few(unknown)}. Is it another MODEL or MODEL_OPTIONS?")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.shape != weights[name].shape:
                    raise CheckpointError(f"{path.name}: {name} is {tuple(weights[name].shape)}, this model has {tuple(tensor.shape)}")
                tensor.copy_(weights[name])
        remarks = []
        if optimizer is not None:
            fresh = load_state_by_name(optimizer, model, load_file(path / _OPTIMIZER))
            if fresh:
                remarks.append(f"no optimizer state for {_few(fresh)}: they start fresh")
    except (OSError, SafetensorError, ValueError, TypeError) as err:
        raise CheckpointError(f"{path.name} cannot be loaded: {err}") from err
    return state, remarks


def clear_leftovers(folder: Path) -> None:
    """Deletes what an earlier attempt began and never finished. Only the owner of the run may call this."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((f".{_PREFIX}", ".trash-")):
                shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, keep_last: int) -> None:
    for path in complete(folder)[keep_last:]:
        _throw_away(path)


def _throw_away(path: Path) -> None:
    """Renamed first: a deletion that is cut short must leave nothing damaged under a final name."""
    trash = path.parent / f".trash-{path.name.lstrip('.')}-{os.getpid()}-{os.urandom(3).hex()}"
    os.rename(path, trash)
    _flush_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_and_hash(path: Path) -> str:
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _flush_folder(path: Path) -> None:
    """A rename or a new file is safe only when the folder that holds its name is on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _few(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
