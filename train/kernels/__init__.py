"""Triton kernels for what torch.compile leaves slow around the matrix products: norm with residual, SwiGLU, rotary positions, loss, AdamW.

Each has its plain form in train/models/ops.py or train/optim.py; the kernels compute the same in fp32 and round at the same places.
benchmarks/results/2026-11-28-speed.md has what each of them was predicted to save, and what it saved.
"""

import importlib.util

import torch

from train.compilation.toolchain import find_missing

# Kernels were written for, and measured on, Hopper; Ampere has all that they need.
_MIN_ARCH = (8, 0)


def usable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return "there is no GPU here"
    if torch.version.hip is not None:
        return "they were never run on a GPU of AMD"
    if torch.cuda.get_device_capability(device) < _MIN_ARCH:
        return f"they need sm_{_MIN_ARCH[0]}{_MIN_ARCH[1]}"
    missing = find_missing(device)
    if missing:
        return f"Triton needs {' and '.join(missing)}; install {' and '.join(missing.values())}"
    return None
