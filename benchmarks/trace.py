"""Where the GPU's time went in a trace of torch's profiler, such as `PROFILE_STEPS=14-16` leaves in the folder of an attempt.

    python -m benchmarks.trace FILE [--steps 3] [--top 15]

Milliseconds, of a step where --steps says how many the trace holds: from the first kernel to the last, what computed, what sent gradients (NCCL) and
how much of that nothing else hid, and what stood idle. `gaps` is the part of that in pauses of less than 20 microseconds, from one kernel to the next that was waiting
already: what CUDA graphs could save at most. `lead` is how long a kernel had been waiting for its turn when it began, the median of all: near zero the GPU
waits for Python.
"""

import argparse
import gzip
import itertools
import json
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_GAP_US = 20
Span = tuple[float, float]


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, packed or not."""
    data = path.read_bytes()
    return list(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"])


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, as spans that neither touch nor overlap, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def length(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def summary(events: list[dict[str, Any]], steps: int = 1) -> dict[str, float]:
    """ms of a step: span, compute, sending, exposed (sending beside which nothing computed), idle, gaps, lead. Empty without kernels."""
    on_gpu = [event for event in events if event.get("cat") in _ON_GPU]
    if not on_gpu:
        return {}
    sends, computes = [], []
    for event in on_gpu:
        (sends if "nccl" in str(event["name"]).lower() else computes).append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    compute, every = union(computes), union([*sends, *computes])
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    leads = [float(event["ts"]) - launched[number] for event in on_gpu if (number := event.get("args", {}).get("correlation")) in launched]
    span = every[-1][1] - every[0][0]
    found = {
        "span": span,
        "compute": length(compute),
        "sending": length(union(sends)),
        "exposed": length(every) - length(compute),
        "idle": span - length(every),
        "gaps": sum(pause for (_, end), (begin, _) in itertools.pairwise(every) if (pause := begin - end) < _GAP_US),
    }
    return {name: round(us / 1000 / steps, 2) for name, us in found.items()} | {"lead": round(statistics.median(leads) / 1000, 2) if leads else 0.0}


def heaviest(events: list[dict[str, Any]], steps: int = 1) -> list[tuple[str, float, float]]:
    """Name, ms of a step and calls of a step of each kernel, the longest first."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in _ON_GPU:
            spent[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    return [(name, us / 1000 / steps, calls[name] / steps) for name, us in spent.most_common()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--top", type=int, default=15)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: a trace holds at least one step")
    try:
        events = read(args.file)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as err:
        parser.error(f"{args.file} is no trace that can be read: {type(err).__name__}: {err}")
    found = summary(events, args.steps)
    if not found:
        print(f"{args.file}: no kernel of a GPU in it", file=sys.stderr)
        return 1
    print("  ".join(f"{name} {value}" for name, value in found.items()))
    for name, spent, calls in heaviest(events, args.steps)[: args.top]:
        print(f"{spent:9.2f} ms {calls:8.1f} x  {name[:120]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
