"""A small all-reduce over all processes of a job before an attempt, with a floor for its bandwidth: `python -m train.distributed.allreduce_check`.

Started by srun once per process, with MASTER_ADDR and MASTER_PORT set. Every node says that it has joined; rank 0 writes what was
measured. Where the whole is too slow, neighbours send to each other in pairs: a node that is slow with everybody is named.
"""

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from jobs.core.atomic_write import replace_file
from jobs.core.contract import RankEnv
from jobs.run.rundir import RunDir

# float32 numbers: 64 MB on GPUs, where less is all latency; 4 MB through gloo.
_NUMBERS_GPU, _NUMBERS_CPU = 16 * 2**20, 2**20
_ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.distributed.allreduce_check", description=__doc__)
    parser.add_argument("--seconds", type=int, required=True, help="this process ends after so long, whatever it waits for")
    parser.add_argument("--floor", type=float, required=True, help="GB/s of each process below which a network is too slow")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    # By the kernel: a collective that hangs in C is ended too, and holds no GPU.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(args.seconds)
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    local, node = int(os.environ["SLURM_LOCALID"]), os.environ.get("SLURMD_NODENAME", "")
    attempt = RunDir(Path(os.environ[RankEnv.RUN_DIR])).attempt(int(os.environ[RankEnv.ATTEMPT]))
    result = measure(rank, world, local, node, args.seconds, args.floor, args.device, lambda: attempt.joined(node).touch())
    if rank == 0:
        replace_file(attempt.allreduce, json.dumps(result))
    os._exit(0)


def measure(rank: int, world: int, local: int, node: str, seconds: int, floor: float, device: str, joined: Any) -> dict[str, Any]:
    """{"gb_s": bandwidth of each process, "ranks": n, "slow": nodes, "backend": ...} on rank 0."""
    import torch
    import torch.distributed as dist

    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    data = torch.ones(_NUMBERS_GPU if cuda else _NUMBERS_CPU, device="cuda" if cuda else "cpu")
    wait = torch.cuda.synchronize if cuda else lambda: None
    dist.all_reduce(data)  # connections are made at the first use
    wait()
    if local == 0:
        joined()
    dist.barrier()
    begun = time.monotonic()
    for _ in range(_ROUNDS):
        dist.all_reduce(data)
    wait()
    # What each process must send and receive at least, whatever the algorithm.
    gb_s = 2 * (world - 1) / world * data.numel() * 4 * _ROUNDS / (time.monotonic() - begun) / 1e9
    worst = torch.tensor([gb_s], device=data.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MIN)
    gb_s = float(worst.item())
    slow = _slow_nodes(rank, world, node, data, wait, floor) if gb_s < floor else []
    return {"gb_s": round(gb_s, 3), "ranks": world, "slow": slow, "backend": backend}


def _slow_nodes(rank: int, world: int, node: str, data: Any, wait: Any, floor: float) -> list[str]:
    """Nodes whose best link to a neighbour is below the floor while those of most others are not; on every rank."""
    import torch.distributed as dist

    names: list[str] = [""] * world
    dist.all_gather_object(names, node)
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    mine: list[float] = []
    for shift in (0, 1):
        pairs = [(firsts[i], firsts[(i + 1) % len(firsts)]) for i in range(shift, len(firsts) - 1 + shift, 2)]
        for one, other in pairs:
            if rank in (one, other):
                peer = other if rank == one else one
                begun = time.monotonic()
                for _ in range(2):
                    dist.send(data, peer) if rank < peer else dist.recv(data, peer)
                    dist.recv(data, peer) if rank < peer else dist.send(data, peer)
                wait()
                mine.append(4 * data.numel() * 4 / (time.monotonic() - begun) / 1e9)
        dist.barrier()
    best: list[float] = [0.0] * world
    dist.all_gather_object(best, max(mine, default=0.0))
    return named_slow({names[first]: best[first] for first in firsts}, floor)


def named_slow(best: dict[str, float], floor: float) -> list[str]:
    """Of nodes and the bandwidth of their best link: those below the floor, unless most are. With two nodes it could be either."""
    if len(best) < 3 or median(best.values()) < floor:
        return []
    return sorted(node for node, gb_s in best.items() if gb_s < floor)


if __name__ == "__main__":
    raise SystemExit(main())
