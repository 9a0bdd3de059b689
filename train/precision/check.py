"""Whether a model trains under every precision that this machine has: `python -m train.precision.check --model SPEC`.

Each precision trains the same few steps on the same batch from the same weights. A value that is not finite is traced to
the first module that made one from finite inputs; losses and the first gradient are compared with fp32's.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.config.settings import Job
from jobs.core.errors import HoldfastError, ImpossibleJobError
from jobs.specs.precision import MODES, Precision, runs_on
from train.compilation.cache_directory import use_private_caches
from train.models.contract import read_loss
from train.models.convnet import ConvNet
from train.models.registry import build_model
from train.precision import fp8
from train.precision.numerics import autocast_context

# How far a loss may lie from fp32's, relative: bf16 has 8 bits of mantissa, fp16 11, fp8 4 or 3 in the products alone.
TOLERANCE = {Precision.FP32: 0.0, Precision.TF32: 1e-2, Precision.BF16: 3e-2, Precision.FP16: 1e-2, Precision.FP8: 1e-1}
# The first gradient has to point where fp32's does.
_COSINE = {Precision.FP32: 1.0, Precision.TF32: 0.99, Precision.BF16: 0.98, Precision.FP16: 0.98, Precision.FP8: 0.9}
_FP16_SCALE = 2.0**12


@dataclass
class Finding:
    """What one precision did. `culprit` names the first module or parameter with a value that is not finite."""

    precision: str
    losses: list[float] = field(default_factory=list)
    difference: float = math.nan
    cosine: float = math.nan
    culprit: str = ""
    verdict: str = ""
    passed: bool = False


def examine(
    spec: str, *, options: dict[str, Any] | None = None, seq_len: int = 64, batch: int = 4, steps: int = 5, device: torch.device | None = None
) -> list[Finding]:
    """Findings for fp32 and every other precision of this machine, in the order of the table of modes."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_private_caches(lambda text: print(text, file=sys.stderr))
    arch = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = major * 10 + minor
        fp8.load_early()
    findings: list[Finding] = []
    reference: tuple[list[float], torch.Tensor] | None = None
    for mode in MODES.values():
        if not runs_on(mode, arch):
            continue
        finding = Finding(mode.name.value)
        findings.append(finding)
        try:
            gradient = _train(spec, options or {}, mode.name, device, seq_len, batch, steps, finding)
        except ImpossibleJobError as err:
            finding.verdict, finding.passed = f"left out: {err}", True
            continue
        _judge(finding, mode.name, gradient, reference)
        if mode.name is Precision.FP32:
            reference = (finding.losses, gradient)
    return findings


def _train(
    spec: str, options: dict[str, Any], precision: Precision, device: torch.device, seq_len: int, batch: int, steps: int, finding: Finding
) -> torch.Tensor:
    """Trains and fills in losses and culprit. Returns the first gradient, flat, in fp32 on the CPU."""
    torch.set_float32_matmul_precision(MODES[precision].matmul_precision)
    torch.manual_seed(0)
    model = build_model(spec, seq_len=seq_len, overrides=options).to(device)
    # Dropout would draw other numbers in another precision.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = make_batch(model, batch, seq_len, device)
    inner = None
    if precision is Precision.FP8:
        inner = fp8.convert(model, Job(job_name="autocast", precision=precision, micro_batch_size=batch, seq_len=seq_len)).context
    context = autocast_context(precision, device, inner)
    scale = _FP16_SCALE if MODES[precision].loss_scaling else 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = _Watch(model)
    first = torch.zeros(0)
    for step in range(steps):
        optimizer.zero_grad()
        with context():
            loss_sum, count = read_loss(model(**inputs), inputs)
        loss = loss_sum.float() / count
        (loss * scale).backward()
        finding.losses.append(float(loss.detach()))
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(scale)
        bad = next((f"gradient of {name}" for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())), "")
        finding.culprit = watch.culprit or bad
        if step == 0:
            first = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
        if finding.culprit or not math.isfinite(finding.losses[-1]):
            break
        optimizer.step()
    watch.remove()
    return first


class _Watch:
    """Remembers the first module whose output is not finite although its inputs were."""

    def __init__(self, model: nn.Module):
        self.culprit = ""
        self._handles = [
            module.register_forward_hook(self._hook(name, type(module).__name__), with_kwargs=True) for name, module in model.named_modules() if name
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, kind: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Children come before the module that holds them: the first one found is the innermost.
            if not self.culprit and not _finite(output) and _finite(args) and _finite(kwargs):
                self.culprit = f"{name} ({kind})"

        return look


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        # -inf is how attention masks say no; only what a computation made by itself is looked for.
        return not value.is_floating_point() or bool((torch.isfinite(value) | (value == -torch.inf)).all())
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in value)
    return True


def make_batch(model: nn.Module, batch: int, seq_len: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs of the kind that a model takes: images, tokens with classes, or tokens with next tokens."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, ConvNet):
        images = torch.rand(batch * 4, 1, 8, 8, generator=generator)
        return {"images": images.to(device), "targets": torch.randint(0, 10, (batch * 4,), generator=generator).to(device)}
    config = getattr(getattr(model, "model", model), "config", None) or getattr(model, "config", None)
    vocab = int(getattr(config, "vocab_size", 256))
    # The lowest numbers are padding and other special tokens in most vocabularies.
    tokens = torch.randint(min(8, vocab - 1), vocab, (batch, seq_len), generator=generator)
    if type(model).__name__ == "HFClassifier":
        labels = int(getattr(config, "num_labels", 2))
        return {
            "tokens": tokens.to(device),
            "targets": torch.randint(0, labels, (batch,), generator=generator).to(device),
            "attention_mask": torch.ones_like(tokens).to(device),
        }
    return {"tokens": tokens.to(device), "targets": tokens.roll(-1, 1).to(device)}


def _judge(finding: Finding, precision: Precision, gradient: torch.Tensor, reference: tuple[list[float], torch.Tensor] | None) -> None:
    if finding.culprit or not all(map(math.isfinite, finding.losses)):
        finding.verdict = f"not finite at step {len(finding.losses)}, first in {finding.culprit or 'the loss'}"
        return
    fell = finding.losses[-1] < finding.losses[0]
    if reference is None:
        finding.difference, finding.cosine = 0.0, 1.0
        finding.passed, finding.verdict = fell, "reference" if fell else "the loss does not fall"
        return
    losses, first = reference
    finding.difference = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(finding.losses, losses, strict=False))
    finding.cosine = float(torch.nn.functional.cosine_similarity(gradient, first, dim=0)) if len(gradient) == len(first) else math.nan
    close = finding.difference <= TOLERANCE[precision] and finding.cosine >= _COSINE[precision]
    finding.passed = fell and close
    finding.verdict = (
        "good"
        if finding.passed
        else "the loss does not fall"
        if not fell
        else f"too far from fp32 (allowed: loss {TOLERANCE[precision]:g}, cosine {_COSINE[precision]:g})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.precision.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", default="{}", help="options of the model, as JSON")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="file for the findings, as JSON")
    args = parser.parse_args()
    try:
        findings = examine(args.model, options=json.loads(args.options), seq_len=args.seq_len, batch=args.batch, steps=args.steps)
    except HoldfastError as err:
        print(err, file=sys.stderr)
        return err.exit_code
    args.out.write_text(json.dumps([asdict(finding) for finding in findings]))
    return 0 if all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
