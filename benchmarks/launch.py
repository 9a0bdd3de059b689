"""`make bench-launch`: what launching costs, beside what others take for the same. Medians on this machine; the Slurm part on a private lab.

    python -m benchmarks.launch [--repeat 20] [--runs 1000] [--tasks 10000]

The commands of a table take turns, so that whatever else the machine does meets all of them alike. Beside the time of the
clock stands that of the processor, which a busy machine changes least.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks import many_runs
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.status import screen
from launcher.status.poller import Known
from slurm.devcluster import lab

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
TINY = ["MODEL_OPTIONS=n_layers=1,d_model=64,n_heads=2,d_ff=128", "SEQ_LEN=64", "BATCH_SIZE=16", "MAX_STEPS=2", "EVAL_SAMPLES=8", "NODES=2", "GPUS_PER_NODE=2"]
SUBMITIT = """\
import submitit
executor = submitit.SlurmExecutor(folder="logs")
executor.update_parameters(nodes=2, ntasks_per_node=8, gpus_per_node=8, time=60)
print(executor._make_submission_file_text("python train.py", "id"))
"""

Command = tuple[str, list[str], dict[str, str] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=10_000)
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; median of {args.repeat}: clock (processor)"
    )
    room = Path(tempfile.mkdtemp(prefix="hf-bench-", dir="/tmp"))
    room.chmod(0o755)
    try:
        _commands(room, args.repeat)
        _many(room, args.runs, max(args.repeat // 4, 3))
        missing = lab.missing_programs()
        if missing:
            print(f"left out: submit, start and arrays, which need {', '.join(missing)}")
            return
        here = lab.start(room / "lab", lab.LabConfig())
        try:
            environ = {**os.environ, **here.env(), "HOLDFAST_SITE": "lab", "RUNS_DIR": str(room / "submitted")}
            _start(environ)
            _arrays(room, environ, args.runs, args.tasks)
        finally:
            here.stop()
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _commands(room: Path, repeat: int) -> None:
    """Rendering and help, beside torchx and submitit where they are installed."""
    commands: list[Command] = [
        ("python -c pass", [sys.executable, "-c", "pass"], None),
        ("holdfast render", [HOLDFAST, "render"], None),
        ("holdfast --help", [HOLDFAST, "--help"], None),
        ("a Tab in the shell", [HOLDFAST, "completion", "--line", "holdfast submit PREC"], None),
        (f"submitit {version('submitit')}, script", [sys.executable, "-c", SUBMITIT], None),
    ]
    if importlib.util.find_spec("torchx"):
        words = ["run", "--dryrun", "-s", "slurm", "dist.ddp", "-j", "2x8", "--script", "train.py"]
        commands.append((f"torchx {version('torchx')} run --dryrun", [sys.executable, "-c", "from torchx.cli.main import main; main()", *words], None))
    else:
        print("left out: torchx, which is not installed")
    (room / "train.py").write_text("")
    _table(commands, repeat, room)


def _many(room: Path, runs: int, repeat: int) -> None:
    """Looking at many runs whose files are as a month of training leaves them."""
    folder = room / "many"
    many_runs.make(folder, runs)
    # Without Slurm: what is asked of it is one squeue, whose time is Slurm's.
    environ = {**os.environ, "RUNS_DIR": str(folder), "PATH": "/nowhere"}
    print(f"{runs} runs with 500 lines of metrics each:")
    _table([("holdfast status", [HOLDFAST, "status"], environ), ("holdfast status --json", [HOLDFAST, "status", "--json"], environ)], repeat, room)
    known = Known(folder)
    with _timed("watch, first look"):
        rows = screen.in_order(known.rows({}))
    with _timed("watch, every other look"):
        known.rows({})
    console = Console(file=open(os.devnull, "w"), force_terminal=True, width=200, height=50)
    with _timed("watch, one picture"):
        console.print(Text("\n").join(screen.draw(rows, screen.View(200, 50))))


def _start(environ: Mapping[str, str]) -> None:
    submits, starts, steps = [], [], []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([HOLDFAST, "submit", "--json", *TINY], env=environ, check=True, capture_output=True, text=True)
        submits.append(time.perf_counter() - begun)
        run = RunDir(Path(json.loads(done.stdout)["path"]))
        _until(lambda run=run: any(e["event"] == "start" for e in event_log.read(run.ledger)), 60)
        starts.append(time.perf_counter() - begun)
        _until(lambda run=run: run.metrics.exists() and run.metrics.stat().st_size > 0, 120)
        steps.append(time.perf_counter() - begun)
        _until(lambda run=run: any(e["event"] == "end" for e in event_log.read(run.ledger)), 60)
    _row("holdfast submit", statistics.median(submits), None, "run directory with code snapshot, two sbatch calls")
    _row("submit to attempt begun", statistics.median(starts))
    _row("submit to first step", statistics.median(steps), None, "2 nodes x 2 ranks, imports of torch included")


def _arrays(room: Path, environ: Mapping[str, str], runs: int, tasks: int) -> None:
    """Arrays that wait: how long the submission takes, and whether all tasks are in the queue."""
    for count, repeat in ((runs, 3), (tasks, 1)):
        clocks, processors = [], []
        for _ in range(repeat):
            words = [HOLDFAST, "submit", "--json", "--array", f"SEED=1..{count}", *TINY, "SBATCH_OPTIONS=hold="]
            clock, processor, out = _once(words, environ, room)
            clocks.append(clock)
            processors.append(processor)
            said = json.loads(out)
            queued = subprocess.run(
                ["squeue", "-h", "-r", "-o", "%i", "-j", said["job_id"]], env=environ, check=True, capture_output=True, text=True
            ).stdout.splitlines()
            remark = f"one sbatch, {len(queued):,} tasks in the queue"
            if count == runs and len(clocks) == repeat:
                _row(f"array of {count:,} runs", statistics.median(clocks), statistics.median(processors), remark)
                # While they are there: the same question as above, this time with Slurm's answer in it.
                _table([(f"  status of the {count:,}", [HOLDFAST, "status"], {**environ})], 3, room)
            elif count == tasks:
                _row(f"array of {count:,} runs", clocks[0], processors[0], remark)
            subprocess.run(["scancel", said["job_id"]], env=environ, check=True)
            shutil.rmtree(said["path"])


def _table(commands: Sequence[Command], repeat: int, cwd: Path) -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in commands}
    for turn in range(repeat + 1):
        for name, command, environ in commands:
            clock, processor, _ = _once(command, environ, cwd)
            if turn:  # the first one fills caches
                times[name].append((clock, processor))
    for name, found in times.items():
        _row(name, statistics.median(clock for clock, _ in found), statistics.median(processor for _, processor in found))


def _once(command: Sequence[str], environ: Mapping[str, str] | None, cwd: Path) -> tuple[float, float, str]:
    """Seconds of the clock and of the processor, and what the command said."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environ, cwd=cwd).stdout
    clock, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, out


@contextmanager
def _timed(name: str):  # type: ignore[no-untyped-def]
    begun, processor = time.perf_counter(), time.process_time()
    yield
    _row(name, time.perf_counter() - begun, time.process_time() - processor)


def _row(name: str, clock: float, processor: float | None = None, remark: str = "") -> None:
    shown = f"{clock * 1e3:9.1f} ms" + (f" ({processor * 1e3:.1f})" if processor is not None else "")
    print(f"{name:26} {shown:24} {remark}".rstrip(), flush=True)


def _until(condition: Callable[[], bool], limit_s: float) -> None:
    begun = time.perf_counter()
    while not condition():
        if time.perf_counter() - begun > limit_s:
            raise SystemExit(f"waited {limit_s:.0f} s in vain")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
