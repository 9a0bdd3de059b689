"""The precision modes: one table, from which training builds, rendering refuses and the docs are written."""

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"


@dataclass(frozen=True)
class Mode:
    """One number format of the matrix products.

    `autocast` is the torch dtype name of the autocast region, or None. `min_arch` is the compute capability
    times ten (80 for sm_80) that a GPU must have. `on_cpu` says whether a machine without a GPU can run it.
    """

    name: Precision
    weights: str
    compute: str
    autocast: str | None
    matmul_precision: str
    loss_scaling: bool
    min_arch: int | None
    on_cpu: bool
    note: str


MODES: dict[Precision, Mode] = {
    mode.name: mode
    for mode in (
        Mode(Precision.FP32, "fp32", "ieee fp32", None, "highest", False, None, True, "the reference"),
        Mode(Precision.TF32, "fp32", "tf32 matmul", None, "high", False, 80, False, "10-bit mantissa in matrix products"),
        # TF32 also for what autocast leaves in fp32; a CPU has no TF32, and "high" means nothing to it.
        Mode(Precision.BF16, "fp32", "bf16 autocast", "bfloat16", "high", False, 80, True, "the default"),
        Mode(Precision.FP16, "fp32", "fp16 autocast", "float16", "high", True, 70, False, "dynamic loss scaling"),
        Mode(Precision.FP8, "fp32", "bf16 autocast, fp8 matrix products", "bfloat16", "high", False, 89, False, "see fp8_backend, fp8_recipe"),
    )
}

# Ways to find fp8 scales, by backend; the first one is the default.
FP8_RECIPES: dict[str, tuple[str, ...]] = {"te": ("current", "delayed", "block", "mxfp8"), "torchao": ("tensorwise", "rowwise")}

# Blackwell: the first chip whose tensor cores take one scale for each 32 values.
MXFP8_ARCH = 100

# Not a mode: take what `holdfast precision` recommended for this model on this hardware (jobs/config/precision_cache.py).
AUTO = "auto"

# Words of other tools, and what they mean here. YAML 1.1 reads a bare `no` as False.
ALIASES: dict[str, Precision] = {
    "no": Precision.FP32,
    "false": Precision.FP32,
    "none": Precision.FP32,
    "float32": Precision.FP32,
    "bfloat16": Precision.BF16,
    "float16": Precision.FP16,
    "half": Precision.FP16,
}


def arch_number(arch: str) -> int:
    """90 for `sm_90`; raises ValueError for anything else than sm_<digits>."""
    head, _, digits = arch.partition("_")
    if head != "sm" or not digits.isdigit():
        raise ValueError(f"{arch!r} is not a GPU architecture; write it like sm_90")
    return int(digits)


def runs_on(mode: Mode, arch: int | None) -> bool:
    """Whether `mode` runs on a GPU of compute capability `arch` (90 for sm_90), or on a CPU when `arch` is None."""
    if arch is None:
        return mode.on_cpu
    return mode.min_arch is None or arch >= mode.min_arch


def nearest_that_runs(mode: Mode, arch: int | None) -> Precision:
    """The mode to name in a refusal: the next one down the table that this hardware has."""
    order = (Precision.FP8, Precision.BF16, Precision.FP16, Precision.TF32, Precision.FP32)
    later = order[order.index(mode.name) + 1 :]
    return next(name for name in later if runs_on(MODES[name], arch))
