"""The fused forward pass of one decoder layer of transformers, on its own modules and parameters.

Shape letters as in gpt.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.ops import norm, rotate

_OLMO_EPS = 1e-5


class NotSupported(Exception):
    """Why a model keeps transformers' own forward pass."""


@dataclass(frozen=True)
class LayerPlan:
    """What a decoder layer computes.

    scale: of attention scores.       window: keys that a query sees, or None for all before it.
    table: which rotary table, or None without rotary positions.       qk_norm: `head` for each head, `all` for all heads together.
    post_norm: norms follow attention and MLP instead of preceding them.       residual: factor on what is added to the stream."""

    heads: int
    kv_heads: int
    channels: int
    scale: float
    window: int | None
    table: str | None
    qk_norm: str | None
    clip: float | None
    post_norm: bool
    residual: float
    attention_dropout: float
    dropout: float


def plan_of(config: Any, layer: Any, index: int) -> LayerPlan:
    """Raises NotSupported for a layer whose modules are not those of its family."""
    try:
        attention, mlp = layer.self_attn, layer.mlp
        heads, kv_heads, channels = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        post_norm = hasattr(layer, "post_feedforward_layernorm")
        norms = ("post_attention_layernorm", "post_feedforward_layernorm") if post_norm else ("input_layernorm", "post_attention_layernorm")
        for name in (*norms, "self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(name)
        qk_norm = None
        if hasattr(attention, "q_norm"):
            qk_norm = "head" if attention.q_norm.weight.numel() == channels and heads > 1 else "all"
        window = getattr(attention, "sliding_window", None)
        if config.model_type in ("mistral", "phi3"):
            window = getattr(config, "sliding_window", None)
        table = getattr(config, "layer_types", [""] * (index + 1))[index] if config.model_type == "olmo3" else ""
        dropout = getattr(config, "resid_pdrop", None) if hasattr(layer, "resid_mlp_dropout") else getattr(config, "residual_dropout", None)
        act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    except (AttributeError, IndexError) as err:
        raise NotSupported(f"layer {index} is not built like {config.model_type!r}: {err}") from err
    if act is not None and type(act).__name__ not in ("SiLU", "SiLUActivation"):
        raise NotSupported(f"its MLP uses {type(act).__name__}, not SiLU")
    return LayerPlan(
        heads=heads,
        kv_heads=kv_heads,
        channels=channels,
        scale=float(attention.scaling),
        window=window,
        # 0 for a layer without rotary positions.
        table=table if getattr(attention, "use_rope", True) else None,
        qk_norm=qk_norm,
        clip=getattr(config, "clip_qkv", None),
        post_norm=post_norm,
        residual=float(getattr(config, "residual_multiplier", 1.0)),
        attention_dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
        dropout=float(dropout or 0.0),
    )


# --- products of one input with several weights


def _concatenated(name: str) -> property:
    return property(lambda self: torch.cat([getattr(part, name) for part in self.parts]))


def _bias_of(layer: nn.Module) -> Tensor | None:
    """None as well for the empty tensor that Transformer Engine has in place of no bias."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) and bias.numel() else None


def join(layer: nn.Module, parts: tuple[nn.Module, ...]) -> nn.Module:
    """Make `layer` a view of `parts`: its weight is the concatenation of theirs, at each use. Returns `layer`.

    It owns no parameters; the optimizer, DDP, FSDP2 and checkpoints see those of the parts."""
    names = ["weight"] if _bias_of(parts[0]) is None else ["weight", "bias"]
    for name in names:
        layer._parameters.pop(name)
    cls = type(layer)
    layer.__class__ = _JOINED.setdefault((cls, *names), type(f"Joined{cls.__name__}", (cls,), {name: _concatenated(name) for name in names}))
    layer.parts = parts  # type: ignore[assignment]  # a tuple: not registered
    return layer


_JOINED: dict[tuple[Any, ...], type[nn.Module]] = {}


def product(owner: nn.Module, names: tuple[str, ...], make: Callable[[nn.Linear], nn.Module] | None = None) -> nn.Module | None:
    """One layer for the named Linears of `owner`, or None where they differ in kind and stay apart."""
    parts = tuple(owner.get_submodule(name) for name in names)
    if len(parts) == 1:
        return parts[0]
    kinds, biased = {type(part) for part in parts}, {_bias_of(part) is not None for part in parts}
    if len(kinds) > 1 or len(biased) > 1:
        return None
    weights = [part.weight for part in parts]
    rows = sum(weight.shape[0] for weight in weights)  # type: ignore[misc, index]
    with torch.device("meta"):
        whole = nn.Linear(weights[0].shape[1], rows, bias=biased == {True}, dtype=weights[0].dtype)  # type: ignore[index, arg-type]
    if kinds == {nn.Linear}:
        return join(whole, parts)
    if make is None:
        return None
    whole = whole.to_empty(device=weights[0].device)  # type: ignore[arg-type]
    return join(make(whole), parts)


# --- a decoder layer


def _attention(layer: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None) -> Tensor:
    plan, attention = layer.fused_plan, layer.self_attn
    B, T, _ = x.shape
    heads, kv_heads, channels = plan.heads, plan.kv_heads, plan.channels
    if layer.fused_qkv is None:
        packed = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
    else:
        packed = layer.fused_qkv(x)
    if plan.clip is not None:
        packed = packed.clamp(-plan.clip, plan.clip)
    packed = packed.view(B, T, heads + 2 * kv_heads, channels)
    if plan.qk_norm is None and cos is not None and 2 * cos.shape[-1] == channels:
        q, k, v = layer.fused_ops.rotary(packed, cos, sin, heads, kv_heads)
    else:
        q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
        if plan.qk_norm is not None:
            q, k = _normed(attention.q_norm, q, plan.qk_norm), _normed(attention.k_norm, k, plan.qk_norm)
        if cos is not None and sin is not None:
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = heads // kv_heads
    if shared > 1 and q.dtype == torch.float32:
        # No kernel for fp32 shares keys and values between heads; see gpt.py.
        k, v = (states.repeat_interleave(shared, dim=1) for states in (k, v))
    dropout = plan.attention_dropout if layer.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=plan.scale, enable_gqa=k.shape[1] != heads)
    return attention.o_proj(y.transpose(1, 2).reshape(B, T, heads * channels))  # type: ignore[no-any-return]


def _normed(module: Any, x: Tensor, over: str) -> Tensor:
    """RMSNorm of x [B, T, heads, C], over each head or all heads of a token."""
    flat = x if over == "head" else x.flatten(2)
    return norm(flat, module.weight, module.variance_epsilon, x.dtype).view(x.shape)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first channels of x [B, T, heads, C], as many as cos and sin [T, channels / 2] have."""
    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)


def _mlp(layer: Any, x: Tensor) -> Tensor:
    mlp = layer.mlp
    packed = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1) if layer.fused_gate_up is None else layer.fused_gate_up(x)
    return mlp.down_proj(layer.fused_ops.swiglu(packed))  # type: ignore[no-any-return]


def add_norm(layer: Any, x: Tensor, delta: Tensor, module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + delta, and the norm of it in `dtype`."""
    if getattr(module, "weight", None) is None:  # OLMo's LayerNorm
        x = x + delta
        return x, F.layer_norm(x.float(), (x.shape[-1],), None, None, _OLMO_EPS).to(dtype)
    return layer.fused_ops.add_norm(x, delta, module.weight, module.variance_epsilon, dtype)  # type: ignore[no-any-return]


def _added(layer: Any, y: Tensor) -> Tensor:
    """What goes into the stream of an attention's or MLP's result."""
    plan = layer.fused_plan
    if plan.dropout:
        y = F.dropout(y, plan.dropout, layer.training)
    return y if plan.residual == 1 else y * plan.residual


def _forward(layer: Any, x: Tensor, delta: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream and what is still to be added to it, in and out, as gpt.Block has it."""
    if layer.fused_plan.post_norm:
        first, second = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        x = x + delta
        x = x + norm(_attention(layer, x.to(dtype), cos, sin, mask), first.weight, first.variance_epsilon, x.dtype)
        return x, norm(_mlp(layer, x.to(dtype)), second.weight, second.variance_epsilon, x.dtype)
    x, states = add_norm(layer, x, delta, layer.input_layernorm, dtype)
    x, states = add_norm(layer, x, _added(layer, _attention(layer, states, cos, sin, mask)), layer.post_attention_layernorm, dtype)
    return x, _added(layer, _mlp(layer, states))


def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the fused forward pass; FSDP2 and torch.compile see a layer of the original class.

    Its calls are plain: activations are recomputed by FusedDecoder, not by transformers."""
    if cls not in _CLASSES:
        made = type(cls.__name__, (cls,), {"fused_from": cls, "__call__": nn.Module.__call__})
        # After creation: transformers wraps the forward of a new subclass.
        made.forward = _forward  # type: ignore[attr-defined]
        _CLASSES[cls] = made
    return _CLASSES[cls]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
