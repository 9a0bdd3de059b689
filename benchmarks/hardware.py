"""What every precision does on a real GPU: loss, parity with fp32, overflow, and resume from each into each.

    python -m benchmarks.hardware precisions [--steps 200]     one table row per precision, on one GPU
    python -m benchmarks.hardware matrix                       saved in one precision, resumed in every other
    python -m benchmarks.hardware spread                       DDP and FSDP2 on two GPUs beside one GPU
    python -m benchmarks.hardware memory                       the estimate of `holdfast explain` beside the measured peak

The built-in 124m preset on the source text of Python's standard library; through the same code as `holdfast run`.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir

PRECISIONS: dict[str, list[str]] = {
    "fp32": ["PRECISION=fp32"],
    "tf32": ["PRECISION=tf32"],
    "bf16": ["PRECISION=bf16"],
    "bf16 O2": ["PRECISION=bf16", "AMP_OPT_LEVEL=O2"],
    "fp16": ["PRECISION=fp16"],
    "fp16 O2": ["PRECISION=fp16", "AMP_OPT_LEVEL=O2"],
    "fp8 torchao tensorwise": ["PRECISION=fp8", "FP8_BACKEND=torchao"],
    "fp8 torchao rowwise": ["PRECISION=fp8", "FP8_BACKEND=torchao", "FP8_RECIPE=rowwise"],
    "fp8 te current": ["PRECISION=fp8", "FP8_BACKEND=te", "FP8_RECIPE=current"],
    "fp8 te delayed": ["PRECISION=fp8", "FP8_BACKEND=te", "FP8_RECIPE=delayed"],
    "fp8 te block": ["PRECISION=fp8", "FP8_BACKEND=te", "FP8_RECIPE=block"],
}
MODEL = [
    "MODEL=124m",
    "SEQ_LEN=1024",
    "BATCH_SIZE=16",
    "LR=6e-4",
    "WARMUP_PCT=0.1",
    "EVAL_SAMPLES=64",
    "NODES=1",
    "GPUS_PER_NODE=1",
    "DEVICE=cuda",
    "LOG_EVERY=1",
    "SITE=generic",
]

_RUN = """
import os, sys
from pathlib import Path
from launcher.submission.create_run import prepare, resolve_here
from launcher.local.executor import run_attempts
run, _ = prepare(resolve_here(sys.argv[1:], os.environ, Path.cwd()), Path.cwd(), sys.executable)
sys.exit(run_attempts(run, os.environ))
"""


def train(runs: Path, run_id: str, words: list[str], timeout: float = 400) -> RunDir:
    """Starts (or resumes) a run and waits for it. Raises with the end of its log when it fails."""
    run = RunDir(runs / f"quickstart-{run_id}")
    done = subprocess.run([sys.executable, "-c", _RUN, *words, f"RUNS_DIR={runs}", f"RUN_ID={run_id}"], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        logs = sorted(run.logs.glob("*.out")) if run.logs.exists() else []
        tail = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
        raise RuntimeError(f"{run_id} ended with {done.returncode}: {done.stderr[-2000:]}\n{tail}")
    return run


def lines_of(run: RunDir) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in metrics_log.read(run.metrics)}


def change(run: RunDir, **settings: object) -> None:
    """Rewrites settings of a run between two attempts, as `holdfast resume RUN KEY=value` does."""
    from jobs.config.yaml_io import dump_yaml, read_yaml

    values = {**read_yaml(run.job_yaml, "job.yaml"), **settings}
    run.job_yaml.write_text(dump_yaml(values))


def _link(source: str, target: str) -> None:
    """A link for what never changes, a copy for what the next attempt appends to."""
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def available(names: list[str]) -> list[str]:
    def found(module: str) -> bool:
        return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0

    backends = {"te": found("transformer_engine.pytorch"), "torchao": found("torchao.float8")}
    return [name for name in names if not name.startswith("fp8") or backends[name.split()[1]]]


def precisions(args: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    reference: dict[int, dict[str, Any]] = {}
    wanted = [name for name in PRECISIONS if not args.only or any(word in name for word in args.only.split(","))]
    for name in available(wanted):
        begun = time.monotonic()
        try:
            run = train(
                runs,
                name.replace(" ", "-"),
                [*MODEL, *PRECISIONS[name], f"MAX_STEPS={args.steps}", f"EVAL_EVERY={args.steps}", f"CHECKPOINT_EVERY={args.steps}", f"COMPILE={args.compile}"],
            )
        except (RuntimeError, subprocess.TimeoutExpired) as err:
            rows.append({"precision": name, "error": str(err)[-1500:]})
            print(json.dumps(rows[-1]), flush=True)
            continue
        lines = lines_of(run)
        reference = reference or lines
        gaps = [abs(lines[s]["loss"] - reference[s]["loss"]) for s in lines if s in reference]
        speeds = sorted(line["tokens_per_s"] for s, line in lines.items() if s > args.steps // 2)
        overflows = sum(event["event"] == "overflow" for event in event_log.read(run.ledger))
        last = lines[max(lines)]
        rows.append({
            "precision": name, "first": lines[1]["loss"], "last": last["loss"], "val": last.get("val_loss"), "max gap": max(gaps), "mean gap": sum(gaps) / len(gaps),
            "overflows": overflows, "tokens_per_s": speeds[len(speeds) // 2], "seconds": round(time.monotonic() - begun, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(run.checkpoints)
    if args.overflow:
        run = train(
            runs, "overflow", [*MODEL, "PRECISION=fp16", "GRAD_SCALER_INIT=1e12", "MAX_OVERFLOWS=40", "MAX_STEPS=30", "EVAL_EVERY=0", "CHECKPOINT_EVERY=30"]
        )
        events = [event for event in event_log.read(run.ledger) if event["event"] == "overflow"]
        last = lines_of(run)[30]
        rows.append(
            {
                "precision": "fp16 from scale 1e12",
                "overflows": len(events),
                "first bad": events[0]["first"] if events else None,
                "scale at the end": last["loss_scale"],
                "last": last["loss"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def matrix(args: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    """Ten steps in one precision; then its checkpoint of step 5 is resumed in every precision."""
    every = ["fp32", "tf32", "bf16", "fp16", "fp8 torchao tensorwise", "fp8 te current", "fp8 te delayed"]
    names = available([name for name in every if not args.only or any(word in name for word in args.only.split(","))])
    short = [*MODEL, "BATCH_SIZE=8", "SEQ_LEN=512", "EVAL_EVERY=0", "CHECKPOINT_EVERY=5", "KEEP_LAST=5", "MAX_STEPS=10"]

    def straight(source: str) -> RunDir | str:
        try:
            return train(runs, source.replace(" ", "-"), [*short, *PRECISIONS[source]])
        except (RuntimeError, subprocess.TimeoutExpired) as err:
            return str(err)[-600:]

    def cell(source: str, first: RunDir | str, target: str) -> dict[str, Any]:
        if isinstance(first, str):
            return {"from": source, "to": target, "error": first}
        run_id = f"{source}--{target}".replace(" ", "-")
        copy = RunDir(runs / f"quickstart-{run_id}")
        # Links and not copies: forty checkpoints of 1.5 GB would fill the disk. A checkpoint is never written to again.
        shutil.copytree(first.path, copy.path, copy_function=_link, ignore=shutil.ignore_patterns("step-00000010", "attempts"))
        settings = dict(word.split("=") for word in PRECISIONS[target])
        change(copy, precision=settings["PRECISION"], fp8_backend=settings.get("FP8_BACKEND", "te"), fp8_recipe=settings.get("FP8_RECIPE"))
        try:
            lines = lines_of(train(runs, run_id, short))
        except (RuntimeError, subprocess.TimeoutExpired) as err:
            return {"from": source, "to": target, "error": str(err)[-600:]}
        shutil.rmtree(copy.checkpoints)
        resumed = [event["step"] for event in event_log.read(copy.ledger) if event["event"] == "resumed"]
        row = {
            "from": source,
            "to": target,
            "resumed at": resumed[-1],
            "loss at 5": lines[5]["loss"],
            "loss at 10": lines[10]["loss"],
            "straight": lines_of(first)[10]["loss"],
        }
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(args.parallel) as pool:
        firsts = dict(zip(names, pool.map(straight, names), strict=True))
        rows = list(pool.map(lambda pair: cell(pair[0], firsts[pair[0]], pair[1]), [(a, b) for a in names for b in names]))
    for row in rows:
        if "error" in row:
            print(json.dumps(row), flush=True)
    return rows


def spread(args: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    reference: dict[int, dict[str, Any]] = {}
    for name, words in (
        ("1 GPU", ["GPUS_PER_NODE=1"]),
        ("2 GPUs, DDP", ["GPUS_PER_NODE=2", "PARALLEL=ddp"]),
        ("2 GPUs, FSDP2", ["GPUS_PER_NODE=2", "PARALLEL=fsdp"]),
    ):
        for precision in ("fp32", "bf16"):
            try:
                run = train(
                    runs,
                    f"{name}-{precision}".replace(" ", "").replace(",", "-"),
                    [*MODEL, *words, f"PRECISION={precision}", f"MAX_STEPS={args.steps}", f"EVAL_EVERY={args.steps}", f"CHECKPOINT_EVERY={args.steps}"],
                )
            except (RuntimeError, subprocess.TimeoutExpired) as err:
                rows.append({"spread": name, "precision": precision, "error": str(err)[-2500:]})
                print(json.dumps(rows[-1]), flush=True)
                continue
            lines = lines_of(run)
            if name == "1 GPU" and precision == "fp32":
                reference = lines
            gaps = [abs(lines[s]["loss"] - reference[s]["loss"]) for s in lines if s in reference]
            speeds = sorted(line["tokens_per_s"] for s, line in lines.items() if s > args.steps // 2)
            rows.append(
                {
                    "spread": name,
                    "precision": precision,
                    "last": lines[max(lines)]["loss"],
                    "max gap to 1 GPU fp32": max(gaps),
                    "tokens_per_s": speeds[len(speeds) // 2],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def memory(args: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    """What torch had allocated at most over six steps, and what `holdfast explain` had said."""
    from jobs.config.memory_estimate import estimate
    from jobs.config.resolver import load

    rows: list[dict[str, Any]] = []
    shapes = {"124m": ["MODEL=124m", "SEQ_LEN=1024", "BATCH_SIZE=16"], "1b": ["MODEL=1b", "SEQ_LEN=2048", "BATCH_SIZE=8"]}
    ways = {"eager": [], "compiled": ["COMPILE=true"], "recomputed": ["GRAD_CHECKPOINTING=true"]}
    names = available(
        [
            name
            for name in ("fp32", "bf16", "bf16 O2", "fp16", "fp8 te current", "fp8 torchao tensorwise")
            if not args.only or any(word in name for word in args.only.split(","))
        ]
    )
    for shape, way, name in itertools.product(shapes, ways, names):
        # fp8 by torchao is not meant to run without a compiler, and fp32 of 1b is no way to train it.
        if (way, name) == ("eager", "fp8 torchao tensorwise") or (shape, name) == ("1b", "fp32"):
            continue
        row: dict[str, Any] = {"model": shape, "way": way, "precision": name}
        try:
            run = train(
                runs,
                "-".join((shape, way, name)).replace(" ", "-"),
                [
                    *MODEL,
                    *shapes[shape],
                    *ways[way],
                    *PRECISIONS[name],
                    "DATA=synthetic",
                    "MAX_STEPS=6",
                    "EVAL_EVERY=0",
                    "EVAL_SAMPLES=8",
                    "CHECKPOINT_EVERY=6",
                ],
            )
        except (RuntimeError, subprocess.TimeoutExpired) as err:
            row["error"] = str(err)[-600:]
        else:
            expected = estimate(load(run.job_yaml))
            assert expected
            measured = lines_of(run)[5]["gpu_memory_gib"] * 2**30
            row |= {
                "measured GB": round(measured / 1e9, 2),
                "estimate GB": round(expected.peak / 1e9, 2),
                "estimate / measured": round(expected.peak / measured, 3),
            }
            shutil.rmtree(run.checkpoints)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["precisions", "matrix", "spread", "memory"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", help="precisions: those whose name has one of these words, such as fp32,te")
    parser.add_argument("--compile", default="false")
    parser.add_argument("--parallel", type=int, default=6, help="matrix: runs at a time on the one GPU")
    parser.add_argument("--overflow", action="store_true", help="precisions: also provoke fp16 overflows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{gpu} x {torch.cuda.device_count()}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hf-hardware-") as folder:
        os.environ.setdefault("XDG_CACHE_HOME", folder)
        rows = {"precisions": precisions, "matrix": matrix, "spread": spread, "memory": memory}[args.what](args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
