"""From settings to what is trained: the model as the precision wants it, and the data."""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn

from jobs.config.settings import Job
from jobs.core.errors import SettingError
from jobs.specs.precision import Precision
from train import optim
from train.checkpoint.state_dict import refuse_unsavable
from train.compilation.cache_directory import use_private_caches
from train.compilation.toolchain import require_compiler
from train.data.sources import Dataset, open_data
from train.distributed.parallel import shard as shard_model
from train.distributed.runtime import Distributed
from train.kernels import usable
from train.models.gpt import GPT
from train.models.hf import HFCausalLM
from train.models.hf_equality import accelerate
from train.models.registry import PRESETS, build_model
from train.precision.fp8 import Recomputing, convert
from train.precision.numerics import autocast_context


def build(
    job: Job, data: Dataset, rt: Distributed, say: Callable[[str], None], *, drawn: bool = True
) -> tuple[nn.Module, Callable[[], AbstractContextManager[object]]]:
    """The model on its device, and the context of its forward passes: precision, recomputation, sharding, compilation.

    `say` is told what became of each layer under fp8. `drawn` false: a checkpoint will be loaded, so the built-in model need not have
    its weights drawn, which takes a processor 15 s for a billion. Raises SettingError and ImpossibleJobError."""
    use_private_caches(say)
    if job.compile:
        require_compiler(rt.device)
    options = dict(job.model_options)
    if job.grad_checkpointing and job.model in PRESETS:
        options.setdefault("checkpoint_blocks", True)
    with nullcontext() if drawn or job.model not in PRESETS else torch.device("meta"):
        model = build_model(job.model, vocab_size=data.vocab_size, seq_len=job.seq_len, overrides=options)
    if isinstance(model, GPT) and model.cos.is_meta:
        model.to_empty(device=rt.device)
        model.fill_tables()
    low = weights_to_fp32(model)
    if low:
        say(f"  {low} parameters of the model are 16-bit: kept in fp32, which small updates need; PRECISION decides what computes in less")
    model.to(rt.device)
    fp8, recomputing = None, None
    if isinstance(model, HFCausalLM):
        _accelerate(model, job, rt, say)
    if job.precision is Precision.FP8:
        converted = convert(model, job)
        fp8, recomputing = converted.context, converted.recompute
        for line in converted.lines():
            say("  " + line)
        if isinstance(model, HFCausalLM) and model.fused is not None:
            model.fused.join_products(converted.make)
    if isinstance(model, GPT):
        model.recomputing = recomputing or model.recomputing
    if job.grad_checkpointing and job.model not in PRESETS:
        _recompute(model, job, recomputing)
    if job.amp_opt_level == "O2":
        optim.use_16_bit_parameters(job, model)
    if job.fused_kernels and isinstance(model, GPT):
        reason = usable(rt.device)
        if reason is None:
            model.use_kernels()
            say("  fused kernels: norm, SwiGLU, rotary positions, loss, AdamW")
        elif rt.device.type == "cuda":
            say(f"  warning: FUSED_KERNELS has no effect: {reason}")
    refuse_unsavable(model, job.model)
    if job.parallel == "fsdp" and rt.world_size > 1:
        shard_model(model, job, rt)
    if job.compile:
        regions = getattr(model, "compile_regions", model.compile)
        regions()
    return model, autocast_context(job.precision, rt.device, fp8)


def weights_to_fp32(model: nn.Module) -> int:
    """Turns 16-bit parameters into fp32 ones, in place; returns how many there were. In 16 bits updates below a part in 256 of a weight are lost."""
    low = (torch.bfloat16, torch.float16)
    count = sum(p.dtype in low for p in model.parameters())
    if count:
        for p in model.parameters():
            if p.dtype in low:
                p.data = p.data.float()
        for name, buffer in list(model.named_buffers()):
            if buffer.dtype in low:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, buffer.float())
    return count


def _accelerate(model: HFCausalLM, job: Job, rt: Distributed, say: Callable[[str], None]) -> None:
    """Gives a causal language model of transformers the fused forward pass, where all ranks find that it computes the same."""
    kernels = job.fused_kernels and usable(rt.device) is None
    if kernels:
        from train.kernels.cross_entropy import terms

        model.terms = terms
    if job.hf_fast == "off":
        say("  hf: transformers' own forward pass: HF_FAST=off")
        return
    line = accelerate(model, seq_len=job.seq_len, kernels=kernels)
    if rt.world_size > 1:
        everywhere = torch.tensor(float(model.fused is not None), device=rt.device)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        if model.fused is not None and not bool(everywhere):
            model.fused.remove()
            model.fused, line = None, "hf: transformers' own forward pass: the fused form differs on another rank"
    say("  " + line)


def _recompute(model: nn.Module, job: Job, recomputing: Recomputing | None) -> None:
    """Has a model that is not ours recompute its activations, as models of transformers offer it. Raises SettingError where it cannot."""
    if isinstance(model, HFCausalLM) and model.fused is not None:
        model.fused.recompute = recomputing or noop_context_fn
        return
    owner = getattr(model, "model", model)
    # The first is the name of the second from transformers 6 on.
    for method, argument in (
        ("activation_checkpointing_enable", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing_enable", "gradient_checkpointing_kwargs"),
    ):
        enable = getattr(owner, method, None)
        if enable is None:
            continue
        if argument in inspect.signature(enable).parameters:
            enable(**{argument: {"use_reentrant": False} | ({"context_fn": recomputing} if recomputing else {})})
        elif recomputing:
            raise SettingError(
                f"GRAD_CHECKPOINTING: {method}() of {job.model} takes no {argument}, and Transformer Engine has to know when its layers are computed again. FP8_BACKEND=torchao need not."
            )
        else:
            enable()
        return
    raise SettingError(f"GRAD_CHECKPOINTING: {job.model} has no gradient_checkpointing_enable(); recompute inside your own model instead.")


def open_split(job: Job, split: Any) -> Dataset:
    """The job's data, `split` train or val; what has to be made of it once is kept in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
    return open_data(job.data, seq_len=job.seq_len, split=split, cache_dir=cache, options=job.data_options)
