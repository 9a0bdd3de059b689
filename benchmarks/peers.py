"""holdfast beside what a user would take instead, in one run on one card: the table of benchmarks/results/2026-11-28-speed.md.

    python -m benchmarks.peers [--shape 1b|3b|gemma|gpt2|gpt_neox|mixtral] [--steps 60] [--only bf16] [--out table.md] [--json figures.json]

Every row is a process of its own, on the same shape, the same kind of random tokens and the same optimizer. Figures are
tokens per second: the median over windows of five steps that end with a synchronisation, after a warm-up that is not counted. For
`holdfast run` they are what its own metrics.jsonl says, with the loop, logging every tenth step as the job file does, data from token files and checkpoints on.
Beside them: the most memory that torch had allocated, and for `holdfast run` what `holdfast explain` expected, and the seconds
from the start of its process to the end of the first step.

Peers: transformers.Trainer; a plain PyTorch loop over the same Llama of transformers, eager and compiled, also with torchao's float8;
Accelerate's own fp8, and its DDP on two GPUs. What is not installed, or cannot run on this machine, is named and left out.
Rows on two GPUs have the batch of one on each; their tokens per second are those of both, their share of the peak is that of each. Cards
of one kind differ by some percent, and those of one run wait for each other: so where a row on two GPUs is asked for, its row on one is
measured on both of them at the same time, and the comparison is with the sum, and with twice the slower one.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peer_loops import SHAPES, Figures, Shape, accelerate_ddp, accelerate_fp8, device, measured, plain_loop, trainer
from jobs.specs.gpu_peaks import peak_of
from jobs.specs.precision import Precision

# Not a setting: the row's model is built by transformers.
AS_HF = "hf"


def words_of(shape: Shape, precision: list[str], folder: str, gpus: int = 1) -> list[str]:
    """Settings of a run, as KEY=value. `hf` in `precision`: the model is built by transformers."""
    as_hf = AS_HF in precision
    precision = [word for word in precision if word != AS_HF]
    options = [] if shape.preset != "nano" else [f"MODEL_OPTIONS=d_model={shape.d},n_layers={shape.layers},n_heads={shape.heads},d_ff={shape.ff}"]
    on = ["DEVICE=cuda", "COMPILE=true"] if device() == "cuda" else ["DEVICE=cpu"]
    if as_hf:
        options = []
        (Path(folder) / "config.json").write_text(json.dumps(shape.config()))
    return [
        f"MODEL=hf:{folder}/config.json" if as_hf else f"MODEL={shape.preset}",
        *options,
        f"SEQ_LEN={shape.seq_len}",
        f"BATCH_SIZE={shape.batch * gpus}",
        "NODES=1",
        f"GPUS_PER_NODE={gpus}",
        "SITE=generic",
        f"MICRO_BATCH_SIZE={shape.batch}",
        f"DATA=tokens:{folder}/tokens.bin",
        *on,
        *precision,
    ]


def token_file(shape: Shape, folder: Path, steps: int, gpus: int = 1) -> None:
    from train.data.tokens import write_tokens

    count = (steps + 64) * gpus * shape.batch * shape.seq_len + shape.seq_len
    write_tokens(folder / "tokens.bin", np.random.default_rng(0).integers(0, shape.vocab, int(count * 1.1)), shape.vocab)


def ordinary_run(shape: Shape, steps: int, *precision: str, gpus: int = 1) -> Figures:
    """`holdfast run`, with everything on: the median of the last half of its metrics."""
    from benchmarks.hardware import train
    from jobs.config.memory_estimate import estimate
    from jobs.config.resolver import load
    from jobs.run import event_log, metrics_log

    with tempfile.TemporaryDirectory(prefix="hf-peers-") as folder:
        token_file(shape, Path(folder), steps, gpus)
        # One checkpoint on its way beside the one before it: where the disk has no room for two, only the last is written.
        room = shutil.disk_usage(folder).free > 2.2 * shape.checkpoint_bytes
        shared = ["EVAL_EVERY=0", "EVAL_SAMPLES=16", "KEEP_LAST=1"]
        run = train(
            Path(folder),
            "peer",
            [*words_of(shape, [*precision], folder, gpus), *shared, f"MAX_STEPS={steps}", f"CHECKPOINT_EVERY={max(steps // 2, 1) if room else steps}"],
            timeout=900,
        )
        lines = metrics_log.read(run.metrics)
        figures: Figures = {"tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines if line["step"] > steps // 2)}
        figures["first_step_s"] = lines[0]["time"] - event_log.attempts(event_log.read(run.ledger))[0].started
        expected = estimate(load(run.job_yaml))
        if "gpu_memory_gib" in lines[-1]:
            figures["memory_gb"] = lines[-1]["gpu_memory_gib"] * 2**30 / 1e9
            figures |= {"expected_gb": expected.peak / 1e9} if expected else {}
        return figures


def bare_loop(shape: Shape, steps: int, *precision: str) -> Figures:
    """The same step function without loop, logging and checkpoints: what the loop costs is the difference. By the same clock: windows of as
    many steps as lie between two lines of metrics, the median of the last half of them."""
    from launcher.submission.create_run import resolve_here
    from train.bench import measure

    with tempfile.TemporaryDirectory(prefix="hf-peers-") as folder:
        token_file(shape, Path(folder), steps)
        job = resolve_here([*words_of(shape, [*precision], folder), f"MAX_STEPS={steps}"], os.environ, Path.cwd()).job
        window = min(job.log_every, steps)
        found, _ = measure(job, steps, steps // 2, window)
    rates = [window * shape.batch * shape.seq_len / seconds for seconds in found.window_s]
    return measured(statistics.median(rates[len(rates) // 2 :]))


@dataclass(frozen=True)
class Row:
    """A measurement, the modules that it imports, whether it needs a GPU, and how many processes it has: a GPU each, where there are any.
    `spawned`: the measurement wants to be called in each of them. `built_in`: it trains the built-in model."""

    measure: Callable[[Shape, int], Figures]
    needs: tuple[str, ...] = ()
    gpu: bool = False
    processes: int = 1
    spawned: bool = False
    built_in: bool = False


def of_holdfast(*words: str, needs: tuple[str, ...] = (), gpu: bool = False, processes: int = 1) -> Row:
    return Row(lambda shape, steps: ordinary_run(shape, steps, *words, gpus=processes), needs, gpu, processes, built_in=AS_HF not in words)


# As jobs/gpt_1b_h100.yaml has it.
O2 = "AMP_OPT_LEVEL=O2"
BF16, FP16, TE, AO = ["PRECISION=bf16", O2], ["PRECISION=fp16", O2], ["PRECISION=fp8", "FP8_BACKEND=te", O2], ["PRECISION=fp8", "FP8_BACKEND=torchao", O2]
# Sharded weights are fp32 by themselves, with working copies in 16 bits: no O2.
SHARDED = ["PRECISION=bf16", "PARALLEL=fsdp"]
FAST = "FP8_FAST_ACCUM=grad_input"
_HF, _ENGINE, _AO = ("transformers",), ("transformer_engine",), ("torchao",)
# In the order in which they are measured: what matters most first, for a machine that is had for a short time.
ROWS: dict[str, Row] = {
    "transformers Trainer, bf16, compiled": Row(trainer, _HF),
    "holdfast run, bf16": of_holdfast(*BF16),
    "holdfast run hf, bf16": of_holdfast(AS_HF, *BF16, needs=_HF),
    "holdfast run, fp8 te current": of_holdfast(*TE, needs=_ENGINE, gpu=True),
    "holdfast run hf, fp8 te": of_holdfast(AS_HF, *TE, needs=_HF + _ENGINE, gpu=True),
    "holdfast run hf, bf16, HF_FAST=off": of_holdfast(AS_HF, *BF16, "HF_FAST=off", needs=_HF),
    "holdfast run hf, fp8 torchao tensorwise": of_holdfast(AS_HF, *AO, needs=_HF + _AO, gpu=True),
    "holdfast run, fp8 te current, fast input gradients": of_holdfast(*TE, FAST, needs=_ENGINE, gpu=True),
    "holdfast run, bf16, 2 GPUs, DDP": of_holdfast(*BF16, processes=2),
    "holdfast run, bf16, fp32 weights": of_holdfast("PRECISION=bf16"),
    "holdfast run, bf16, fp32 weights, 2 GPUs, FSDP2": of_holdfast(*SHARDED, processes=2),
    "holdfast run, fp8 te current, 2 GPUs, DDP": of_holdfast(*TE, needs=_ENGINE, gpu=True, processes=2),
    "holdfast run, fp8 te current, 2 GPUs, DDP, 2 GB at once": of_holdfast(*TE, "BUCKET_CAP_MB=2000", needs=_ENGINE, gpu=True, processes=2),
    "Accelerate DDP, bf16, compiled, 2 GPUs": Row(accelerate_ddp, _HF, processes=2, spawned=True),
    "holdfast step alone, bf16": Row(lambda s, n: bare_loop(s, n, *BF16), built_in=True),
    "holdfast step alone, fp8 te current, fast input gradients": Row(lambda s, n: bare_loop(s, n, *TE, FAST), _ENGINE, gpu=True, built_in=True),
    "plain loop, bf16, compiled": Row(lambda s, n: plain_loop(s, n, "bfloat16", compiled=True), _HF, gpu=True),
    "Accelerate fp8 (Transformer Engine), eager": Row(accelerate_fp8, _HF + _ENGINE, gpu=True),
    "holdfast run, fp16": of_holdfast(*FP16, gpu=True),
    "holdfast run, fp8 torchao tensorwise": of_holdfast(*AO, needs=_AO, gpu=True),
    "plain loop, torchao tensorwise, compiled": Row(lambda s, n: plain_loop(s, n, "bfloat16", True, "tensorwise"), _HF + _AO, gpu=True),
    "plain loop, torchao rowwise, compiled": Row(lambda s, n: plain_loop(s, n, "bfloat16", True, "rowwise"), _HF + _AO, gpu=True),
    "plain loop, fp16, compiled": Row(lambda s, n: plain_loop(s, n, "float16", compiled=True), _HF, gpu=True),
    "plain loop, bf16, eager": Row(lambda s, n: plain_loop(s, n, "bfloat16"), _HF),
}


def missing(row: Row, shape: Shape) -> str:
    """Why a row cannot be measured here, or an empty text."""
    if row.built_in and not shape.preset:
        return f"no built-in model has the shape of {shape.family}"
    lacks = [module for module in row.needs if importlib.util.find_spec(module) is None]
    if lacks:
        return f"{', '.join(lacks)} is not installed"
    if device() == "cpu":
        return "needs a GPU" if row.gpu else ""
    import torch

    return f"needs {row.processes} GPUs" if row.processes > torch.cuda.device_count() else ""


def table(shape: Shape, figures: dict[str, Figures], left_out: dict[str, str], head: str, card: str) -> str:
    # One peak for all rows, so that they can be compared: that of bf16.
    peak = peak_of(card, Precision.BF16)
    lines = [
        head,
        "",
        f"| what | tokens/s | % of {f'{peak.tflops:g} TFLOP/s' if peak else 'peak'} | of both alone, % | of twice the slower, % | peak memory, GB | expected, GB | first step after, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        rate, processes = found["tokens_per_s"], ROWS[name].processes
        share = f"{100 * rate / processes * shape.flops / (peak.tflops * 1e12):.1f}" if peak else "-"
        one = figures.get(alone(name)) if processes > 1 else None
        scaling = [f"{100 * rate / processes / one[key]:.1f}" if one and key in one else "-" for key in ("tokens_per_s", "slower_tokens_per_s")]
        rest = [f"{found[key]:.1f}" if key in found else "-" for key in ("memory_gb", "expected_gb", "first_step_s")]
        lines.append(f"| {name} | {rate:,.0f} | {share} | " + " | ".join([*scaling, *rest]) + " |")
    return "\n".join([*lines, *(f"\nLeft out: {name}: {why}." for name, why in left_out.items()), ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="rows that have one of these names, or one of these texts in their name; separated by semicolons")
    parser.add_argument("--row", choices=ROWS, help="measure this row in this process and print the figure")
    parser.add_argument("--out", type=Path, help="file for the table, as Markdown")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.row:
        row = ROWS[args.row]
        if row.spawned and "LOCAL_RANK" not in os.environ:
            launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(row.processes), "-m", "benchmarks.peers", *sys.argv[1:]]
            return subprocess.run([sys.executable, "-m", *launch], timeout=900).returncode
        found = row.measure(shape, args.steps)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\n" + json.dumps(found), flush=True)
        return 0
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    command = f"python -m benchmarks.peers --shape {args.shape} --steps {args.steps}" + (f" --only '{args.only}'" if args.only else "")
    head = f"`{command}`, {time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, Python {platform.python_version()}; {shape.batch} x {shape.seq_len} random tokens per step."
    figures: dict[str, Figures] = {}
    left_out: dict[str, str] = {}
    asked = {name: row for name, row in ROWS.items() if not args.only or any(chosen(word, name, ROWS) for word in args.only.split(";"))}
    for name, row in asked.items():
        on_both = any(alone(other) == name and not missing(ROWS[other], shape) for other in asked if other != name)
        why = missing(row, shape) or _measure(name, args, figures, on_both)
        if why:
            left_out[name] = why
            print(f"{name:55} left out: {why}", flush=True)
        # After each row: what was measured is not lost with the machine.
        text = table(shape, figures, left_out, head, card)
        if args.out:
            args.out.write_text(text)
        if args.json:
            args.json.write_text(json.dumps({"card": card, "torch": torch.__version__, "figures": figures, "left_out": left_out}, indent=1))
    print("\n" + text)
    return 0


def chosen(word: str, name: str, names: Collection[str]) -> bool:
    """The whole name of a row means that row; any other text all rows that have it in their name."""
    return word == name if word in names else word in name


def alone(name: str) -> str:
    """The row on one GPU of a row on two."""
    return name.partition(", 2 GPUs")[0]


def _measure(name: str, args: argparse.Namespace, figures: dict[str, Figures], on_both: bool) -> str:
    """Puts the figures of a row, from a process of its own, beside the others; `on_both`: from one on each of two GPUs at the same time,
    the mean of them and the slower one's speed. Returns why there are none, or an empty text."""
    command = [sys.executable, "-m", "benchmarks.peers", "--shape", args.shape, "--steps", str(args.steps), "--row", name]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    places: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": one} for one in seen[:2]] if on_both else [{}]
    with ThreadPoolExecutor(len(places)) as pool:
        ended = list(pool.map(lambda place: subprocess.run(command, capture_output=True, text=True, timeout=1200, env={**os.environ, **place}), places))
    for done in ended:
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            # torchrun draws a frame below what its ranks said.
            return ([line for line in said if "Error" in line and "ChildFailedError" not in line] or said or [f"ended with {done.returncode}"])[-1][:200]
    found: list[Figures] = [json.loads(done.stdout.splitlines()[-1]) for done in ended]
    figures[name] = {key: statistics.mean(one[key] for one in found) for key in found[0]}
    if on_both:
        figures[name]["slower_tokens_per_s"] = min(one["tokens_per_s"] for one in found)
    print(f"{name:55} " + " ".join(f"{key} {value:,.1f}" for key, value in figures[name].items()), flush=True)
    return ""


if __name__ == "__main__":
    sys.exit(main())
