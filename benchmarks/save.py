"""What a save costs: how long training stands still, in the background beside in the foreground, and how long the writing takes.

    python -m benchmarks.save [--model 1b] [--runs DIR] [--json FILE] [KEY=value ...]

One GPU, real training steps of the preset on synthetic tokens, real files in DIR. The figures are those of the run's own ledger.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import train
from jobs.run import event_log, metrics_log

# Far enough apart that one save is written before the next begins.
_PACE = {"async": ["ASYNC_SAVE=true", "CHECKPOINT_EVERY=60", "MAX_STEPS=190"], "sync": ["ASYNC_SAVE=false", "CHECKPOINT_EVERY=10", "MAX_STEPS=25"]}
_JOB = ["DATA=synthetic", "SEQ_LEN=2048", "BATCH_SIZE=8", "PRECISION=bf16", "NODES=1", "GPUS_PER_NODE=1", "DEVICE=cuda", "SITE=generic"]
_JOB += ["LOG_EVERY=1", "EVAL_EVERY=0", "EVAL_SAMPLES=8", "KEEP_LAST=1"]


def measure(mode: str, model: str, runs: Path, words: list[str]) -> dict[str, Any]:
    """Figures of the saves of one run, the last one left out: it is always waited for."""
    run = train(runs, f"save-{mode}", [f"MODEL={model}", *_JOB, *_PACE[mode], *words])
    saves = [event for event in event_log.read(run.ledger) if event["event"] == "checkpoint"][:-1]
    lines = metrics_log.read(run.metrics)
    gaps = {int(b["step"]): float(b["time"]) - float(a["time"]) for a, b in zip(lines, lines[1:], strict=False)}
    busy = {step for save in saves for step in gaps if save["step"] + 1 < step and _at(lines, step) < float(save["time"])}
    quiet = [gap for step, gap in gaps.items() if step not in busy and step > 10 and all(abs(step - save["step"]) > 1 for save in saves)]
    return {
        "mode": mode,
        "gib": round(saves[0]["bytes"] / 2**30, 2),
        "blocked_s": [save["blocked_s"] for save in saves],
        "total_s": [save["seconds"] for save in saves],
        # The step whose gap holds the stand-still, as the loop saw it from outside.
        "step_with_save_s": [round(gaps[save["step"] + 1], 3) for save in saves if save["step"] + 1 in gaps],
        "step_s": round(statistics.median(quiet), 4),
        "step_while_writing_s": round(statistics.median([gaps[step] for step in busy]), 4) if busy else None,
        "first_step_s": round(gaps.get(2, 0.0), 3),
    }


def _at(lines: list[dict[str, Any]], step: int) -> float:
    return next(float(line["time"]) for line in lines if line["step"] == step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save")
    parser.add_argument("--model", default="1b")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-save-") as folder:
        results = [measure(mode, args.model, args.runs or Path(folder), args.words) for mode in ("sync", "async")]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
