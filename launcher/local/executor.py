"""Attempts on this machine, without Slurm: the same run directory, the same ranks, the same ledger and verdicts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from jobs.config.resolver import load
from jobs.config.settings import Job
from jobs.core.contract import STACKS_SIGNAL, STOP_SIGNALS, Cause, Exit, RankEnv
from jobs.rank.stop_flag import leave_marker, name_of
from jobs.run import permissions
from jobs.run.rundir import RunDir
from launcher.attempt.lifecycle import begin, end
from launcher.attempt.watchdog import Watchdog, of_attempt
from launcher.subprocesses import without_safe_path
from launcher.sweeps import pruner
from slurm.environment import clean_environment

_POLL_S = 0.05


def run_attempts(run: RunDir, environ: Mapping[str, str], *, foreground: bool = False) -> Exit:
    """Starts attempts until the run is over or this process is asked to stop. Returns how it ended.

    In the foreground rank 0 writes to the terminal as well as to its log. Raises SettingError if another user controls the run."""
    permissions.check_run(run, "its attempt")
    job = load(run.job_yaml)
    environ = {**without_safe_path(clean_environment(environ)), **job.node_env, RankEnv.RUN_DIR: str(run.path)}
    asked: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            if rank.poll() is None:
                # Ctrl-C reaches the ranks by itself; a second one means now.
                rank.send_signal(signal.SIGKILL if asked.count(signal.SIGINT) > 1 else number)

    before = {number: signal.signal(number, forward) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        while True:
            values = begin(run, environ, None)
            if asked:
                # While the attempt began. Nobody is started who would not hear of it; their words are said for them.
                code: int = Exit.REQUEUE
                for number in range(job.world_size):
                    leave_marker(run.attempt(int(values[RankEnv.ATTEMPT])), number, reason="stopped", step=None, signal=name_of(asked[0]))
            else:
                code = _attempt(job, run, {**environ, **values}, ranks, asked, foreground)
            names = [signal.Signals(number).name.removeprefix("SIG") for number in asked]
            verdict, cause = end(run, {**environ, **values}, None, code, names)
            if cause in (Cause.FINISHED, Cause.PRUNED):
                return Exit.DONE
            if asked:
                return Exit.REQUEUE if code in (Exit.DONE, Exit.REQUEUE) else Exit.INTERRUPTED
            if not verdict.again:
                return Exit(code) if code in list(Exit) and code else Exit.FAILED
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(job: Job, run: RunDir, environ: dict[str, str], ranks: list[subprocess.Popen[bytes]], asked: list[int], foreground: bool) -> int:
    """Starts the ranks, which `ranks` then holds, and waits for them. Returns the exit code of the step."""
    ranks[:] = spawn(job, run, environ, foreground)
    # What was asked for while they were started.
    for number in asked:
        _tell(ranks, number)
    dog = of_attempt(run, int(environ[RankEnv.ATTEMPT]), lambda _: _tell(ranks, STACKS_SIGNAL), lambda _: _tell(ranks, signal.SIGKILL))
    beside = pruner.beside(run, ranks[0].pid)
    code = _wait(ranks, dog, job.peer_exit_wait_s, failures_only=job.entry is not None)
    if beside is not None:
        beside.terminate()
        beside.wait()
    if dog is not None:
        dog.keep()
    return code


def spawn(job: Job, run: RunDir, environ: Mapping[str, str], foreground: bool) -> list[subprocess.Popen[bytes]]:
    world = job.world_size
    ranks = []
    for rank in range(world):
        log = run.log(environ["HOLDFAST_JOB_ID"], rank)
        mine = {
            **environ,
            RankEnv.RANK: str(rank),
            RankEnv.WORLD_SIZE: str(world),
            RankEnv.LOCAL_RANK: str(rank),
            RankEnv.LOCAL_WORLD_SIZE: str(world),
            "MASTER_ADDR": "127.0.0.1",
        }
        if job.entry is not None:
            # As in the batch script: a script in a subfolder, and `import holdfast`, mean the frozen copy.
            mine["PYTHONPATH"] = ":".join(filter(None, [str(run.code), environ.get("PYTHONPATH")]))
        command = _command(job, run)
        if foreground and rank == 0:
            # tee and not a pipe of ours: the rank goes on writing when this process is gone. It ignores Ctrl-C, which is for the rank, and
            # continues with the log when the reader of its output is gone (SIGPIPE stays ignored; -p of GNU tee prints no error).
            options = ["-a", "-i", *(["-p"] if sys.platform == "linux" else [])]
            tee = subprocess.Popen(["tee", *options, str(log)], stdin=subprocess.PIPE, restore_signals=False)
            ranks.append(subprocess.Popen(command, cwd=run.code, env=mine, stdout=tee.stdin, stderr=subprocess.STDOUT))
            assert tee.stdin is not None
            tee.stdin.close()
        else:
            with open(log, "ab") as file:
                ranks.append(subprocess.Popen(command, cwd=run.code, env=mine, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT))
    return ranks


def _command(job: Job, run: RunDir) -> list[str]:
    if job.entry is None:
        return [sys.executable, "-u", "-m", "train", "--run-dir", str(run.path)]
    if job.entry.startswith("-m "):
        return [sys.executable, "-u", "-m", job.entry[3:].strip(), *job.entry_args]
    return [sys.executable, "-u", str(Path(job.entry)), *job.entry_args]


def _wait(ranks: list[subprocess.Popen[bytes]], dog: Watchdog | None, peer_wait_s: float, *, failures_only: bool) -> int:
    """The exit code of the step, as srun would give it: the largest, 128 + n for a signal.

    The other ranks are killed `peer_wait_s` seconds after the first rank ended, with `failures_only` after the first rank failed;
    then the code is that of this first rank."""
    harmless = (Exit.DONE, Exit.REQUEUE) if failures_only else ()
    first_exit: float | None = None
    first_code = 0
    killed = False
    looked = time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        ended = [code for rank in ranks if (code := rank.poll()) is not None and code not in harmless]
        if first_exit is None and ended:
            first_exit, first_code = now, ended[0]
        if first_exit is not None and now - first_exit > peer_wait_s:
            killed = True
            _tell(ranks, signal.SIGKILL)
        if dog is not None and now - looked >= dog.poll_s:
            # A machine that slept, or a terminal that was stopped, is nobody's silence.
            dog.tick(min(now - looked, 3 * dog.poll_s + 1))
            looked = now
        time.sleep(_POLL_S)
    if killed and failures_only and first_code > 0:
        return first_code
    codes = [rank.returncode for rank in ranks]
    return max((128 - code if code < 0 else code) for code in codes)


def _tell(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def pid_of_rank(run: RunDir, rank: int) -> int | None:
    """The training process with this rank of this run on this machine, found by its environment."""
    return next(iter(pids_of_ranks(run, rank)), None)


def pids_of_ranks(run: RunDir, rank: int | None = None) -> list[int]:
    """The training processes of this run on this machine; all of them, or those of one rank."""
    wanted = {f"{RankEnv.RUN_DIR}={run.path}".encode()} | ({f"{RankEnv.RANK}={rank}".encode()} if rank is not None else set())
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((process / "environ").read_bytes().split(b"\0"))
            if wanted <= variables and b"train" in (process / "cmdline").read_bytes().split(b"\0"):
                found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    # A rank's readers (NUM_WORKERS) are forks of it and look like it.
    return [pid for pid, parent in found.items() if parent not in found]


def gpus_here() -> int:
    """GPUs that a process on this machine sees, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())


def main() -> int:
    """`python -m launcher.local.executor RUN_DIR`: attempts of a run that exists, until it is over or its budgets are used up."""
    permissions.keep_to_oneself()
    return run_attempts(RunDir(Path(sys.argv[1]).absolute()), os.environ)


if __name__ == "__main__":
    sys.exit(main())
