"""The matrix of docs/evidence/resume.md: killed and resumed beside straight, over precisions, sizes and parallel modes.

    python -m benchmarks.resume_matrix                        all rows that this machine can run, written into the page
    python -m benchmarks.resume_matrix --kills 3 --print      the shorter form, on the terminal; exits 1 when a row does not hold

Every row is `holdfast verify resume` with that many kills: -9 to all ranks, at random steps and inside saves in turn.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from jobs.core.contract import Exit
from launcher.local.executor import gpus_here
from launcher.verify.resume import HEADINGS, Case, cells, run_cases

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "resume.md"
_HEAD = """\
<!-- Written by `python -m benchmarks.resume_matrix`; changes made here are lost. -->
# Exact resume

Each row trains without interruption and again with kills: SIGKILL to all ranks, at a random step and inside a save in turn, then resume. Weights
and moments are compared by sha256, losses bit by bit, samples by (step, position in the batch). At another size or parallel mode sums are taken in another
order; required are then the same samples, and losses within 1e-3 (fp32) or 3e-2 (bf16, fp16), relative.

"""
_JOB = [
    "MODEL_OPTIONS=n_layers=1,d_model=64,n_heads=2,d_ff=128",
    "SEQ_LEN=64",
    "BATCH_SIZE=12",
    "EVAL_SAMPLES=24",
    "MAX_STEPS=120",
    "CHECKPOINT_EVERY=10",
    "SEED=7",
]


def cases_of(precision: str, kills: int) -> list[Case]:
    few = min(kills, 5)
    rows = [Case("straight, against killed and resumed", (), kills)]
    if precision in ("fp32", "bf16"):
        rows.append(Case("2 -> 1 -> 2 processes", ("GPUS_PER_NODE=1",), few))
    if precision == "fp32":
        rows += [
            Case("ddp -> fsdp -> ddp", ("PARALLEL=fsdp",), few),
            Case("ddp x 2 -> fsdp x 3 -> ddp x 2", ("PARALLEL=fsdp", "GPUS_PER_NODE=3"), few),
            Case("fp32 -> bf16 -> fp32", ("PRECISION=bf16",), few),
        ]
    return rows


def matrix(precisions: list[str], kills: int) -> tuple[str, bool]:
    """The table as Markdown, and whether every row holds."""
    lines = ["| precision | " + " | ".join(HEADINGS) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    begun, good = time.monotonic(), True
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="holdfast-matrix-") as runs:
            words = [f"RUNS_DIR={runs}", f"PRECISION={precision}", *_JOB, *(["GPUS_PER_NODE=2"] if not gpus_here() else [])]
            folder, _, cases = run_cases(words, Path.cwd(), cases_of(precision, kills), seed=1)
            shutil.rmtree(folder, ignore_errors=True)
        good = good and all(case.passed for case in cases)
        lines += ["| " + " | ".join((precision, *cells(case))) + " |" for case in cases]
    where = f"{gpus_here()} GPU" if gpus_here() else "2 processes on a CPU"
    note = f"{where}, Python {platform.python_version()}, torch {_torch_version()}, {time.strftime('%Y-%m-%d')}; {(time.monotonic() - begun) / 60:.0f} minutes."
    return "\n".join([*lines, "", note]), good


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume_matrix")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--precisions", default="fp16,bf16,fp32" if gpus_here() else "fp32,bf16")
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args()
    os.environ.pop("RUNS_DIR", None)
    text, good = matrix(args.precisions.split(","), args.kills)
    print(text)
    if not args.only_print:
        PAGE.write_text(f"{_HEAD}{text}\n")
    return Exit.DONE if good else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
