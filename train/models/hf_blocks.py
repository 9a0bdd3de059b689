"""Fused forward pass of decoder-only transformers models of the Llama kind, on their own modules and parameters.

The decoder layers keep their modules, so that parameter names, checkpoints and exports are those of transformers. Only what runs
between the parameters changes: RMSNorm with the residual sum, rotary positions, SwiGLU and the loss by the operations of
train/models/ops.py; one product for q, k and v and one for gate and up; causal attention without a materialised mask.

train/models/hf_equality.py compares it with transformers' own forward pass before it is used.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.models.hf_layer import LayerPlan, NotSupported, add_norm, fused_class, plan_of, product
from train.models.loss import Terms, chunk_terms, chunked_loss_sum
from train.models.ops import PLAIN, Ops, fused

# model_type of the config -> what is special about it. Each is compared with transformers in tests/train/models/test_hf_blocks.py.
FAMILIES: Mapping[str, str] = {
    "llama": "",
    "mistral": "sliding window",
    "ministral": "sliding window per layer",
    "qwen2": "q, k, v biases",
    "qwen3": "RMSNorm of each query and key head",
    "phi3": "stored qkv_proj and gate_up_proj, partial rotary positions, residual dropout",
    "granite": "multipliers of embedding, attention, residual and logits",
    "olmo": "LayerNorm without parameters, clipped q, k, v",
    "olmo2": "norms after attention and MLP, RMSNorm of all query and key heads together",
    "olmo3": "as olmo2, sliding window and rotary table per layer type",
    "smollm3": "layers without rotary positions",
    "seed_oss": "residual dropout",
}


class FusedDecoder:
    """The fused forward pass of a model of transformers. Holds its modules and owns none. Raises NotSupported."""

    def __init__(self, model: Any) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise NotSupported(f"model_type {config.model_type!r} has no fused form")
        self.body: Any = getattr(model, model.base_model_prefix)
        self.head: Any = model.get_output_embeddings()
        self.config = config
        self.layers: list[Any] = list(self.body.layers)[: config.num_hidden_layers]
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            raise NotSupported(f"hidden_act {config.hidden_act!r} is not silu")
        if type(self.head) is not nn.Linear or self.head.bias is not None:
            raise NotSupported("its output head is no Linear without bias")
        if "dynamic" in str(getattr(config, "rope_parameters", None)):
            raise NotSupported("rotary positions of rope_type 'dynamic' depend on what was computed before")
        self.plans: list[LayerPlan] = [plan_of(config, layer, index) for index, layer in enumerate(self.layers)]
        self.embedding_factor: float = float(getattr(config, "embedding_multiplier", 1.0))
        self.logit_divisor: float = float(getattr(config, "logits_scaling", 1.0))
        # Contexts of a layer whose activations are recomputed, and of doing so (train/precision/fp8.py); None: they are kept.
        self.recompute: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None = None
        self.ops: Ops = PLAIN
        self.terms: Terms = chunk_terms
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def install(self) -> None:
        for layer, plan in zip(self.layers, self.plans, strict=True):
            layer.fused_plan, layer.fused_ops = plan, self.ops
            layer.__class__ = fused_class(type(layer))
        self.join_products()

    def remove(self) -> None:
        for layer in self.layers:
            layer.__class__ = layer.fused_from
            for name in ("fused_plan", "fused_ops", "fused_qkv", "fused_gate_up"):
                vars(layer).pop(name, None)

    def join_products(self, make: Callable[[nn.Linear], nn.Module] | None = None) -> None:
        """One product for q, k and v, and one for gate and up; again after fp8 has replaced the Linears, `make` being how."""
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
            gate_up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
            for name, owner, names in (("fused_qkv", attention, qkv), ("fused_gate_up", mlp, gate_up)):
                # Past nn.Module, which would register it and give its parameters a second name.
                object.__setattr__(layer, name, product(owner, names, make))

    def use_kernels(self) -> None:
        """Triton kernels from now on, where train.kernels.usable."""
        from train.kernels.cross_entropy import terms

        self.ops, self.terms = fused(self.plans[0].channels), terms
        for layer in self.layers:
            if hasattr(layer, "fused_ops"):
                layer.fused_ops = self.ops

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final, normed states [B, T, D] of int64 tokens [B, T]; attention_mask [B, T] is 0 for padding."""
        x = self._embed(tokens)
        device = x.device.type
        # As gpt.GPT.hidden: the stream follows bf16 autocast, never fp16.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype != x.dtype or dtype == torch.float16:
            x = x.bfloat16() if dtype == torch.bfloat16 else x.float()
        delta, nothing = torch.zeros_like(x), x.new_zeros(()).expand_as(x)
        T = tokens.shape[1]
        for layer, plan in zip(self.layers, self.plans, strict=True):
            cos, sin = (None, None) if plan.table is None else self._table(T, plan.table, x.device)
            rest = (cos, sin, self._mask(T, plan.window, attention_mask, x.device), dtype)
            if self.recompute is not None and torch.is_grad_enabled() and layer.training:
                random = bool(plan.dropout or plan.attention_dropout)
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random, "context_fn": self.recompute}
                x, delta = checkpoint(layer, x + delta, nothing, *rest, **options)
            else:
                x, delta = layer(x, delta, *rest)
        return add_norm(self.layers[0], x, delta, self.body.norm, dtype)[1]

    def loss_sum(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        return chunked_loss_sum(self._scaled(self.hidden(tokens, attention_mask)), self.head.weight, targets, loss_mask, terms=self.terms)

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, V], held whole."""
        return F.linear(self._scaled(self.hidden(tokens, attention_mask)), self.head.weight)

    def _scaled(self, states: Tensor) -> Tensor:
        return states if self.logit_divisor == 1 else states / self.logit_divisor

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.body.embed_tokens
        x = self.ops.embed(tokens, table.weight)
        if table.padding_idx is not None:  # its row has no gradient
            x = torch.where((tokens == table.padding_idx).unsqueeze(-1), x.detach(), x)
        return x if self.embedding_factor == 1 else x * self.embedding_factor

    @torch.no_grad()
    def _table(self, T: int, which: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T, rotated channels / 2], by the model's own rotary module."""
        key = (T, which, device)
        if key not in self._tables:
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                like, positions = torch.empty(1, 1, 1, device=device), torch.arange(T, device=device).unsqueeze(0)
                cos, sin = self.body.rotary_emb(like, positions, *([which] if which else []))
                half = cos.shape[-1] // 2
                self._tables[key] = cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
        return self._tables[key]

    @torch.no_grad()
    def _mask(self, T: int, window: int | None, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Bool [T, T] or [B, 1, T, T], True where a query sees a key; None: causal, without a mask."""
        narrow = window is not None and window < T
        if not narrow and attention_mask is None:
            return None
        key = (T, window if narrow else None, device)
        if key not in self._masks:
            with torch.inference_mode(False):
                distance = torch.arange(T, device=device).unsqueeze(1) - torch.arange(T, device=device)
                self._masks[key] = (distance >= 0) & (distance < window) if narrow else distance >= 0  # type: ignore[operator]
        seen = self._masks[key]
        if attention_mask is None:
            return seen
        # A padding token sees itself, so that no row of scores is empty.
        return (seen & attention_mask.bool()[:, None, None, :]) | torch.eye(T, dtype=torch.bool, device=device)


def compile_regions(wrapper: Any, **options: Any) -> None:
    """torch.compile each decoder layer and the loss of a chunk, in place.

    Not the model as a whole: while it is traced, transformers builds a full attention mask, and attention takes three times as long."""
    from torch._dynamo import config as dynamo

    from train.distributed.parallel import blocks_of

    options.setdefault("dynamic", False)
    dynamo.optimize_ddp = False  # type: ignore[assignment]  # see gpt.GPT.compile_regions
    blocks = blocks_of(wrapper)
    for block in blocks:
        block.compile(**options)
    owner = wrapper if wrapper.fused is None else wrapper.fused
    if getattr(owner, "terms", None) is chunk_terms:
        owner.terms = torch.compile(chunk_terms, **options)
