"""A disk that forgets: which states a power cut may leave, from a record of what the real writer did.

The record is one list of operations. At each point of it the power may go. What was flushed is there; of the rest any
subset may be there, in the order in which it was done, whole operation by whole operation:
    data     bytes of a file: flushed by fsync of the file, which says nothing about the file's name
    entry    a name in a folder made, taken away or moved: flushed by fsync of that folder
A lost write in the middle leaves zeros, as a file system does that has extended the file and not written the block.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.checkpoint.commit import Disk


@dataclass
class Op:
    """`inode` is the file or folder that must be flushed for the operation to be safe."""

    kind: str
    inode: int
    name: str = ""
    target: int | None = None
    offset: int = 0
    data: bytes = b""


@dataclass
class Recorder(Disk):
    """The real disk, and a record of what was done to it. `forget` is the number of the one fsync that is left out."""

    root: Path
    forget: int | None = None
    ops: list[Op] = field(default_factory=list)
    fsyncs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inodes: dict[Path, int] = {self.root: 0}
        self._open: dict[int, tuple[Path, int]] = {}
        self._sizes: dict[int, int] = {}

    def ack(self, step: int) -> None:
        self.ops.append(Op("ack", step))

    def _entry(self, path: Path, kind: str, target: int | None) -> None:
        self.ops.append(Op(kind, self._inodes[path.parent], path.name, target))

    def _new(self, path: Path) -> int:
        self._inodes[path] = len(self._inodes) + 1000 * len(self.ops)
        return self._inodes[path]

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._entry(path, "link", self._new(path))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        inode = self._new(path)
        self._entry(path, "link", inode)
        self._open[fd] = (path, inode)
        return fd

    def open_file(self, path: Path) -> int:
        fd = super().open_file(path)
        self._open[fd] = (path, self._inodes[path])
        return fd

    def open_folder(self, path: Path) -> int:
        fd = super().open_folder(path)
        self._open[fd] = (path, self._inodes[path])
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        done = super().write(fd, data)
        inode = self._open[fd][1]
        at = self._sizes.get(inode, 0)
        self.ops.append(Op("data", inode, offset=at, data=bytes(data[:done])))
        self._sizes[inode] = at + done
        return done

    def fsync(self, fd: int) -> None:
        path, inode = self._open[fd]
        self.fsyncs.append(path.name)
        if len(self.fsyncs) - 1 != self.forget:
            self.ops.append(Op("fsync", inode))

    def close(self, fd: int) -> None:
        super().close(fd)
        del self._open[fd]

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        moved = self._inodes.pop(old)
        self._inodes[new] = moved
        for path in [path for path in self._inodes if path.is_relative_to(old)]:
            self._inodes[new / path.relative_to(old)] = self._inodes.pop(path)
        # One journal entry: a name disappears and another appears, both or none.
        self.ops.append(Op("rename", self._inodes[new.parent], f"{old.name}\0{new.name}", moved))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._entry(path, "unlink", self._inodes.pop(path))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self._entry(path, "unlink", self._inodes.pop(path))


Tree = dict[str, dict[str, bytes]]


def states(ops: list[Op], folder: str) -> Iterator[tuple[int, int, Tree]]:
    """(operations done, last acknowledged step, name -> files) of every state of `folder` that a power cut may leave."""
    for done in range(len(ops) + 1):
        prefix = ops[:done]
        acknowledged = max((op.inode for op in prefix if op.kind == "ack"), default=0)
        changes = [index for index, op in enumerate(prefix) if op.kind not in ("ack", "fsync")]
        flushed = {index for index in changes if any(later.kind == "fsync" and later.inode == prefix[index].inode for later in prefix[index:])}
        pending = [index for index in changes if index not in flushed]
        for kept in itertools.chain.from_iterable(itertools.combinations(pending, n) for n in range(len(pending) + 1)):
            alive = flushed | set(kept)
            yield done, acknowledged, _replay([op for index, op in enumerate(prefix) if index in alive], folder)


def _replay(ops: list[Op], folder: str) -> Tree:
    folders: dict[int, dict[str, int]] = {}
    files: dict[int, bytearray] = {}
    for op in ops:
        names = folders.setdefault(op.inode, {}) if op.kind != "data" else {}
        if op.kind == "data":
            content = files.setdefault(op.inode, bytearray())
            content.extend(bytes(max(op.offset + len(op.data) - len(content), 0)))
            content[op.offset : op.offset + len(op.data)] = op.data
        elif op.kind == "link":
            names[op.name] = op.target or 0
        elif op.kind == "rename":
            old, new = op.name.split("\0")
            if names.get(old) == op.target:
                del names[old]
            names[new] = op.target or 0
        elif op.kind == "unlink" and names.get(op.name) == op.target:
            del names[op.name]
    top = folders.get(0, {}).get(folder)
    inside = folders.get(top, {}) if top is not None else {}
    return {name: {file: bytes(files.get(inode, b"")) for file, inode in folders.get(at, {}).items()} for name, at in inside.items()}


class Judge:
    """Whether a state keeps the promise, by the real `verify` on a real folder; equal folders are looked at once."""

    def __init__(self, scratch: Path):
        self._scratch, self._known = scratch, {}

    def verifies(self, name: str, files: dict[str, bytes]) -> bool:
        from jobs.checkpoint import directory

        key: Any = (name, tuple(sorted(files.items())))
        if key not in self._known:
            path = self._scratch / str(len(self._known)) / name
            path.mkdir(parents=True)
            for file, content in files.items():
                (path / file).write_bytes(content)
            try:
                directory.verify(path)
                self._known[key] = True
            except directory.CheckpointError:
                self._known[key] = False
        return bool(self._known[key])

    def objections(self, recorder: Recorder, folder: str, limit: int | None = None) -> tuple[int, list[str]]:
        """Number of states looked at, and what is wrong with the bad ones; stops after `limit` bad ones."""
        bad: list[str] = []
        seen = 0
        for done, acknowledged, tree in states(recorder.ops, folder):
            seen += 1
            final = {name: files for name, files in tree.items() if name.startswith("step-")}
            damaged = [name for name, files in final.items() if not self.verifies(name, files)]
            best = max((int(name[5:]) for name in final if name not in damaged), default=0)
            if damaged or best < acknowledged:
                bad.append(f"after operation {done} ({recorder.ops[done - 1].kind}): damaged {damaged}, newest good {best}, acknowledged {acknowledged}")
                if limit and len(bad) >= limit:
                    break
        return seen, bad


def record(root: Path, world: int, forget: int | None = None) -> Recorder:
    """What the real writer does in the scenario of crash.py."""
    import crash

    root.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(root, forget)
    crash.scenario(root / "checkpoints", 1, recorder, recorder.ack, world)
    return recorder


def fsyncs_of(world: int) -> list[str]:
    """Names of what is flushed, in order; used to make one test per fsync."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return record(Path(os.path.realpath(folder)) / "run", world).fsyncs
