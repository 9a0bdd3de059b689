"""How a model is spread over the ranks: copied (DDP, by Accelerate) or sharded (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor import DTensor

from jobs.config.settings import Job
from jobs.config.types import BUCKETS, SMALL_BUCKET_MB
from jobs.specs.precision import MODES
from train.distributed.runtime import Distributed


def shard(model: nn.Module, job: Job, rt: Distributed) -> None:
    """FSDP2 over all ranks, in place: each block is a unit of its own, the rest is the root. Before the optimizer is built.

    Weights stay fp32 in the shards; the working copies have the dtype of the precision, gradients are reduced in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    dtype_name = MODES[job.precision].autocast
    dtype = getattr(torch, dtype_name) if dtype_name and rt.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def ddp_options(job: Job, model: nn.Module) -> dict[str, Any]:
    """Arguments of DistributedDataParallel: buffers are sent once a step (train/train_step.py), not at each forward pass; gradients live in the
    buckets, not beside them."""
    return {"broadcast_buffers": False, "gradient_as_bucket_view": True, "bucket_cap_mb": _bucket_mb(job, model)}


def _bucket_mb(job: Job, model: nn.Module) -> int:
    """The setting bucket_cap_mb, with what `auto` means. While a bucket is being all-reduced, NCCL kernels occupy SMs that the GEMMs could
    use, and most of that time each rank only waits for the others: few large buckets cost the GEMMs less (measured on two GPUs of a node,
    benchmarks/results/2026-11-28-speed.md). The last one hides behind nothing, which weighs more between nodes: there torch's own size stays."""
    if job.bucket_cap_mb != "auto":
        return job.bucket_cap_mb
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return max(gradients // 2**20 // BUCKETS, SMALL_BUCKET_MB) if job.nodes == 1 else SMALL_BUCKET_MB


def prepare(model: nn.Module, job: Job, rt: Distributed) -> nn.Module:
    """What forward goes through: DDP around the model, or the model itself where it is sharded or alone."""
    if rt.world_size == 1 or is_sharded(model):
        return model
    rt.accelerator.ddp_handler = DistributedDataParallelKwargs(**ddp_options(job, model))
    return rt.accelerator.prepare_model(model)  # type: ignore[no-any-return]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the members of its longest ModuleList."""
    return max((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=[])


@contextmanager
def accumulating(model: nn.Module, rt: Distributed, last: bool) -> Iterator[None]:
    """Around one micro-step: gradients travel between ranks only in the last one of a step."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
        return
    with nullcontext() if last else rt.accelerator.no_sync(model):
        yield


def share_buffers(model: nn.Module, rt: Distributed) -> None:
    """Gives every rank the saved buffers of rank 0 (running statistics, a codebook): what a checkpoint holds is what is trained and
    validated with, whoever computes it, also after a resume."""
    if rt.world_size > 1:
        send_buffers(saved_buffers(model), rt)


def saved_buffers(model: nn.Module) -> list[torch.Tensor]:
    """This rank's part of the buffers that a checkpoint holds, sorted by element size so that the packed buffer stays aligned."""
    saved = model.state_dict(keep_vars=True)
    return sorted((local(buffer.data) for name, buffer in model.named_buffers() if name in saved), key=lambda buffer: -buffer.element_size())


def send_buffers(buffers: list[torch.Tensor], rt: Distributed) -> None:
    """From rank 0 to the others, in one message."""
    if not buffers:
        return
    packed = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
    torch.distributed.broadcast(packed, src=0)
    if rt.rank:
        for buffer, piece in zip(buffers, packed.split([buffer.nbytes for buffer in buffers]), strict=True):
            buffer.copy_(piece.view(buffer.dtype).view(buffer.shape))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every rank. Collective for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
