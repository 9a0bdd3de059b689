"""Which processes belong to a lab, and how to signal exactly those.

Every daemon of a lab starts with two marks in its environment. What Slurm's daemons fork (slurmstepd, slurmscriptd)
writes its title over the start of the environment, marks included, and is known by the log it holds open. Job processes
have the submitter's environment, to which Slurm adds SLURM_CONF, SLURM_JOB_ID and SLURMD_NODENAME. A shell in which
somebody exported SLURM_CONF has no SLURMD_NODENAME, so it is never taken for one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT_MARK = "HOLDFAST_LAB_ROOT"
DAEMON_MARK = "HOLDFAST_LAB_DAEMON"


@dataclass(frozen=True)
class Process:
    """One process; `started` (clock ticks since boot) tells it from a later one that was given the same pid."""

    pid: int
    started: int
    parent: int
    name: str


def look_up(pid: int) -> Process | None:
    """The running process `pid`, else None.

    A zombie counts as gone: where PID 1 reaps late, `kill -0` succeeds on it, and a stop would wait for nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    head, _, tail = stat.rpartition(")")  # the name itself may hold spaces and brackets
    fields = tail.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[19]), int(fields[1]), head.partition("(")[2])


def environment(pid: int) -> dict[str, str]:
    """The environment `pid` was started with; empty when it is gone or not ours to read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in raw.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def alive(process: Process) -> bool:
    now = look_up(process.pid)
    return now is not None and now.started == process.started


def send(process: Process, number: signal.Signals) -> None:
    """Signals the process and never another one: the pid is pinned by a pidfd before it is compared once more."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:  # kernels and sandboxes without pidfd_open: the gap between look and kill is then microseconds
        pidfd = -1
    try:
        if alive(process):
            if pidfd < 0:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _open_files(pid: int) -> set[str]:
    """Paths of the files `pid` has open; empty when it is gone or not ours to look into."""
    folder = f"/proc/{pid}/fd"
    paths = set()
    with suppress(OSError):
        for number in os.listdir(folder):
            with suppress(OSError):
                paths.add(os.readlink(f"{folder}/{number}"))
    return paths


def marked(pid: int, root: Path, daemon: str) -> Process | None:
    """The process `pid` if it runs and is that daemon of the lab in `root`."""
    process = look_up(pid)
    env = environment(pid) if process else {}
    return process if env.get(ROOT_MARK) == str(root) and env.get(DAEMON_MARK) == daemon else None


@dataclass(frozen=True)
class LabProcesses:
    daemons: dict[str, list[Process]]  # by mark: munged, mariadbd, slurmdbd, slurmctld, node1, ...
    jobs: dict[str, list[Process]]  # by node: slurmstepd and everything that it started

    def all(self) -> list[Process]:
        return [p for group in (self.daemons, self.jobs) for found in group.values() for p in found]


def of_lab(root: Path) -> LabProcesses:
    """All processes of the lab in `root`, from one walk over /proc; never the caller or one of its ancestors."""
    everything = [p for p in (look_up(int(e)) for e in os.listdir("/proc") if e.isdigit()) if p]
    by_pid = {p.pid: p for p in everything}
    ours = set()
    pid = os.getpid()
    while pid in by_pid:
        ours.add(pid)
        pid = by_pid[pid].parent

    conf, logs = str(root / "slurm.conf"), f"{root}/log/"
    found = LabProcesses({}, {})
    node_of: dict[int, str] = {}
    for process in everything:
        if process.pid in ours:
            continue
        if process.name in ("slurmstepd", "slurmscriptd"):
            # A deleted log is shown with " (deleted)" behind its path.
            held = [p.removeprefix(logs).partition(".log")[0] for p in _open_files(process.pid) if p.startswith(logs)]
            if held and process.name == "slurmstepd":
                node_of[process.pid] = held[0]
            elif held:
                found.daemons.setdefault(held[0], []).append(process)
            continue
        env = environment(process.pid)
        if env.get(ROOT_MARK) == str(root) and DAEMON_MARK in env:
            found.daemons.setdefault(env[DAEMON_MARK], []).append(process)
        elif env.get("SLURM_CONF") == conf and "SLURM_JOB_ID" in env and "SLURMD_NODENAME" in env:
            node_of[process.pid] = env["SLURMD_NODENAME"]

    # A task that cleared its environment is still a descendant of one that is known.
    grew = True
    while grew:
        more = {p.pid: node_of[p.parent] for p in everything if p.parent in node_of and p.pid not in node_of and p.pid not in ours}
        node_of |= more
        grew = bool(more)
    for pid, node in node_of.items():
        found.jobs.setdefault(node, []).append(by_pid[pid])
    return found


def wait_until(done: Callable[[], bool], timeout_s: float, poll_s: float = 0.02) -> bool:
    """Whether `done()` became true in time. Bounds seconds and not rounds: one refused Slurm call may take two."""
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= end:
            return False
        time.sleep(poll_s)
    return True


def terminate(processes: list[Process], timeout_s: float) -> None:
    """SIGTERM to all of them at once, SIGKILL to those still there after `timeout_s` seconds."""
    for process in processes:
        send(process, signal.SIGTERM)
    wait_until(lambda: not any(map(alive, processes)), timeout_s)
    for process in processes:
        send(process, signal.SIGKILL)


def kill_all(find: Callable[[], list[Process]], timeout_s: float) -> list[Process]:
    """SIGKILL to what `find()` returns until it finds nothing; returns what still runs after `timeout_s` seconds.

    In rounds, because a process may fork between the look and the kill."""
    left: list[Process] = []

    def none_left() -> bool:
        left[:] = find()
        for process in left:
            send(process, signal.SIGKILL)
        return not left

    wait_until(none_left, timeout_s)
    return left
