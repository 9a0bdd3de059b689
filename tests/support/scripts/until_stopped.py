"""A user script without dependencies: the first attempt runs until it is asked to stop and leaves with 75, later ones finish at once."""

import os
import signal
import sys
import time
from pathlib import Path

stopped: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: stopped.append(number))
run_dir, attempt = Path(os.environ["HOLDFAST_RUN_DIR"]), os.environ["HOLDFAST_ATTEMPT"]
(run_dir / f"running.{attempt}").touch()
while attempt == "1" and not stopped:
    time.sleep(0.02)
sys.exit(75 if stopped else 0)
