"""Runs tests/support/interpreted_kernels.py where Triton interprets its kernels; and when they are used at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from train import kernels


def test_the_kernels_compute_what_plain_torch_computes() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}:{REPOSITORY / 'tests/support'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/support/interpreted_kernels.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from train.kernels import adamw, cross_entropy, embedding, norm, rotary, swiglu

def made(kernel, pointers, numbers, constants, warps=4):
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

low, wide, whole = "*bf16", "*fp32", "i32"
made(embedding._add_up, dict(grad_ptr=low, order_ptr="*i64", end_ptr="*i64", out_ptr=low), dict(width=whole), dict(TILE=16, COLUMNS=256))
made(cross_entropy._in_place, dict(logits_ptr=low, target_ptr="*i64", scale_ptr=wide, loss_ptr=wide), dict(vocab=whole), dict(ROUNDS=8, BLOCK=4096), 8)
made(norm._forward, dict(x_ptr=low, delta_ptr=low, weight_ptr=wide, sum_ptr=low, y_ptr=low, rstd_ptr=wide), dict(width=whole, eps="fp32"), dict(BLOCK=2048))
pointers = dict(dy_ptr=low, dsum_ptr=low, x_ptr=low, weight_ptr=wide, rstd_ptr=wide, dx_ptr=low, dweight_ptr=wide)
made(norm._backward, pointers, dict(rows=whole, width=whole), dict(HAS_DSUM=True, ROUNDS=3, TALL=1, BLOCK=2048), 8)
for kernel, pointers in ((swiglu._forward, ("packed_ptr", "h_ptr")), (swiglu._backward, ("dh_ptr", "packed_ptr", "dpacked_ptr"))):
    made(kernel, dict.fromkeys(pointers, low), dict(rows=whole, width=whole), dict(ROWS=4, BLOCK=512))
tables = dict(cos_ptr=wide, sin_ptr=wide)
made(rotary._forward, dict(packed_ptr=low, **tables, out_ptr=low), dict(length=whole), dict(HEADS=48, TURNED=32, HALF=64, TILE=32))
strides = dict.fromkeys([f"{name}_{of}" for name in ("dq", "dk", "dv") for of in ("batch", "token", "head")], whole)
grads = dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "dpacked_ptr"), low)
made(rotary._backward, {**grads, **tables}, dict(length=whole, **strides), dict(Q=16, K=4, HALF=64, TILE_Q=16, TILE_K=4))
scalars = dict.fromkeys(("lr", "decay", "beta1", "beta2", "rest1", "rest2", "log_beta1", "log_beta2", "eps"), "fp32")
pointers = dict(weight_ptr=wide, grad_ptr=low, mean_ptr=wide, square_ptr=wide, low_ptr=low, step_ptr=wide, factor_ptr=wide, bad_ptr=wide)
made(adamw._update, pointers, dict(count=whole, **scalars), dict(HAS_LOW=True, BLOCK=1024))
"""


def test_the_kernels_compile_for_hopper_on_a_machine_without_one(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler refuses."""
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _COMPILE], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_without_a_gpu_they_are_not_used_and_say_why() -> None:
    assert kernels.usable(torch.device("cpu")) in ("there is no GPU here", "triton is not installed")
