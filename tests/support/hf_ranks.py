"""Gradients of the fused forward pass under DDP and FSDP2, with recomputation: started by tests/train/models/test_hf_blocks.py through torchrun."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import noop_context_fn

from tests.train.models.test_hf_blocks import assert_equal, batch, built, own_forward
from train.distributed.parallel import blocks_of, whole
from train.models import hf_equality


def check(name: str, parallel: str) -> None:
    model = built(name)
    names = list(model.state_dict())
    reference = own_forward(model, *batch())
    model.zero_grad()
    said = hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is not None, said
    model.fused.recompute = noop_context_fn
    wrapped: torch.nn.Module = model
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for block in (*blocks_of(model), model):
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens, targets = batch()
    loss = wrapped(tokens=tokens, targets=targets)
    loss.backward()
    gradients = {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    assert_equal((reference[0], loss.detach(), gradients), reference)
    assert list(model.state_dict()) == names


dist.init_process_group("gloo")
for model_name in ("llama", "llama tied", "qwen3", "phi3", "olmo2"):
    for way in ("fsdp", "ddp"):
        check(model_name, way)
dist.destroy_process_group()
