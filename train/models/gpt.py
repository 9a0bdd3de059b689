"""The built-in causal language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU; the shapes of Llama.

Shape letters: B samples, T tokens of a sample, D model width, H query heads, K key/value heads, C channels of a head,
F width of the feed-forward part, V vocabulary.

Linears that read the same input are one (QKV; gate and up): fewer and wider products, which fp8 gains most from.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from jobs.core.errors import SettingError
from jobs.specs.model_presets import LOSS_CHUNK_TOKENS
from train.models.loss import Terms, chunk_terms, chunked_loss_sum
from train.models.ops import PLAIN, Ops, fused


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options. Raises SettingError for a shape that cannot be built.

    head_dim: None: d_model / n_heads.       n_kv_heads: None: one per query head.
    init_std: spread of new weights; 0.02 suits widths near 2,000, narrower models start faster with about 1 / sqrt(D).
    tie_embeddings: the head is the embedding table.
    loss_chunk_tokens: tokens per chunk of head and loss; memory against a little speed, no effect on the result.
    checkpoint_blocks: recompute each block in the backward pass: about a third more work, only its input is kept."""

    vocab_size: int = 256
    seq_len: int = 128
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 384
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    loss_chunk_tokens: int = LOSS_CHUNK_TOKENS
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        shape = ("vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "kv_heads", "channels", "d_ff")
        for name in (*shape, "loss_chunk_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"model: {name} {value!r} is not allowed; it must be a whole number of at least 1")
        if self.n_heads % self.kv_heads:
            raise SettingError(f"model: n_heads {self.n_heads} must be a multiple of n_kv_heads {self.kv_heads}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise SettingError(f"model: d_model {self.d_model} must be a multiple of n_heads {self.n_heads}, or give head_dim")
        if self.channels % 2:
            raise SettingError(f"model: {self.channels} channels per head; rotary positions need an even number")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def channels(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim


class RMSNorm(nn.Module):
    """The gain of a norm; train/models/ops.py has the norm itself, which is made together with what surrounds it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps


def rope_tables(seq_len: int, channels: int, theta: float, device: Any = None) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [seq_len, channels / 2], of position times theta ** (-2 i / channels) (Su et al. 2021)."""
    # fp64 first: in fp32 the angle of a late position is off by more than a bf16 step.
    inverse = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), inverse)
    return angle.cos().float(), angle.sin().float()


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.channels = config.n_heads, config.kv_heads, config.channels
        self.qkv = nn.Linear(config.d_model, (self.heads + 2 * self.kv_heads) * self.channels, bias=False)
        self.out = nn.Linear(self.heads * self.channels, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, ops: Ops) -> Tensor:
        B, T, _ = x_BTD.shape
        packed = self.qkv(x_BTD).view(B, T, self.heads + 2 * self.kv_heads, self.channels)
        # Views, not copies: attention reads [B, H, T, C] with any strides.
        q, k, v = (heads.transpose(1, 2) for heads in ops.rotary(packed, cos, sin, self.heads, self.kv_heads))
        shared = self.heads // self.kv_heads
        if shared > 1 and q.dtype == torch.float32:
            # No kernel for fp32 shares keys and values between heads, and without one the scores of all tokens are held: 22 of 82 GB of
            # 3b with two sequences of 2,048.
            k, v = (heads.repeat_interleave(shared, dim=1) for heads in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != self.heads)
        return self.out(y.transpose(1, 2).reshape(B, T, self.heads * self.channels))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); rows [0, F) of the first weight are gate, [F, 2F) are up."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, ops: Ops) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(x_BTD)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.ops = PLAIN

    def forward(self, x_BTD: Tensor, delta_BTD: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, in and out: adding is part of the norm that reads the sum.

        dtype is that of the products."""
        first, second = self.attention_norm, self.mlp_norm
        x_BTD, normed = self.ops.add_norm(x_BTD, delta_BTD, first.weight, first.eps, dtype)
        x_BTD, normed = self.ops.add_norm(x_BTD, self.attention(normed, cos, sin, self.ops), second.weight, second.eps, dtype)
        return x_BTD, self.mlp(normed, self.ops)


class GPT(nn.Module):
    """forward(tokens, targets) is the loss sum (train/models/contract.py); logits(tokens) is for everything else."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # Shapes first, memory after: torch's own initialisation would cost time and random numbers for nothing.
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.norm = RMSNorm(config.d_model, config.norm_eps)
            self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
            # Not part of the weights: a checkpoint does not depend on seq_len.
            for name in ("cos", "sin"):
                self.register_buffer(name, torch.empty(config.seq_len, config.channels // 2), persistent=False)
        self._terms: Terms = chunk_terms
        self._ops = PLAIN
        # The contexts of a block whose activations are recomputed, and of doing so (train/precision/fp8.py).
        self.recomputing: Callable[[], tuple[Any, Any]] = noop_context_fn
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights; a model built on the meta device needs it after `to_empty`.

        Normal, std `init_std`; what is added to the residual stream starts smaller by sqrt(2 L), so that its size does
        not depend on depth (Radford et al. 2019, section 2.3). Each weight has a generator of its own, seeded from torch's
        global one: a billion takes one processor 15 s, and so they are drawn side by side, the same ones by any number."""
        std = self.config.init_std
        residual = std / math.sqrt(2 * self.config.n_layers)

        def draw(name: str, parameter: Tensor, seed: int) -> None:
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(0.0, residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else std, generator=generator)

        named = list(self.named_parameters())
        seeds = torch.randint(2**62, (len(named),), device="cpu").tolist()
        # Not torch's number of threads, which is one where a processor trains: there it is part of the arithmetic, here it is not.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for done in [pool.submit(torch.no_grad()(draw), *one, seed) for one, seed in zip(named, seeds, strict=True)]:
                done.result()
        self.fill_tables()

    @torch.no_grad()
    def fill_tables(self) -> None:
        """What is no weight and in no checkpoint: the angles of positions."""
        cos, sin = rope_tables(self.config.seq_len, self.config.channels, self.config.rope_theta, self.cos.device)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding table itself where they are tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final, normed states [B, T, D] of int64 tokens [B, T]; T at most seq_len."""
        T = tokens.shape[1]
        if self.config.seq_len < T:
            raise SettingError(f"model: {T} tokens in a sample, built for seq_len {self.config.seq_len}")
        x = self._ops.embed(tokens, self.embedding.weight)
        device = x.device.type
        # The residual stream follows bf16 autocast (half the traffic); fp16's range is too short for a sum over layers.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype != x.dtype or dtype == torch.float16:
            x = x.bfloat16() if dtype == torch.bfloat16 else x.float()
        cos, sin = self.cos[:T], self.sin[:T]
        delta, nothing = torch.zeros_like(x), x.new_zeros(()).expand_as(x)
        for block in self.blocks:
            if self.config.checkpoint_blocks and torch.is_grad_enabled():
                # One tensor is kept for a block, not two. No dropout anywhere: there is no random state to bring back.
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.recomputing}
                x, delta = checkpoint(block, x + delta, nothing, cos, sin, dtype, **options)
            else:
                x, delta = block(x, delta, cos, sin, dtype)
        return self._ops.add_norm(x, delta, self.norm.weight, self.norm.eps, dtype)[1]

    def forward(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Sum of cross entropies in nats, fp32 scalar. All arguments [B, T]; targets of -100 do not count."""
        chunk = self.config.loss_chunk_tokens
        return chunked_loss_sum(self.hidden(tokens), self.head_weight, targets, loss_mask, chunk_tokens=chunk, terms=self._terms)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V], held whole: for generation and tests, not for training."""
        return F.linear(self.hidden(tokens), self.head_weight)

    def use_kernels(self) -> None:
        """Norms, SwiGLU, rotary positions and the loss by Triton kernels from now on; weights and their names stay. Where
        train.kernels.usable, and before compile_regions."""
        from train.kernels.cross_entropy import terms

        self._ops, self._terms = fused(self.config.channels), terms
        for block in self.blocks:
            assert isinstance(block, Block)
            block.ops = self._ops

    def compile_regions(self, **options: Any) -> None:
        """torch.compile each block and the loss of a chunk, in place; weight names stay as they are.

        Regions and not the whole: all blocks share one compilation, and gradients travel while the blocks before are at work."""
        options.setdefault("dynamic", False)
        # Made for models compiled as a whole: it cuts what is compiled inside DDP where a bucket ends, here every block into four
        # (torch/_dynamo/backends/distributed.py).
        from torch._dynamo import config as dynamo

        dynamo.optimize_ddp = False
        for block in self.blocks:
            block.compile(**options)
        if self._terms is chunk_terms:
            self._terms = torch.compile(chunk_terms, **options)

    def num_params(self, non_embedding: bool = False) -> int:
        """Parameters, tied ones once. `non_embedding` leaves out the table that is only looked up, never multiplied
        with; the head stays, and so does a table that is also the head."""
        total = sum(p.numel() for p in self.parameters())
        only_looked_up = 0 if self.lm_head is None else self.embedding.weight.numel()
        return total - only_looked_up if non_embedding else total

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs per token, forward and backward: 6 N + 6 L (H C) T (Kaplan et al. 2020, section 2.1).

        N = num_params(non_embedding=True): blocks and head, no embedding lookup. The attention term is the causal one,
        half of the 12 L d T that some projects report. Recomputation is not counted."""
        return sum(self.flops_by_part(seq_len).values())

    def flops_by_part(self, seq_len: int) -> dict[str, int]:
        """The same, split into blocks (with norm gains, below 0.1 %), head and attention."""
        c, head = self.config, self.head_weight.numel()
        attention = 6 * c.n_layers * c.n_heads * c.channels * seq_len
        return {"blocks": 6 * (self.num_params(non_embedding=True) - head), "head": 6 * head, "attention": attention}
