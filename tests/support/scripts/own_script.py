"""A training script of somebody else: it counts to sixty, keeps its place in the run directory, and stops with 75 when asked to."""

import os
import signal
import sys
import time
from pathlib import Path

asked: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: asked.append(number))
place = Path(os.environ["HOLDFAST_RUN_DIR"]) / f"count.{os.environ['RANK']}"
count = int(place.read_text()) if place.exists() else 0
assert int(os.environ["WORLD_SIZE"]) == 2 and os.environ["MASTER_ADDR"] and os.environ["MASTER_PORT"] and os.environ["LOCAL_RANK"] == "0"
# With "patient", the first attempt goes on until it is asked to stop.
while count < 60 or ("patient" in sys.argv and os.environ["HOLDFAST_ATTEMPT"] == "1"):
    time.sleep(0.1)
    count += 1
    place.write_text(str(count))
    if asked:
        print(f"stopped at {count}", flush=True)
        sys.exit(75)
print(f"attempt {os.environ['HOLDFAST_ATTEMPT']} counted to {count} in {os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')}", flush=True)
