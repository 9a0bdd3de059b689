"""What a run says about its speed while it goes: model TFLOP/s, share of the peak, memory, and what it waits for.

A line covers the time since the line before, or since a validation, whose time it leaves out."""

import time
from typing import Any

import torch

from jobs.config.settings import Job
from jobs.run.goodput import Part
from jobs.specs.gpu_peaks import Peak, peak_of
from train.distributed.runtime import Runtime
from train.metrics.goodput_timer import Clock


class Live:
    """The values of a run's log lines that are about its speed."""

    def __init__(self, job: Job, rt: Runtime, flops: tuple[float | None, str], clock: Clock):
        """`flops`: of one sample, and the formula (train/metrics/flops.py)."""
        self._rt, self._clock = rt, clock
        per_sample, self._formula = flops
        self._flops_per_step = per_sample * job.batch_size if per_sample else None
        name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
        self.peak: Peak | None = peak_of(name, job.precision) if name else None
        self._device = name or "a CPU"
        self.restart()

    def lines(self) -> list[str]:
        """What the figures mean, for the first lines of a run."""
        share = (
            f"% of {self.peak.tflops:,.0f} TFLOP/s, the {self.peak.kind} peak of {self.peak.gpu}"
            if self.peak
            else f"no % of peak: the table has no entry for {self._device}"
        )
        return [f"model FLOPs: {self._formula}" + (f"; {share}" if self._flops_per_step else "")]

    def restart(self) -> None:
        self._begun = time.monotonic()
        self._waited = self._waits()
        self._steps = 0

    def step(self) -> None:
        """A step is done."""
        self._steps += 1

    def values(self, targets: int) -> dict[str, Any]:
        """For the log line, over the time since the last call, in which `targets` were trained on. Times are those of rank 0."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        line: dict[str, Any] = {"tokens_per_s": round(targets / seconds, 1)}
        if self._flops_per_step:
            tflops = self._flops_per_step * self._steps / seconds / self._rt.world / 1e12
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
