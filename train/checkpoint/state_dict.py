"""Checkpoints: what one holds, how tensors become its files, and how they come back into a model.

Names, manifest and verification are in jobs/checkpoint/directory.py, the order of calls that makes a checkpoint complete in
jobs/checkpoint/commit.py, and who writes when in train/checkpoint/manager.py. Weights are fp32 whatever the precision of training, moments go by
the name of their parameter, and a sharded tensor is saved as rows: so a checkpoint resumes at any precision, at any number of
processes and in any parallel mode. Files are safetensors: nothing that is read here can run code.
"""

import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from jobs.checkpoint import directory
from jobs.checkpoint.directory import MODEL, OPTIMIZER, few, read_manifest
from jobs.core.errors import CheckpointError, SettingError
from train.checkpoint.host_staging import PinnedCopier
from train.optim import fp32_of, load_state_by_name, masters_to_parameters, state_by_name

# As much as one processor hashes in about a second.
FILE_BYTES = 2 * 2**30
# What safetensors calls the types.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True)
class TrainStateRecord:
    """The state of a checkpoint besides weights and moments. `pending`: log line whose validation is still to be finished; `val_loss`:
    set when that step was validated. `samples` and `content` describe the data: what is stored under a name may change."""

    step: int
    tokens: int
    seed: int
    max_steps: int
    batch_size: int
    data: str
    precision: str
    world: int
    parallel: str = "ddp"
    samples: int | None = None
    content: str | None = None
    val_loss: float | None = None
    pending: dict[str, Any] | None = None
    scaler: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TensorShard:
    """The part of a tensor that one process holds: rows [start, start + len) of `total`, or all of it when `total` is None."""

    tensor: torch.Tensor
    start: int = 0
    total: int | None = None


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """fp32 weights and saved buffers, each once: a tied weight goes by the first of its names."""
    parameters = {name: fp32_of(p) for name, p in model.named_parameters()}
    saved = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {**parameters, **buffers}


def local_shards(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, writers: int = 1) -> dict[str, dict[str, TensorShard]]:
    """Name of a file -> name of a tensor -> what this process, one of `writers`, has to save of it. Views: nothing is copied.

    A kind that is larger lies in files of about FILE_BYTES, of which each writer has the same number."""
    for module in model.modules():
        # After a validation FSDP still has the gathered weights in place of its shards.
        if isinstance(module, FSDPModule):
            module.reshard()
    kinds = {MODEL: named_tensors(model), OPTIMIZER: state_by_name(optimizer, model)}
    found: dict[str, dict[str, TensorShard]] = {}
    for kind, tensors in kinds.items():
        # Sizes of whole tensors, sharded or not: all writers come to the same numbers.
        sizes = {name: tensor.numel() * host_type(kind, tensor).itemsize for name, tensor in tensors.items()}
        share = max(sum(sizes.values()) / writers, 1)
        files = math.ceil(share / FILE_BYTES)
        names = [directory.file_name(kind, rank * files + number, writers * files) for number in range(files)]
        found |= {name: {} for name in names}
        behind = 0.0
        for name, tensor in tensors.items():
            rows = _mine(tensor.detach(), rank)
            if rows is not None:
                # By where its middle lies: files of about the same size, whatever the sizes of tensors.
                found[names[min(int((behind + sizes[name] / writers / 2) / share * files), files - 1)]][name] = rows
            behind += sizes[name] / writers
    return found


def host_type(kind: str, tensor: torch.Tensor) -> torch.dtype:
    """The type to save in: weights at least fp32, everything else as it is. `kind` may be the name of a file."""
    weights = kind.partition(".")[0] == MODEL
    return torch.float32 if weights and tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype


def refuse_unsavable(model: nn.Module, name: str) -> None:
    """Raises SettingError for weights and buffers of a type that no checkpoint can hold: at the start, not hours later at the first save."""
    held = {key: host_type(MODEL, tensor) for key, tensor in named_tensors(model).items()}
    readable = {dtype for dtype in set(held.values()) if dtype in _TYPES and _is_read(dtype)}
    wrong = [f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in held.items() if dtype not in readable]
    if wrong:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES if _is_read(dtype))
        raise SettingError(
            f"model: {name!r} has what no checkpoint can hold: {few(wrong)}. Change the type, or register a buffer that is computed anew with persistent=False;"
            f" allowed with safetensors {safetensors.__version__}: {allowed}"
        )


def _is_read(dtype: torch.dtype) -> bool:
    """Whether the library reads what is written here: complex64 only from 0.7 on."""
    try:
        safetensors.deserialize(b"".join(safetensors_parts({"one": TensorShard(torch.zeros(1, dtype=dtype))})))
    except SafetensorError:
        return False
    return True


def safetensors_parts(tensors: Mapping[str, TensorShard], about: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """A safetensors file in pieces: its header, and the bytes of contiguous CPU tensors where they lie.

    Written by hand, because the library's own writer makes a second copy of everything first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].tensor.element_size(), name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        tensor = tensors[name].tensor
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    rows = {name: [tensors[name].start, tensors[name].total] for name in order if tensors[name].total is not None}
    if rows or about:
        header["__metadata__"] = {**(about or {}), **({"rows": json.dumps(rows)} if rows else {})}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = [tensors[name].tensor.reshape(-1).view(torch.uint8).numpy().data for name in order]
    return [len(text).to_bytes(8, "little") + text, *bodies]


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[TrainStateRecord, list[str]]:
    """Puts a verified checkpoint into model and optimizer. Returns its state and remarks for the log.

    Raises CheckpointError that names missing and unknown weights."""
    try:
        manifest = read_manifest(path)
        state = TrainStateRecord(**{name: value for name, value in manifest.state.items() if name in TrainStateRecord.__dataclass_fields__})
        weights = CheckpointReader(path, manifest.of_kind(MODEL))
        tensors = named_tensors(model)
        missing, unknown = sorted(set(tensors) - set(weights.shapes)), sorted(set(weights.shapes) - set(tensors))
        if missing or unknown:
            raise CheckpointError(f"{path.name} does not fit this model: missing {few(missing)}, unknown {few(unknown)}. Is it another MODEL or MODEL_OPTIONS?")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != weights.shapes[name]:
                raise CheckpointError(f"{path.name}: {name} is {weights.shapes[name]}, this model has {tuple(tensor.shape)}")
        remarks = []
        with PinnedCopier() as filling:
            for name, tensor in tensors.items():
                filling.add(tensor.to_local() if isinstance(tensor, DTensor) else tensor, weights.rows_of(name, tensor))
            if optimizer is not None:
                fresh, dropped = _load_moments(CheckpointReader(path, manifest.of_kind(OPTIMIZER)), model, optimizer, filling)
        with torch.no_grad():
            masters_to_parameters(model)
        if optimizer is not None:
            if fresh:
                remarks.append(f"no optimizer state for {few(fresh)}: they start fresh")
            if dropped:
                remarks.append(f"optimizer state of {few(dropped)} was dropped: this model does not train them")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as err:
        raise CheckpointError(f"{path.name} cannot be loaded: {err}") from err
    return state, remarks


class CheckpointReader:
    """The tensors of one kind in a checkpoint, whole or by rows, whatever number of processes wrote them."""

    def __init__(self, path: Path, files: Iterable[str]):
        self._files = [safe_open(path / name, framework="pt", device="cpu") for name in files]
        # name -> [(first row, file)], in the order of rows; a tensor that was not sharded has one part.
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        held: dict[str, int] = {}
        for file in self._files:
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                start, total = rows.get(name, (0, None))
                self._parts.setdefault(name, []).append((start, file))
                self.shapes[name] = shape if total is None else (total, *shape[1:])
                held[name] = held.get(name, 0) + (shape[0] if total is not None else 0)
                if total is None:
                    held.pop(name)
        lacking = sorted(name for name, count in held.items() if count != self.shapes[name][0])
        if lacking:
            raise CheckpointError(f"{path.name}: rows are missing of {few(lacking)}")
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])

    def whole(self, name: str) -> torch.Tensor:
        return self._rows(name, 0, self.shapes[name][0]) if self.shapes[name] else self._parts[name][0][1].get_tensor(name)

    def rows_of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The part of a saved tensor that this process holds of `like`."""
        if not isinstance(like, DTensor):
            return self.whole(name)
        start, count = _span(like)
        return self._rows(name, start, start + count)

    def _rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        pieces = []
        for start, file in self._parts[name]:
            piece = file.get_slice(name)
            first, last = max(begin, start), min(end, start + piece.get_shape()[0])
            if first < last:
                if (first, last) == (start, start + piece.get_shape()[0]):
                    pieces.append(file.get_tensor(name))
                else:
                    pieces.append(piece[first - start : last - start])
        if not pieces:
            return self._parts[name][0][1].get_slice(name)[0:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _load_moments(saved: CheckpointReader, model: nn.Module, optimizer: torch.optim.Optimizer, filling: PinnedCopier) -> tuple[list[str], list[str]]:
    """Names of parameters without moments, and of saved moments without a parameter. The moments are there when `filling` is done."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, torch.Tensor] = {}
    dropped = []
    for key, shape in saved.shapes.items():
        parameter = trained.get(key.rpartition("/")[0])
        if parameter is None:
            dropped.append(key)
        elif isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
            local = filling.new(saved.rows_of(key, parameter), parameter.device)
            moments[key] = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
        elif shape:
            moments[key] = filling.new(saved.whole(key), parameter.device)
        else:
            # A counter: where it belongs is known where it is put back. A copy, as what is read is a view of the file.
            moments[key] = saved.whole(key).clone()
    return load_state_by_name(optimizer, model, moments), sorted({key.rpartition("/")[0] for key in dropped})


def _mine(tensor: torch.Tensor, rank: int) -> TensorShard | None:
    """What this process saves of a tensor. What all of them hold alike is saved by rank 0."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor) if rank == 0 else None
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    if any(at for at, placement in zip(coordinate, tensor.placements, strict=True) if not isinstance(placement, Shard)):
        return None  # a replica: the process at 0 has the same rows
    start, _ = _span(tensor)
    return TensorShard(tensor.to_local(), start, tensor.shape[0])


def _span(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows of what this process holds. FSDP2 cuts the first dimension as torch.chunk does."""
    shards = {dim: placement for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)}
    sharded = list(shards)
    if len(sharded) > 1 or any(placement.dim != 0 for placement in shards.values()):
        raise CheckpointError(f"a tensor laid out as {tensor.placements} cannot be saved or loaded: only shards of the first dimension are known")
    rows = tensor.to_local().shape[0]
    if not sharded:
        return 0, rows
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size(sharded[0]))
    start = min(coordinate[sharded[0]] * chunk, tensor.shape[0])
    if rows != min(chunk, tensor.shape[0] - start):
        raise CheckpointError(f"a tensor of {tensor.shape[0]} rows is laid out as {tensor.placements} with {rows} rows here: that layout is not known")
    return start, rows


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "platform": sys.platform,
    }
