"""Stands in for training in the tests of sweeps: makes steps, validates, keeps its state, stops when asked. No torch: it starts in no time.

A learning rate below 100 comes to a validation loss of 1; 900 to 900. In their first attempt 1 waits to be killed and 900 to be
given up. 666 fails."""

import json
import os
import signal
import sys
import time
from pathlib import Path

run = Path(os.environ["HOLDFAST_RUN_DIR"])
attempt = run / "attempts" / os.environ["HOLDFAST_ATTEMPT"]
job = dict(line.split(": ", 1) for line in (run / "job.yaml").read_text().splitlines())
lr, max_steps, eval_every = float(job["lr"]), int(job["max_steps"]), int(job["eval_every"])
asked: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda got, _: asked.append(got))
(run / "pid").write_text(str(os.getpid()))
state = run / "state"
step = int(state.read_text()) if state.exists() else 0
patience = time.monotonic() + 60
while step < max_steps:
    if asked or (run / "stop").exists():
        sys.exit(75)
    if lr in (1, 900) and step == max_steps - eval_every and os.environ["HOLDFAST_ATTEMPT"] == "1" and time.monotonic() < patience:
        time.sleep(0.05)
        continue
    time.sleep(0.01)
    step += 1
    if lr == 666 and step == 30:
        raise RuntimeError("the planted fault")
    if step % eval_every == 0:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": lr, "val_loss": lr if lr > 100 else 1.0}) + "\n")
    state.with_suffix(".tmp").write_text(str(step))
    state.with_suffix(".tmp").rename(state)
    (attempt / "progress").write_text(str(step))
