"""A training script of somebody else that uses the helper: a walk whose every step follows from the one before, so that a step
lost or done twice changes its end. It dawdles, so that there is time to interrupt it, until a file `hurry` lies in its folder."""

import json
import os
import sys
import time
from pathlib import Path

import holdfast

STEPS, SAVE_EVERY, PAUSE_S = (int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])) if len(sys.argv) > 1 else (60, 20, 0.05)
MASK = 2**61 - 1
HURRY = holdfast.run_dir / "hurry"

step, value = 0, holdfast.setting("seed", 0) + holdfast.rank
found = holdfast.latest_checkpoint()
if found:
    step = holdfast.step_of(found)
    value = json.loads((found / f"state.{holdfast.rank}.json").read_text())
while step < STEPS:
    time.sleep(0 if HURRY.exists() else PAUSE_S)
    value = (value * 6364136223846793005 + step) % MASK
    step += 1
    holdfast.progress(step)
    if step % 5 == 0:
        holdfast.log(step=step, loss=value / MASK)
    stop = holdfast.stop_requested()
    if os.environ.get("FAIL_AT") == str(step):
        raise MemoryError("no room for the walk")
    if stop or step % SAVE_EVERY == 0 or step == STEPS:
        folder = holdfast.new_checkpoint(step)
        (folder / "parts").mkdir(exist_ok=True)
        (folder / f"state.{holdfast.rank}.json").write_text(json.dumps(value))
        (folder / "parts" / f"{holdfast.rank}.bin").write_bytes(b"x" * 1000)
        holdfast.commit(folder)
    if stop:
        holdfast.exit_requeue()
print(f"rank {holdfast.rank} ended at {value}", flush=True)
Path(holdfast.run_dir / f"end.{holdfast.rank}").write_text(str(value))
