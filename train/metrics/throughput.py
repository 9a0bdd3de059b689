"""Throughput metrics: tokens/s, TFLOP/s, MFU, peak memory, data and checkpoint stalls.

A line covers the time since the previous line or validation; the time of a validation is left out."""

import time
from typing import Any

import torch

from jobs.config.settings import Job
from jobs.run.goodput import Part
from jobs.specs.gpu_peaks import Peak, peak_of
from train.distributed.runtime import Distributed
from train.metrics.goodput_timer import GoodputTimer


class Throughput:
    """Computes the throughput values of log lines."""

    def __init__(self, job: Job, rt: Distributed, flops: tuple[float | None, str], timer: GoodputTimer):
        """`flops`: of one sample, and the formula (train/metrics/flops.py)."""
        self._rt, self._timer = rt, timer
        per_sample, self._formula = flops
        self._flops_per_step = per_sample * job.batch_size if per_sample else None
        name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
        self.peak: Peak | None = peak_of(name, job.precision) if name else None
        self._device = name or "a CPU"
        self.restart()

    def lines(self) -> list[str]:
        """Return the FLOP formula and the peak that the values refer to, for the first lines of the log."""
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
        """Count a finished step."""
        self._steps += 1

    def values(self, targets: int) -> dict[str, Any]:
        """Return the values since the last call, during which all ranks trained on `targets`. Times are those of rank 0."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        line: dict[str, Any] = {"tokens_per_s": round(targets / seconds, 1)}
        if self._flops_per_step:
            tflops = self._flops_per_step * self._steps / seconds / self._rt.world_size / 1e12
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
        spent = self._timer.record()["seconds"]
        return spent.get(Part.DATA_WAIT, 0.0), spent.get(Part.SAVE_STALL, 0.0)


def progress_text(line: dict[str, Any], max_steps: int) -> str:
    """Format a log line as text. Stalls below 0.5 % are left out."""
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
