"""Comparison of the fused forward pass of a transformers model with transformers' own: logits, loss and gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.models.hf_blocks import FusedDecoder
from train.models.hf_layer import NotSupported

# Largest relative difference in fp32 that counts as equal: rounding of sums in another order.
TOLERANCE = 1e-4
# Entries of a gradient that are compared; of larger ones every k-th.
_GRADIENT_SAMPLE = 65_536
_PROBE_TOKENS = 48


def accelerate(wrapper: Any, *, seq_len: int, kernels: bool) -> str:
    """Install the fused forward pass on an HFCausalLM if it computes what transformers computes. Returns one line: what was replaced,
    or why not; `wrapper.fused` tells which.

    Compares logits, and gradients of all parameters, of a small input in fp32. Before fp8, 16-bit parameters and sharding."""
    model, decoder = wrapper.model, None
    try:
        if wrapper.own_loss:
            raise NotSupported("it adds terms of its own to the cross entropy")
        decoder = FusedDecoder(model)
        reference = _fingerprint(model, decoder, wrapper.logits, seq_len)
        if kernels:
            decoder.use_kernels()
        decoder.install()
        worst, where = _difference(_fingerprint(model, decoder, decoder.logits, seq_len, loss=decoder.loss_sum), reference)
        if not worst <= TOLERANCE:
            raise NotSupported(f"the fused form differs by {worst:.1e} (relative; {TOLERANCE:.0e} is allowed) in {where}")
    except Exception as err:  # whatever goes wrong here, the original works
        if decoder is not None and hasattr(decoder.layers[0], "fused_from"):
            decoder.remove()
        reason = str(err) if isinstance(err, NotSupported) else f"{type(err).__name__}: {(str(err).splitlines() or [''])[0]}"
        return f"hf: transformers' own forward pass: {reason}"
    wrapper.fused = decoder
    how = "Triton kernels" if kernels else "torch operations"
    return (
        f"hf: {len(decoder.layers)} x {decoder.layers[0].fused_from.__name__} by fused attention, norm and SwiGLU ({how}), loss in chunks;"
        f" logits and gradients equal transformers' own to {worst:.0e}"
    )


@contextmanager
def _exact_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _probe(decoder: FusedDecoder, seq_len: int) -> Tensor:
    """int64 [B, T]; longer than the narrowest sliding window, and with a padding token."""
    windows = [plan.window for plan in decoder.plans if plan.window is not None and plan.window < seq_len]
    T = min(seq_len, max(windows) + 16 if windows else _PROBE_TOKENS)
    table = decoder.body.embed_tokens
    tokens = torch.randint(table.num_embeddings, (2 if T <= 256 else 1, T), generator=torch.Generator().manual_seed(0))
    if table.padding_idx is not None:
        tokens[:, T // 2] = table.padding_idx
    return tokens.to(table.weight.device)


def _fingerprint(
    model: Any, decoder: FusedDecoder, logits_of: Callable[[Tensor], Tensor], seq_len: int, loss: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Logits, and samples of the gradients by all parameters; of the parameters' gradients one at a time is held."""
    out: dict[str, Tensor] = {}

    def keep(name: str, p: Tensor) -> None:
        assert p.grad is not None
        flat = p.grad.reshape(-1)
        out[name] = flat[:: max(1, -(-flat.numel() // _GRADIENT_SAMPLE))].clone()
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p)) for name, p in model.named_parameters() if p.requires_grad]  # type: ignore[misc]
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    training = model.training
    model.eval()
    try:
        with _exact_fp32(), torch.enable_grad():
            tokens = _probe(decoder, seq_len)
            targets = tokens.roll(-1, dims=1)
            logits = logits_of(tokens)
            out["logits"] = logits.detach()
            if loss is None:
                total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            else:
                total = loss(tokens, targets)
            out["the loss"] = total.detach().reshape(1)
            del logits
            total.backward()  # type: ignore[no-untyped-call]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
        for p, grad in before:
            p.grad = grad
    return out


def _difference(made: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference and where it is. A gradient that is nearly zero counts against the largest one."""
    if made.keys() != reference.keys():
        return float("inf"), "gradients of " + ", ".join(sorted(made.keys() ^ reference.keys())[:3])
    outputs = ("logits", "the loss")
    sizes = {name: float(value.double().norm()) for name, value in reference.items()}
    least = 1e-3 * max((size for name, size in sizes.items() if name not in outputs), default=0.0)
    worst, where = 0.0, ""
    for name, value in reference.items():
        gap = float((made[name].double() - value.double()).norm())
        relative = gap / ((sizes[name] + (0.0 if name in outputs else least)) or 1.0)
        if not relative <= worst:
            worst, where = relative, name if name in outputs else f"the gradient of {name}"
    return worst, where
