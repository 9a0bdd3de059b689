"""One run from `make submit` over a SIGTERM to its end, in this one process, and every function of ours that was called meanwhile.

    python tests/support/walked.py FOLDER        prints the calls as JSON, in order: ["launcher/commands/submit.py:submit_job", ...]

Only Slurm is not real: `sbatch` is a stub, and FakeSlurm answers for slurmctld. tests/project/test_house.py compares the walks of
docs/explanation/architecture.md with what this says.
"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
SETTINGS = ("MODEL_OPTIONS=n_layers=1,d_model=32,n_heads=2,d_ff=64", "SEQ_LEN=32", "BATCH_SIZE=4", "MAX_STEPS=5000", "EVAL_EVERY=0", "EVAL_SAMPLES=4",
            "LOG_EVERY=1", "CHECKPOINT_EVERY=1000", "DATA=synthetic", "NODES=1", "GPUS_PER_NODE=1", "DEVICE=cpu", "GPU_REQUEST=none", "TRACKERS=none", "REQUEUE_CONFIRM_S=0")  # fmt: skip

calls: list[str] = []
_known: dict[Any, str] = {}


def note(frame: FrameType, event: str, _: Any) -> None:
    if event != "call":
        return
    code = frame.f_code
    place = _known.get(code)
    if place is None:
        file = code.co_filename
        place = _known[code] = f"{os.path.relpath(file, REPO)}:{code.co_qualname}" if file.startswith(f"{REPO}{os.sep}") else ""
    if place:
        calls.append(place)


def stubs(folder: Path) -> str:
    """A PATH on which sbatch accepts everything."""
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text("#!/bin/sh\necho 'Submitted batch job 100'\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def ranks(run: Any, values: dict[str, str], stop_at: int) -> int:
    """The one rank of an attempt; a SIGTERM comes once it has done `stop_at` steps."""
    from train.__main__ import main

    os.environ.update({**values, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    sys.argv = ["train", "--run-dir", str(run.path)]

    def stop() -> None:
        progress = run.attempt(int(values["HOLDFAST_ATTEMPT"])).progress
        while not (progress.exists() and int(progress.read_text() or 0) >= stop_at):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return main()


def walk(folder: Path) -> None:
    from test_verdict import FakeSlurm

    from jobs.run import store
    from launcher.attempt import lifecycle
    from launcher.commands.submit import submit_job

    slurm = FakeSlurm()
    job = slurm.new()
    os.environ |= {"PATH": stubs(folder / "bin"), "MAKEFLAGS": " -- PRECISION=bf16"}
    assert submit_job([*SETTINGS, f"RUNS_DIR={folder}/runs"], folder, local=False, test_only=False, wait=False, array=[], as_json=True) == 0
    os.environ.pop("MAKEFLAGS")
    run = store.find(None, folder / "runs")

    def begin() -> dict[str, str]:
        job.state, job.started = "RUNNING", time.time()
        return lifecycle.begin(run, {"SLURM_JOB_ID": job.id, "SLURM_RESTART_COUNT": str(job.restarts), "SLURM_JOB_NODELIST": "localhost"}, slurm)

    values = begin()
    code = ranks(run, values, stop_at=3)
    assert code == 75, run.log(job.id, 0)
    verdict, cause = lifecycle.end(run, {"SLURM_JOB_ID": job.id, **values}, slurm, code, ["TERM"])
    assert verdict.again and cause == "requeued", (verdict, cause)
    with mock.patch("torch.set_num_interop_threads"):  # once in a process, says torch
        # A step further, so that it has resumed and has work to save.
        assert ranks(run, begin(), stop_at=int(run.attempt(1).progress.read_text()) + 1) == 75


if __name__ == "__main__":
    sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests/support"), str(REPO / "tests/jobs/run")]
    sys.setprofile(note)
    threading.setprofile(note)
    told = io.StringIO()
    with mock.patch("launcher.attempt.lifecycle.checked", lambda *_, **__: {}), contextlib.redirect_stdout(told):
        walk(Path(sys.argv[1]))
    sys.setprofile(None)
    print(json.dumps(calls), flush=True)
    os._exit(0)
