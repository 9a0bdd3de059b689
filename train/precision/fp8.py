"""fp8 matrix products: our own conversion, layer by layer, with a reason for each layer that is left in bf16.

A converted layer keeps its weight as it is, in fp32 and under the same name; only the product is made in fp8. So the
weights of a checkpoint do not depend on whether they were trained in fp8.
"""

import ctypes
import glob
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.config.settings import Job
from jobs.core.errors import ImpossibleJobError
from jobs.specs.precision import FP8_RECIPES, MXFP8_ARCH

# The fp8 tensor cores want every dimension of a product to be a multiple of 16.
ALIGNMENT = 16
# torch's own order on Hopper; with another cuDNN loaded beside it, it takes the second one first.
_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Recomputing = Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]
# Logits decide the loss directly; every recipe known to converge keeps this layer in bf16.
_HEADS = ("lm_head", "head", "classifier", "score", "output", "out_proj_head", "decoder", "predictions")


@dataclass(frozen=True)
class Layer:
    """What became of one Linear: `reason` says why it stays in bf16, or is empty."""

    name: str
    shape: tuple[int, int]
    reason: str = ""

    @property
    def converted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Converted:
    """The context that forward passes run in, and what became of each Linear. `recompute`: the contexts of a forward pass whose
    activations will be computed again, and of doing so, as torch.utils.checkpoint wants them; None where it needs none. `make` converts one
    more Linear."""

    context: Callable[[], AbstractContextManager[object]] | None
    layers: tuple[Layer, ...]
    recipe: str
    recompute: Recomputing | None = None
    make: Callable[[nn.Linear], nn.Module] | None = None

    def lines(self) -> list[str]:
        """For the start-up report: how many, and the reasons of the others."""
        done = [layer for layer in self.layers if layer.converted]
        left: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                left.setdefault(layer.reason, []).append(layer.name)
        text = [f"fp8 {self.recipe}: {len(done)} of {len(self.layers)} linear layers"]
        for reason, names in left.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            text.append(f"  bf16: {shown} ({reason})")
        return text


def load_early() -> None:
    """Loads Transformer Engine if it is there, with the cuDNN that torch brought, before parts of another one are loaded.

    It looks for cuDNN in the system first. Where that has another version, the two meet in one process: `undefined symbol ...
    libcudnn_graph` at the import, or attention by slower kernels than without fp8 (88 instead of 56 ms of a step; 2.20 with torch
    2.11)."""
    spec = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    for folder in spec.submodule_search_locations or () if spec else ():
        os.environ.setdefault("CUDNN_HOME", folder)
        # All of its parts, since Transformer Engine's library asks for each of them by name.
        for library in sorted(glob.glob(f"{folder}/lib/libcudnn*.so.*")):
            with suppress(OSError):
                ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    with suppress(Exception):  # a library built against another torch raises whatever it likes, and will be told when it is needed
        import transformer_engine.pytorch  # noqa: F401


def recipe_of(job: Job) -> str:
    """The recipe of a job, its backend's default when none is given. Raises ImpossibleJobError for another backend's."""
    allowed = FP8_RECIPES[job.fp8_backend]
    recipe = job.fp8_recipe or allowed[0]
    if recipe not in allowed:
        raise ImpossibleJobError(f"FP8_RECIPE={recipe} is not one of FP8_BACKEND={job.fp8_backend}; choose one of {', '.join(allowed)}.")
    return recipe


def convert(model: nn.Module, job: Job, *, emulate: bool = False, make_linear: Callable[[nn.Linear], nn.Module] | None = None) -> Converted:
    """Puts fp8 layers into `model`, in place. `emulate` (torchao) computes fp8 rounding on any device, for tests;
    `make_linear` stands in for Transformer Engine's layer where that is not installed.

    Raises ImpossibleJobError when the library is missing, or no layer of this model can be converted."""
    recipe = recipe_of(job)
    if job.micro_batch_size and (job.micro_batch_size * job.seq_len) % ALIGNMENT:
        raise ImpossibleJobError(
            f"PRECISION=fp8: MICRO_BATCH_SIZE={job.micro_batch_size} x SEQ_LEN={job.seq_len} tokens is no multiple of {ALIGNMENT}, which fp8 products need."
        )
    layers = plan(model)
    chosen = {layer.name for layer in layers if layer.converted}
    if not chosen:
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers)) or "it has no linear layer"
        raise ImpossibleJobError(f"PRECISION=fp8: no layer of this model can be converted ({reasons}). Nearest that works: PRECISION=bf16.")
    if job.fp8_backend == "torchao":
        make, context = _convert_torchao(model, chosen, recipe, job.fp8_fast_accum, emulate), None
    else:
        make, context = (make_linear, None) if make_linear else _transformer_engine(recipe, job.fp8_fast_accum)
        for name in chosen:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            old = getattr(owner, child)
            assert isinstance(old, nn.Linear)
            setattr(owner, child, _same_weights(old, make(old)))
    return Converted(context, tuple(layers), f"{job.fp8_backend} {recipe}", _recomputing(context) if context else None, make)


def plan(model: nn.Module) -> list[Layer]:
    """Every Linear of a model with what is to become of it. All of them are looked at: an odd one stops nothing."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.in_features, module.out_features)
        reason = ""
        if any(part in _HEADS for part in name.split(".")):
            reason = "output head"
        elif uses[id(module.weight)] > 1:
            reason = "tied weight"
        elif shape[0] % ALIGNMENT or shape[1] % ALIGNMENT:
            reason = f"{shape[0]} x {shape[1]} is no multiple of {ALIGNMENT}"
        elif not module.weight.requires_grad:
            reason = "frozen"
        elif type(module) is not nn.Linear:
            reason = f"is a {type(module).__name__} of its own"
        layers.append(Layer(name, shape, reason))
    return layers


def _same_weights(old: nn.Linear, new: nn.Module) -> nn.Module:
    """`new` with the parameters of `old`: the same objects, so that ties and names stay."""
    new.weight = old.weight
    if old.bias is not None:
        new.bias = old.bias
    return new


def _transformer_engine(recipe: str, fast: str) -> tuple[Callable[[nn.Linear], nn.Module], Callable[[], AbstractContextManager[object]]]:
    load_early()
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as te_recipes
    except ImportError as err:
        raise ImpossibleJobError(f"PRECISION=fp8 with FP8_BACKEND=te needs Transformer Engine ({err}); `make te` builds it, or FP8_BACKEND=torchao.") from err
    if recipe == "mxfp8" and torch.cuda.get_device_capability() < divmod(MXFP8_ARCH, 10):
        raise ImpossibleJobError("FP8_RECIPE=mxfp8 needs Blackwell (sm_100); here FP8_RECIPE=current works.")
    # Without it an accumulator of the tensor cores is emptied into fp32 after every few products.
    short = te_recipes.MMParams(use_split_accumulator=False)
    products = {name: short for name, when in (("fp8_gemm_dgrad", ("grad_input", "all")), ("fp8_gemm_wgrad", ("all",))) if fast in when}
    kinds: dict[str, Callable[[], Any]] = {
        "current": lambda: te_recipes.Float8CurrentScaling(**products),
        # Amax history of 16 steps: short enough to follow a young run, long enough to be calm.
        "delayed": lambda: te_recipes.DelayedScaling(amax_history_len=16, amax_compute_algo="max"),
        "block": te_recipes.Float8BlockScaling,
        "mxfp8": te_recipes.MXFP8BlockScaling,
    }
    chosen = kinds[recipe]()
    # te.autocast is its name since 2.9; the older one is announced for removal.
    autocast = te.autocast if hasattr(te, "autocast") else te.fp8_autocast
    names = ("enabled", "recipe") if hasattr(te, "autocast") else ("enabled", "fp8_recipe")

    def context() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(autocast(**dict(zip(names, (True, chosen), strict=True))))
        stack.enter_context(sdpa_kernel(_ATTENTION, set_priority=True))
        return stack

    def make(old: nn.Linear) -> nn.Module:
        with torch.device(old.weight.device):
            layer: nn.Module = te.Linear(old.in_features, old.out_features, bias=old.bias is not None, params_dtype=old.weight.dtype)
        return layer

    return make, context


def _recomputing(context: Callable[[], AbstractContextManager[object]]) -> Recomputing:
    """What Transformer Engine wants to know where activations are recomputed: the backward pass, in which that happens, is outside of
    the context of fp8, and the scales of `delayed` have to be those of the first time."""

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        from transformer_engine.pytorch.distributed import activation_recompute_forward

        @contextmanager
        def again() -> Iterator[None]:
            with activation_recompute_forward(activation_recompute=True, recompute_phase=True), context():
                yield

        return activation_recompute_forward(activation_recompute=True, recompute_phase=False), again()

    return contexts


def _convert_torchao(model: nn.Module, chosen: set[str], recipe: str, fast: str, emulate: bool) -> Callable[[nn.Linear], nn.Module]:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.config import Float8GemmConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as err:
        raise ImpossibleJobError(f"PRECISION=fp8 with FP8_BACKEND=torchao needs torchao ({err}); `pip install 'holdfast[torchao]'`.") from err
    import dataclasses

    config = Float8LinearConfig.from_recipe_name(recipe)
    if fast != "forward":
        config = dataclasses.replace(config, gemm_config_grad_input=Float8GemmConfig(use_fast_accum=True))
    if fast == "all":
        config = dataclasses.replace(config, gemm_config_grad_weight=Float8GemmConfig(use_fast_accum=True))
    if emulate:
        config = dataclasses.replace(config, emulate=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in chosen)

    def make(old: nn.Linear) -> nn.Module:
        return Float8Linear.from_float(old, config)  # type: ignore[no-any-return]

    return make
