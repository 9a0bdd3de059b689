"""How fast samples come: memory-mapped token files through the feed of training, and through reading processes.

    python -m benchmarks.data [--tokens 256e6] [--seq-len 2048] [--batch 16] [--consumed 85000]

The file holds random tokens. `warm` has it in the page cache; before `cold` its pages are dropped from there, as far as the
kernel obeys. A rate is the median of the rates of single steps, taken from the thread that would train.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from jobs.config.settings import Job
from train.data.loader import TrainLoader
from train.data.sources import Dataset, open_data
from train.data.tokens import write_tokens


def rate(data: Dataset, *, seq_len: int, batch: int, workers: int, steps: int) -> tuple[float, float]:
    """Tokens per second of one rank: median of the steps, and all tokens over all the time. The first step is the warm-up."""
    job = Job(
        job_name="data",
        batch_size=batch,
        micro_batch_size=batch,
        grad_accum_steps=1,
        seq_len=seq_len,
        max_steps=steps + 1,
        precision="fp32",
        num_workers=workers,
    )
    feed = TrainLoader(job, SimpleNamespace(rank=0, world_size=1, attempt=1, device=torch.device("cpu")), data)  # type: ignore[arg-type]
    times = []
    for step in range(steps + 1):
        begun = time.perf_counter()
        for one in feed.take(step):
            assert one["tokens"].shape == (batch, seq_len)
        times.append(time.perf_counter() - begun)
    feed.close()
    tokens = batch * seq_len
    return tokens / statistics.median(times[1:]), tokens * steps / sum(times[1:])


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=256e6)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--consumed",
        type=float,
        default=85_000,
        help="tokens per second that one GPU takes (benchmarks/results/2026-11-28-precisions-and-memory.md: 1b preset in fp8)",
    )
    parser.add_argument("--dir", type=Path, help="where to put the file: the disk that is to be measured")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{args.tokens:,.0f} tokens as uint16, {args.batch} x {args.seq_len} per step, {args.steps} steps; one GPU takes {args.consumed:,.0f} tokens/s")
    with tempfile.TemporaryDirectory(prefix="hf-data-", dir=args.dir) as folder:
        path = Path(folder) / "train.bin"
        write_tokens(path, np.random.default_rng(0).integers(0, 32_000, int(args.tokens), dtype=np.uint16), 32_000)
        data = open_data(f"tokens:{path}", seq_len=args.seq_len, split="train")
        for name, workers in (("one thread, cold", 0), ("one thread, warm", 0), ("2 processes, warm", 2)):
            if "cold" in name:
                forget(path)
            else:
                np.fromfile(path, dtype=np.uint16).max()
            median, whole = rate(data, seq_len=args.seq_len, batch=args.batch, workers=workers, steps=args.steps)
            print(f"{name:20s} {median:14,.0f} tokens/s (median step)  {whole:14,.0f} (all)  = {whole / args.consumed:6.0f} x what one GPU takes")


if __name__ == "__main__":
    main()
