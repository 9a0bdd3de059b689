"""Runs tests/interpreted_kernels.py where Triton interprets its kernels; and when they are used at all."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from train import kernels


def test_the_kernels_compute_what_plain_torch_computes() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_without_a_gpu_they_are_not_used_and_say_why() -> None:
    assert kernels.usable(torch.device("cpu")) in ("there is no GPU here", "triton is not installed")
