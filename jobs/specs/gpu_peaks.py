"""What GPUs can do at most, by their data sheets: the numbers that a share of the peak is taken of.

Dense figures: the larger ones of the sheets are for matrices of which half is zero. An entry is the name that the driver
gives, or the part of it that tells the model apart; the first that fits counts, so the narrower ones come first.
"""

from dataclasses import dataclass

from jobs.specs.precision import MODES, Precision

# TFLOP/s of one GPU: 16-bit tensor cores, TF32 tensor cores, fp8 tensor cores, fp32 outside of them. None: it has none.
_SHEETS: tuple[tuple[str, float | None, float | None, float | None, float], ...] = (
    ("B200", 2250, 1125, 4500, 75),
    ("GH200", 989.4, 494.7, 1978.9, 66.9),
    ("H200 NVL", 835.5, 417.5, 1671, 60),
    ("H200", 989.4, 494.7, 1978.9, 66.9),
    ("H100 NVL", 835.5, 417.5, 1671, 60),
    ("H100 PCIe", 756, 378, 1513, 51),
    ("H100", 989.4, 494.7, 1978.9, 66.9),
    ("A100", 312, 156, None, 19.5),
    ("L40S", 362, 183, 733, 91.6),
    ("L4", 121, 60, 242, 30.3),
    ("A10", 125, 62.5, None, 31.2),
    ("V100", 125, None, None, 15.7),
)
# Names that hold one of those above and are other cards, whose figures are not the same.
_OTHERS = ("A10G", "A1000", "L40 ", "A100X")


@dataclass(frozen=True)
class Peak:
    """`tflops` of one GPU in a `kind` of arithmetic."""

    tflops: float
    kind: str
    gpu: str


def peak_of(device_name: str, precision: Precision) -> Peak | None:
    """The peak that a run in `precision` is measured by, None for a device that is not in the table.

    fp8 is measured by the peak of bf16: attention, head and loss stay in 16 bits, and the figures of precisions can be
    compared with each other."""
    if any(other in f"{device_name} " for other in _OTHERS):
        return None
    found = next((sheet for sheet in _SHEETS if sheet[0] in device_name), None)
    if found is None:
        return None
    gpu, half, tf32, _, fp32 = found
    if MODES[precision].autocast is not None:
        kind, tflops = "dense bf16" if MODES[precision].autocast == "bfloat16" else "dense fp16", half
    elif precision is Precision.TF32:
        kind, tflops = "dense tf32", tf32
    else:
        kind, tflops = "fp32", fp32
    return Peak(tflops, kind, gpu) if tflops else None
