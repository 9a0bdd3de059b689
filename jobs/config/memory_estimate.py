"""How much GPU memory a job of the built-in model will need, before it is queued: a count, without torch.

What is held is exact: weights, moments, gradients, and what the forward pass keeps for the backward pass when nothing is
compiled (a test compares all of it with what torch holds). What is estimated: what fp8 libraries copy, and that nothing else is
alive at the peak. benchmarks/results/2026-11-28-precisions-and-memory.md compares it with what a GPU held; `python -m benchmarks.hardware memory` does so for more
shapes. On top come the allocator's gaps (0.3 to 0.7 GB of 67 to 82, in segments that grow) and what CUDA and NCCL take for
themselves (1.7 GB on an H100).
"""

from dataclasses import dataclass
from typing import Any

from jobs.config.settings import Job
from jobs.specs.model_presets import LOSS_CHUNK_TOKENS, PRESETS
from jobs.specs.precision import MODES, Precision


@dataclass(frozen=True)
class Shape:
    """The built-in model as far as memory depends on it. q, k: channels of all query heads, of all key/value heads."""

    vocab: int
    d: int
    layers: int
    heads: int
    q: int
    k: int
    f: int
    tied: bool
    chunk: int
    checkpointed: bool

    @classmethod
    def of(cls, job: Job) -> "Shape | None":
        """None for another model than the built-in one, or options that are no numbers."""
        if job.model not in PRESETS:
            return None
        options: dict[str, Any] = {**PRESETS[job.model], **job.model_options}
        try:
            heads = int(options["n_heads"])
            channels = int(options.get("head_dim") or options["d_model"] // heads)
            return cls(
                int(options["vocab_size"]), int(options["d_model"]), int(options["n_layers"]), heads, heads * channels, int(options.get("n_kv_heads") or heads) * channels,
                int(options["d_ff"]), bool(options.get("tie_embeddings", False)), int(options.get("loss_chunk_tokens", LOSS_CHUNK_TOKENS)), bool(options.get("checkpoint_blocks", job.grad_checkpointing)),
            )  # fmt: skip
        except (TypeError, ValueError, ZeroDivisionError):
            return None

    @property
    def block_matrices(self) -> int:
        """Parameters of all linear layers of all blocks."""
        return self.layers * (self.d * (self.q + 2 * self.k) + self.q * self.d + 3 * self.d * self.f)

    @property
    def table(self) -> int:
        """Parameters of the embedding table, or of the head."""
        return self.vocab * self.d

    @property
    def vectors(self) -> int:
        """Gains of the norms."""
        return (2 * self.layers + 1) * self.d

    @property
    def matrices(self) -> int:
        return self.block_matrices + self.table * (1 if self.tied else 2)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one GPU. weights: fp32 masters included. copies: of weights, in the type of the products. activations: kept for
    the backward pass. loss: logits and gradient of the head while the loss is made. peak: the most that is alive at once."""

    weights: int
    moments: int
    gradients: int
    copies: int
    activations: int
    loss: int
    peak: int
    when: str

    def line(self) -> str:
        parts = {
            "weights": self.weights,
            "moments": self.moments,
            "gradients": self.gradients,
            "copies of weights": self.copies,
            "activations": self.activations,
            "loss": self.loss,
        }
        return f"about {gb(self.peak)} GB of GPU memory at the peak, {self.when}: " + ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)


def estimate(job: Job) -> Estimate | None:
    """None where it cannot be told: another model than the built-in one, or training on a CPU."""
    s = Shape.of(job)
    if s is None or job.device == "cpu":
        return None
    element = 2 if MODES[job.precision].autocast else 4
    shards = job.world_size if job.parallel == "fsdp" else 1
    count = s.matrices + s.vectors
    tokens = (job.micro_batch_size or job.batch_size // job.world_size or 1) * job.seq_len
    o2 = job.amp_opt_level == "O2"
    weights = 6 * s.matrices + 4 * s.vectors if o2 else 4 * count // shards
    moments = 8 * count // shards
    # O2: a 16-bit gradient, and the fp32 one that torch's optimizer sees; our own takes the first.
    of_matrices = (2 if job.fused_kernels else 6) if o2 else 4
    gradients = (of_matrices * s.matrices + 4 * s.vectors) // shards
    copies = _copies(job, s, element, shards)
    stream = element if job.precision is not Precision.FP16 else 4
    fused = job.compile or job.fused_kernels
    kept = activations(s, tokens, element, fused=fused, residual=stream, fp8=_keeps_fp8(job))
    # While it is computed again or its backward pass runs.
    block = tokens * _of_block(s, element, fused=fused, residual=stream, fp8=_keeps_fp8(job))
    head = 4 * s.table
    chunk = min(s.chunk, tokens)
    # Our kernel: in place. Eager: fp32 logits, their gradient and one more; a compiler keeps one fp32 pass.
    logits = chunk * s.vocab * (element + (0 if job.fused_kernels else 4 if job.compile else 12))
    weight_gradient = chunk * s.vocab * element + (element + 4) * s.table
    low = element * s.table if element < 4 else 0
    loss = head + low + max(logits, weight_gradient) + 2 * tokens * s.d * element
    held = weights + moments
    # Gradients are there while activations are when windows are added up, and where DDP keeps its buckets.
    early = gradients if (job.grad_accum_steps or 1) > 1 or (job.parallel == "ddp" and job.world_size > 1) else 0
    forward = held + early + copies + kept - (block if s.checkpointed else 0) + loss
    # Beside a block that is computed again, in fp32 and with Transformer Engine: one gradient as wide as the feed-forward layer, by what eight cells of
    # benchmarks/results/2026-11-28-precisions-and-memory.md held at their peak.
    wide = element == 4 or (job.precision is Precision.FP8 and job.fp8_backend == "te")
    beside = tokens * element * s.f if s.checkpointed and wide else 0
    # The head's gradient twice, scaled and as it was.
    backward = held + early + copies + kept + beside + 2 * head
    end = held + gradients + block
    peak = max(forward, backward, end)
    when = "at the end of a step" if peak == end else "where the backward pass begins"
    return Estimate(weights, moments, gradients, copies, kept, loss, peak, when)


def activations(s: Shape, tokens: int, element: int, *, fused: bool, residual: int, fp8: bool = False) -> int:
    """Bytes that the forward pass of the blocks and the last norm keep, with those of one block that is computed again where they are.
    `element`: bytes of a number in the products; `fused`: by our kernels or a compiler, which keep the same; `residual`: bytes of a
    number between the blocks; `fp8`: inputs of products as such."""
    block = _of_block(s, element, fused=fused, residual=residual, fp8=fp8)
    blocks = s.layers * residual * s.d + block if s.checkpointed else s.layers * block
    return tokens * (blocks + _of_norm(s, element))


def _of_norm(s: Shape, element: int) -> int:
    return 8 * s.d + element * s.d + 4  # its input and the normed one in fp32, its output, and 1 / rms


def _of_block(s: Shape, element: int, *, fused: bool, residual: int, fp8: bool) -> int:
    """Bytes of a token that the backward pass of one block reads; the arguments of `activations`."""
    # Packed q, k, v; q and k turned; output. In fp32 keys and values that heads share are repeated, and these are kept (train/models/gpt.py).
    heads = 4 * s.q if element == 4 and s.q != s.k else 3 * s.q + 3 * s.k
    attention = element * heads + 4 * s.heads  # and log-sum-exp
    if not fused:
        return 2 * _of_norm(s, element) + attention + element * 4 * s.f  # gate and up, silu(gate), their product
    stream = 2 * (residual * s.d + 4)  # the stream before each norm, and 1 / rms
    # What only a product reads again is kept as fp8 keeps it: outputs of the norms, of attention, and of SwiGLU.
    inputs = 2 * s.d + s.q + s.f if fp8 else element * (2 * s.d + s.f)
    return stream + attention + inputs + element * 2 * s.f


def _keeps_fp8(job: Job) -> bool:
    """Whether inputs of products are kept in fp8. torchao keeps them as they are, and makes them fp8 again; a compiler, which is free to
    choose, takes the smaller ones."""
    return job.precision is Precision.FP8 and (job.fp8_backend == "te" or job.compile)


def _copies(job: Job, s: Shape, element: int, shards: int) -> int:
    if job.parallel == "fsdp" and shards > 1:
        return element * (s.matrices + s.vectors)  # gathered once a step, and kept until its end
    if job.precision is Precision.FP8 and job.fp8_backend == "te":
        # Each weight in fp8, and transposed: of all blocks, or of the one that is computed again.
        return s.block_matrices * 2 // (s.layers if s.checkpointed else 1)
    if job.amp_opt_level == "O2" or element == 4 or (job.precision is Precision.FP8 and job.compile):
        # torchao's, compiled: made again from the weight for the backward pass.
        return 0
    return element * s.block_matrices


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 99.95e9 else f"{size / 1e9:.0f}"
