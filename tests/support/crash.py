"""Ends the writer of checkpoints at every one of its calls. No torch: a sweep is some hundred short processes.

    python crash.py write FOLDER      one scenario on the real disk, for strace to end
    python crash.py sweep FOLDER      every kill point for world 1 and 2; JSON of (world, rank, kills, faults)

`sweep` forks a process per call and world size, and looks at what each one leaves behind.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from jobs.checkpoint import directory  # noqa: E402
from jobs.checkpoint.commit import Commit, Disk, prune  # noqa: E402
from jobs.checkpoint.directory import FileEntry, file_name  # noqa: E402

CALLS = ("mkdir", "create", "write", "open_file", "open_folder", "fsync", "close", "rename", "unlink", "rmdir")
STEPS = (10, 20, 30)
KEEP = 2


class Counting(Disk):
    """Does something before its n-th call; counts from 1."""

    def __init__(self, at: int, what: Callable[[str], None]):
        self.at, self.what, self.calls = at, what, 0

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            self.calls += 1
            if self.calls == self.at:
                self.what(name)
        return super().__getattribute__(name)


def content(step: int, kind: str, rank: int) -> list[bytes]:
    return [f"{kind} {rank} of step {step} ".encode() * 20, b"\0" * step]


def write_one(folder: Path, step: int, attempt: int, disk: Disk, world: int = 1) -> None:
    """A commit by one process that plays all ranks."""
    commit = Commit(folder, step, attempt, disk)
    commit.begin()
    files = {name: commit.write(name, content(step, name[:5], rank)) for rank in range(world) for name in _names(rank, world)}
    commit.finish(files, {"tokens": step * 100})


def scenario(folder: Path, attempt: int, disk: Disk, ack: Callable[[int], None], world: int = 1) -> None:
    """Three commits, each acknowledged and followed by a prune that deletes at the third."""
    for step in STEPS:
        write_one(folder, step, attempt, disk, world)
        ack(step)
        prune(directory.to_prune(folder, KEEP), disk)


def _names(rank: int, world: int) -> list[str]:
    return [file_name("model", rank, world), file_name("optimizer", rank, world)]


def _rank_one(folder: Path, disk: Disk, line: socket.socket) -> None:
    """The second writer: waits for each begin, writes, and hands in what it wrote."""
    for step in STEPS:
        if not line.recv(1):
            return
        commit = Commit(folder, step, 1, disk)
        entries = [commit.write(name, content(step, name[:5], 1)) for name in _names(1, 2)]
        line.sendall("".join(f"{entry.bytes:8d}{entry.sha256}" for entry in entries).encode())


def _rank_zero(folder: Path, disk: Disk, line: socket.socket, ack: Callable[[int], None]) -> None:
    for step in STEPS:
        commit = Commit(folder, step, 1, disk)
        commit.begin()
        line.sendall(b"x")
        files = {name: commit.write(name, content(step, name[:5], 0)) for name in _names(0, 2)}
        said = line.recv(144, socket.MSG_WAITALL)
        if len(said) < 144:
            commit.abandon()
            return
        for index, name in enumerate(_names(1, 2)):
            part = said[index * 72 : index * 72 + 72].decode()
            files[name] = FileEntry(int(part[:8]), part[8:])
        commit.finish(files, {"tokens": step * 100})
        ack(step)
        prune(directory.to_prune(folder, KEEP), disk)


def run_killed(folder: Path, at: int, world: int, victim: int) -> tuple[bool, int]:
    """Runs the scenario in `world` processes; `victim` is killed before its call number `at`. Whether it was, and the last acknowledged step."""

    def die(name: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    acks = folder.parent / f"{folder.name}.acks"
    ours, theirs = socket.socketpair()
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                (theirs if rank == 0 else ours).close()
                line = ours if rank == 0 else theirs
                disk = Counting(at if rank == victim else 0, die)
                with open(acks, "ab", buffering=0) as file:

                    def ack(step: int, file: Any = file) -> None:
                        file.write(f"{step}\n".encode())

                    if world == 1:
                        scenario(folder, 1, disk, ack)
                    elif rank == 0:
                        _rank_zero(folder, disk, line, ack)
                    else:
                        _rank_one(folder, disk, line)
                code = 0
            except (OSError, BrokenPipeError):
                code = 3
            finally:
                os._exit(code)
        children.append(pid)
    ours.close()
    theirs.close()
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return os.WIFSIGNALED(statuses[victim]), last_ack(acks)


def last_ack(acks: Path) -> int:
    try:
        return max((int(line) for line in acks.read_text().split()), default=0)
    except OSError:
        return 0


def check(folder: Path, acknowledged: int) -> list[str]:
    """What is wrong with what was left behind; the next attempt then starts by itself and saves."""
    wrong = []
    good = []
    for path in directory.complete(folder):
        try:
            directory.verify(path)
            good.append(directory.step_of(path) or 0)
        except directory.CheckpointError as err:
            wrong.append(f"under a final name: {err}")
    if max(good, default=0) < acknowledged:
        wrong.append(f"acknowledged {acknowledged}, left {good}")
    directory.clear_leftovers(folder)
    newest, damaged = directory.newest_verified(folder, 2)
    if damaged or (newest is None) != (not good):
        wrong.append(f"the next start found {newest}, damaged {damaged}")
    write_one(folder, 40, 2, Disk())
    if directory.newest_verified(folder, 2)[0] != directory.path_of(folder, 40):
        wrong.append("the next attempt could not save")
    if any(child.name.startswith(".") for child in folder.iterdir()):
        wrong.append(f"left over: {sorted(child.name for child in folder.iterdir())}")
    return wrong


def sweep(root: Path, world: int, victim: int) -> tuple[int, list[str]]:
    """Kills at call 1, 2, 3, ... until none is left to kill at. Number of kills, and all that was wrong."""
    wrong, at = [], 0
    while True:
        at += 1
        folder = root / f"{world}-{victim}-{at}" / "checkpoints"
        folder.parent.mkdir()
        fired, acknowledged = run_killed(folder, at, world, victim)
        wrong += [f"world {world}, rank {victim} killed at call {at}: {text}" for text in check(folder, acknowledged)]
        if not fired:
            return at - 1, wrong


if __name__ == "__main__":
    if sys.argv[1] == "write":
        target = Path(sys.argv[2])
        with open(target.parent / f"{target.name}.acks", "ab", buffering=0) as log:
            scenario(target, 1, Disk(), lambda step: log.write(f"{step}\n".encode()) and None)
    else:
        import json

        print(json.dumps([(world, victim, *sweep(Path(sys.argv[2]), world, victim)) for world, victim in ((1, 0), (2, 0), (2, 1))]))
