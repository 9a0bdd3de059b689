"""Run directories written by hand for the report's tests: two days of a 16-GPU training with interruptions, in some milliseconds."""

import json
import math
import random
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.run.rundir import RunDir

BEGAN = 1_795_000_000.0


def written_run(runs: Path, name: str, *, steps: int = 6000, every: int = 10, seed: int = 1, causes: tuple[str, ...] = ("preempted", "node_failure", "time_limit", "finished"), note: str = "",
                loss_scale: bool = True, lr: float = 3e-4, diff: str = "", nodes: int = 2, gpus: int = 8, **settings: Any) -> RunDir:  # fmt: skip
    """A run of 16 GPUs. Attempts share the steps evenly; an attempt that ends by node_failure or killed loses 40 steps."""
    run = RunDir(runs / name)
    run.logs.mkdir(parents=True)
    job = Job(
        **{
            **{
                "job_name": name.rpartition("-")[0],
                "max_steps": steps,
                "lr": lr,
                "note": note,
                "batch_size": 512,
                "micro_batch_size": 8,
                "grad_accum_steps": 4,
                "nodes": nodes,
                "gpus_per_node": gpus,
            },
            **settings,
        }
    )  # type: ignore[arg-type]
    run.job_yaml.write_text(dump_yaml(job.model_dump(mode="json")))
    origins = dict.fromkeys(Job.model_fields, "default") | {
        "max_steps": "jobs/gpt_1b_h100.yaml",
        "lr": "command line",
        "batch_size": "command line",
        "nodes": "slurm/sites/h100.yaml",
        "note": "command line",
    }
    run.origins.write_text(json.dumps(origins))
    run.snapshot.write_text(
        json.dumps(
            {"time": BEGAN - 600, "from": "/home/ada/gpt", "files": 132, "bytes": 900_000, "commit": "3f0c9a1be2", "branch": "main", "dirty": bool(diff)}
        )
    )
    run.diff.write_text(diff)
    rng = random.Random(seed)
    ledger: list[dict[str, Any]] = [{"event": "submitted", "attempt": 0, "job_id": "81237", "time": BEGAN - 1200}]
    metrics: list[dict[str, Any]] = []
    clock, step, world = BEGAN, 0, nodes * gpus
    for number, cause in enumerate(causes, 1):
        first, began = step, clock
        ledger.append(
            {
                "event": "start",
                "attempt": number,
                "job_id": "81237",
                "time": clock,
                "nodes": [f"node{(number + i) % 9 + 1}" for i in range(nodes)],
                "world": world,
            }
        )
        clock += 95
        ledger.append({"event": "resumed", "attempt": number, "job_id": "81237", "time": clock, "step": step})
        until = steps if number == len(causes) and cause == "finished" else steps * number // len(causes)
        lost = 40 if cause in ("node_failure", "killed") else 0
        while step < until:
            step += 1
            clock += 0.9 + rng.random() * 0.1
            if rng.random() < 0.001 and loss_scale:
                ledger.append(
                    {
                        "event": "overflow",
                        "attempt": number,
                        "job_id": "81237",
                        "time": clock,
                        "step": step,
                        "scale": 65536.0 / 2 ** (step // 2000),
                        "first": "blocks.3.mlp",
                    }
                )
            if step % every == 0 or step == 1:
                line = {
                    "step": step, "loss": 2.4 + 7 * math.exp(-step / (steps / 9)) + rng.gauss(0, 0.04), "lr": lr * min(step / (steps * 0.05), 0.5 + 0.5 * math.cos(math.pi * step / steps)),
                    "grad_norm": 0.4 + 3 * math.exp(-step / 300) + abs(rng.gauss(0, 0.08)), "tokens": step * 1_048_576, "tokens_per_s": rng.gauss(1_140_000, 9_000), "peak_pct": rng.gauss(55, 0.5),
                    "data_wait_pct": abs(rng.gauss(0, 0.2)), "save_wait_pct": 0.0, "gpu_memory_gib": 61.2 + min(step, 200) / 40, "attempt": number, "time": clock,
                }  # fmt: skip
                if loss_scale:
                    line["loss_scale"] = 65536.0 / 2 ** (step // 2000)
                if step % (every * 25) == 0 or step == steps:
                    line["val_loss"] = 2.5 + 7 * math.exp(-step / (steps / 9)) + rng.gauss(0, 0.01)
                    line["val_bits_per_byte"] = line["val_loss"] / math.log(2)
                metrics.append(line)
        seconds = clock - began + 12
        work = clock - began - 95
        parts = {
            "start_up": 52.0,
            "restore": 18.0 if number > 1 else 0.0,
            "first_step": 25.0 if number > 1 else 43.0,
            "useful": work * 0.965,
            "data_wait": work * 0.004,
            "save_stall": work * 0.012,
            "evaluation": work * 0.019,
            "stop": 12.0,
        }
        clock += 12
        if cause in ("running", "open"):
            break
        ledger.append({"event": "end", "attempt": number, "job_id": "81237", "time": clock, "cause": cause, "evidence": f"what slurmctld said about attempt {number}", "step": step, "start_step": first, "saved_step": step - lost,
                       "lost_steps": lost, "seconds": seconds, "gpu_seconds": seconds * world, "parts": parts, "marks": []})  # fmt: skip
        step -= lost
        if lost:
            metrics = [line for line in metrics if line["step"] <= step]
        clock += 240 + 900 * rng.random()
    run.ledger.write_text("".join(json.dumps(event) + "\n" for event in ledger))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return run
