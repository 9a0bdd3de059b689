"""User script that knows nothing of holdfast. The first argument chooses how it treats signals; it appends a line to `seen` for what happens.

deaf: no handler. leaves: exits with 0 on TERM or USR2. ignores: ignores TERM. tail: rank 0 works on for 30 s after the others
left. fails: rank 1 exits with 3, rank 0 hangs. Attempt 1 runs until something ends it; later attempts end after one second."""

import os
import signal
import sys
import time
from pathlib import Path

kind, rank, attempt = sys.argv[1], int(os.environ["RANK"]), os.environ["HOLDFAST_ATTEMPT"]
seen = Path(os.environ["HOLDFAST_RUN_DIR"]) / f"seen.{rank}"


def note(words: str) -> None:
    with seen.open("a") as file:
        file.write(f"{attempt} {words} {time.time():.1f}\n")


def leave(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # Slurm sends TERM twice
    note(f"signal {number}")
    sys.exit(0)


if kind == "leaves":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, leave)
elif kind == "ignores":
    signal.signal(signal.SIGTERM, lambda *_: note("ignored TERM"))
note("begin")
if kind == "tail":
    time.sleep(30 if rank == 0 else 0)
elif kind == "fails":
    if rank == 1:
        sys.exit(3)
    time.sleep(600)
else:
    time.sleep(600 if attempt == "1" else 1)
note("end")
