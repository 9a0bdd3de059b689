"""What a run says about its speed while it goes: model TFLOP/s, share of the peak, memory, and what it waits for.

A line covers the time since the line before, or since a validation, whose time it leaves out."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jobs.goodput import Part
from jobs.peaks import Peak, peak_of
from jobs.settings import Job
from train.clock import Clock
from train.runtime import Runtime


@dataclass(frozen=True)
class Work:
    """Model FLOPs of one optimizer step over all ranks, by a formula; None where there is none that would be right."""

    flops_per_step: float | None
    formula: str

    @classmethod
    def of(cls, job: Job, model: nn.Module, batch: dict[str, torch.Tensor]) -> "Work":
        """`batch`: one micro-batch, for the length of its samples. Recomputed activations are not counted, padding is."""
        tokens = batch.get("tokens")
        if tokens is None or tokens.ndim != 2:
            return cls(None, "not counted: samples are no rows of tokens, and a weight may be used any number of times for one")
        length = tokens.shape[1]
        if hasattr(model, "flops_per_token"):
            per_token = float(model.flops_per_token(length))
            formula = "6 N + 6 L d T (N: blocks and head; causal attention)"
        else:
            per_token = 6.0 * sum(p.numel() for p in model.parameters())
            formula = "6 N (N: all parameters; attention not counted)"
        return cls(per_token * length * job.batch_size, f"{_engineering(per_token)}FLOP per token = {formula}")


class Live:
    """The values of a run's log lines that are about its speed."""

    def __init__(self, job: Job, rt: Runtime, work: Work, clock: Clock):
        self._rt, self._work, self._clock = rt, work, clock
        name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
        self.peak: Peak | None = peak_of(name, job.precision) if name else None
        self._device = name or "a CPU"
        self.restart()

    def lines(self) -> list[str]:
        """What the figures mean, for the first lines of a run."""
        share = f"% of {self.peak.tflops:,.0f} TFLOP/s, the {self.peak.kind} peak of {self.peak.gpu}" if self.peak else f"no % of peak: the table has no entry for {self._device}"
        return [f"model FLOPs: {self._work.formula}" + (f"; {share}" if self._work.flops_per_step else "")]

    def restart(self) -> None:
        self._begun = time.monotonic()
        self._waited = self._waits()
        self._targets = self._steps = 0

    def add(self, targets: int) -> None:
        """A step is done."""
        self._targets += targets
        self._steps += 1

    def values(self) -> dict[str, Any]:
        """For the log line, over the time since the last call. Times are those of rank 0."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        line: dict[str, Any] = {"tokens_per_s": round(self._targets / seconds, 1)}
        if self._work.flops_per_step:
            tflops = self._work.flops_per_step * self._steps / seconds / self._rt.world / 1e12
            line["tflops"] = float(f"{tflops:.4g}")
            if self.peak:
                line["peak_pct"] = round(100 * tflops / self.peak.tflops, 2)
        if self._rt.device.type == "cuda":
            line["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self._rt.device) / 2**30, 2)
        for name, before, now in zip(("data_wait_pct", "save_wait_pct"), self._waited, self._waits(), strict=True):
            line[name] = round(min(100 * max(now - before, 0.0) / seconds, 100.0), 2)
        self.restart()
        return line

    def _waits(self) -> tuple[float, float]:
        spent = self._clock.record()["seconds"]
        return spent.get(Part.DATA_WAIT, 0.0), spent.get(Part.SAVE_STALL, 0.0)


def progress_text(line: dict[str, Any], max_steps: int) -> str:
    """A log line for people. What was not waited for is not said."""
    parts = [f"step {line['step']:,}/{max_steps:,}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,.0f} tok/s"]
    if "peak_pct" in line:
        parts.append(f"{line['tflops']:,.0f} TFLOP/s ({line['peak_pct']:.1f} % of peak)")
    elif "tflops" in line:
        parts.append(f"{line['tflops']:.3g} TFLOP/s")
    if "gpu_memory_gib" in line:
        parts.append(f"{line['gpu_memory_gib']:.1f} GiB")
    if "loss_scale" in line:
        parts.append(f"loss scale {line['loss_scale']:g}")
    for name, words in (("data_wait_pct", "waiting for data"), ("save_wait_pct", "for saves")):
        if line.get(name, 0) >= 0.5:
            parts.append(f"{line[name]:.0f} % {words}")
    if "val_loss" in line:
        parts.append(f"val loss {line['val_loss']:.4f}")
    if "val_bits_per_byte" in line:
        parts.append(f"{line['val_bits_per_byte']:.3f} bits/byte")
    return " · ".join(parts)


def _engineering(number: float) -> str:
    """7.73 G for 7,730,000,000."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:,.0f} "
