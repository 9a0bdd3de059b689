"""The commit of files that a user script wrote: the protocol of the built-in checkpoints, ended, refused and forgotten at every call."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import crash
import persistence
import pytest
from crash import CALLS, Counting

from jobs.checkpoint import directory, user_checkpoint
from jobs.checkpoint.commit import Commit, Disk

STEPS, KEEP, ALL = (10, 20, 30), 2, 3


def fill(folder: Path, disk: Disk, files: dict[str, bytes]) -> None:
    """Write as a script does: nothing is flushed."""
    for name, content in files.items():
        fd = disk.create(folder / name)
        disk.write(fd, memoryview(content))
        disk.close(fd)


def scenario(folder: Path, disk: Disk, ack: Callable[[int], object], keep: int = KEEP) -> None:
    """Three commits, each acknowledged; with KEEP the third one prunes."""
    for step in STEPS:
        source = user_checkpoint.staging(folder, step, 1, disk)
        fill(source, disk, {"weights.bin": b"w" * step, "rng.json": b"{}"})
        user_checkpoint.commit(source, folder, step, 1, keep, disk)
        ack(step)


def record(root: Path, forget: int | None = None, keep: int = KEEP) -> persistence.Recorder:
    root.mkdir(parents=True)
    recorder = persistence.Recorder(root, forget)
    scenario(root / "checkpoints", recorder, recorder.ack, keep)
    return recorder


def test_every_state_that_a_power_cut_may_leave_is_whole(tmp_path: Path) -> None:
    seen, bad = persistence.Judge(tmp_path / "states").objections(record(tmp_path / "run"), "checkpoints")
    assert not bad, "\n".join(bad[:5])
    assert seen > 200


def test_each_fsync_is_needed(tmp_path: Path) -> None:
    """Among them that of the folder around checkpoints/: without it a power cut takes everything that was acknowledged."""
    fsyncs, pruned = record(tmp_path / "run", keep=ALL).fsyncs, record(tmp_path / "pruned").fsyncs
    assert fsyncs[1:] == pruned[1:-1] and fsyncs[0] == "run" and len(fsyncs) == 1 + 5 * len(STEPS)
    # Each of a commit, and that between the rename to a trash name and the deletion.
    for number, keep in [*((number, ALL) for number in range(len(fsyncs))), (len(fsyncs), KEEP)]:
        recorder = record(tmp_path / f"{number}", number, keep)
        _, bad = persistence.Judge(tmp_path / f"states{number}").objections(recorder, "checkpoints", limit=1)
        assert bad, f"nothing breaks without fsync {number} of {pruned[number]}"


def test_a_checkpoint_that_is_there_is_flushed_before_it_is_acknowledged_again(tmp_path: Path) -> None:
    """Its rename may be of a commit whose last fsync failed."""
    disk = Named()
    for given in (Disk(), disk):
        source = user_checkpoint.staging(tmp_path, 10, 1)
        fill(source, Disk(), {"w": b"w"})
        user_checkpoint.commit(source, tmp_path, 10, 1, KEEP, given)
    assert ("fsync", tmp_path.name) in disk.calls and ("create", "manifest.json") not in disk.calls
    assert not source.exists()


def test_a_script_killed_at_any_call_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    at = 0
    while True:
        at += 1
        folder, acks = tmp_path / str(at) / "checkpoints", tmp_path / f"{at}.acks"
        folder.parent.mkdir()
        pid = os.fork()
        if pid == 0:
            with open(acks, "ab", buffering=0) as file:
                scenario(folder, Counting(at, lambda name: os.kill(os.getpid(), signal.SIGKILL)), lambda step: file.write(f"{step}\n".encode()) and None)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        good = [directory.verify(path).step for path in directory.complete(folder)]
        assert max(good, default=0) >= crash.last_ack(acks), at
        directory.clear_leftovers(folder)
        assert user_checkpoint.newest(folder, 2, may_change=True)[1] == []
        if not os.WIFSIGNALED(status):
            break
    assert at > 70


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_commit_that_the_disk_refused_can_be_repeated(tmp_path: Path, code: int) -> None:
    """The same folder again: nothing of the first try is in the way."""

    def refuse(name: str) -> None:
        raise OSError(code, os.strerror(code), name)

    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        source = user_checkpoint.staging(folder, 10, 1)
        fill(source, Disk(), {"weights.bin": b"w"})
        disk = Counting(at, refuse)
        try:
            user_checkpoint.commit(source, folder, 10, 1, KEEP, disk)
        except OSError:
            assert all(directory.verify(path) for path in directory.complete(folder))
            if source.is_dir():
                user_checkpoint.commit(source, folder, 10, 1, KEEP)
        assert directory.verify(directory.path_of(folder, 10)).step == 10
        if disk.calls < at:
            break
    assert at > 10


class Named(Disk):
    """The real disk, and the calls with the names of what they change."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._open: dict[int, str] = {}

    def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
        real = super().__getattribute__(name)
        if name not in CALLS:
            return real

        def call(first, *rest):  # type: ignore[no-untyped-def]
            result = real(first, *rest)
            target = first.name if isinstance(first, Path) else self._open[first]
            if name in ("create", "open_folder", "open_file"):
                self._open[result] = target
            self.calls.append((name, target))
            return result

        return call


def test_built_in_and_user_checkpoints_are_committed_by_the_same_calls(tmp_path: Path) -> None:
    """From the manifest on; before that a script has written its files itself."""
    files = {"model.safetensors": b"m" * 100, "optimizer.safetensors": b"o" * 50}
    ours, theirs = Named(), Named()
    commit = Commit(tmp_path / "a", 10, 1, ours)
    commit.begin()
    final = commit.finish({name: commit.write(name, [content]) for name, content in files.items()}, {user_checkpoint.OWN: True})
    source = user_checkpoint.staging(tmp_path / "b", 10, 1)
    fill(source, Disk(), files)
    other, size = user_checkpoint.commit(source, tmp_path / "b", 10, 1, KEEP, theirs)
    of_manifest = [calls[calls.index(("create", "manifest.json")) :] for calls in (ours.calls, theirs.calls)]
    assert [[(name, target.replace("b", "a") if len(target) == 1 else target) for name, target in calls] for calls in of_manifest] == [of_manifest[0]] * 2
    assert [name for name, _ in of_manifest[0]] == [
        "create",
        "write",
        "fsync",
        "close",
        "open_folder",
        "fsync",
        "close",
        "rename",
        "open_folder",
        "fsync",
        "close",
    ]
    # And byte by byte the same checkpoint.
    assert {path.name: path.read_bytes() for path in final.iterdir()} == {path.name: path.read_bytes() for path in other.iterdir()}
    assert size == 150


def test_folders_inside_a_checkpoint_are_flushed_before_the_folder_around_them(tmp_path: Path) -> None:
    source = user_checkpoint.staging(tmp_path, 10, 1)
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "weights.bin").write_bytes(b"w")
    disk = Named()
    user_checkpoint.commit(source, tmp_path, 10, 1, KEEP, disk)
    flushed = [target for name, target in disk.calls if name == "fsync"]
    assert flushed == ["weights.bin", "manifest.json", "b", "a", source.name, tmp_path.name]


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported(tmp_path: Path) -> None:
    warnings: list[str] = []
    for step in (10, 20):
        source = user_checkpoint.staging(tmp_path, step, 1)
        fill(source, Disk(), {"w": b"w"})

        class Refusing(Disk):
            def rename(self, old: Path, new: Path) -> None:
                if new.name.startswith(".trash-step-00000010"):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
                super().rename(old, new)

        user_checkpoint.commit(source, tmp_path, step, 1, 1, Refusing(), warnings.append)
    assert warnings == ["step-00000010 could not be taken away: Permission denied"]
