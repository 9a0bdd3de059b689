"""The commit protocol, by ending, refusing, forgetting and filling: nothing under a final name is ever damaged."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import crash
import persistence
import pytest
from crash import CALLS, Counting, check, last_ack, scenario, write_one
from private_mount import in_private_mount

from jobs.checkpoint import directory
from jobs.checkpoint.commit import Commit, Disk, prune

PYTHON = [sys.executable, "-S", "-E", "-B", crash.__file__]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves behind does not depend on the disk, only the waiting does."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="holdfast-test-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_writer_killed_at_any_call_leaves_what_was_acknowledged_and_nothing_damaged(memory: Path, world: int, victim: int) -> None:
    # In a small process of its own: it forks once per call, which a process full of torch's threads should not.
    code = f"import crash, json, pathlib; print(json.dumps(crash.sweep(pathlib.Path({str(memory)!r}), {world}, {victim})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(crash.__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, wrong = json.loads(done.stdout)
    assert not wrong, "\n".join(wrong)
    assert kills >= (30 if victim else 70)


# What strace can end: the system calls behind the calls of Disk. Closing is tried too; reading is harmless.
_SYSCALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir", "write", "close", "openat")


@pytest.mark.parametrize("syscall", [pytest.param(name, marks=pytest.mark.slow) if name in ("close", "openat", "mkdir") else name for name in _SYSCALLS])
def test_strace_ends_the_writer_at_every_system_call_and_what_was_acknowledged_stands(memory: Path, syscall: str) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    number = kills = 0
    while True:
        number += 1
        folder = memory / str(number) / "checkpoints"
        folder.parent.mkdir()
        # Python itself writes, opens and closes a lot, but makes, renames and flushes nothing.
        paths = [word for path in _paths(folder) for word in ("-P", str(path))] if syscall in ("write", "close", "openat") else []
        done = subprocess.run(
            [
                strace,
                "-f",
                "-qq",
                *paths,
                "-e",
                f"trace={syscall}",
                "-e",
                f"inject={syscall}:signal=KILL:when={number}",
                "-o",
                "/dev/null",
                *PYTHON,
                "write",
                str(folder),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if "ptrace" in done.stderr or "not permitted" in done.stderr:
            pytest.skip(f"strace may not trace here: {done.stderr.strip()[:80]}")
        assert done.returncode in (0, -9, 137), done.stderr
        wrong = check(folder, last_ack(folder.parent / "checkpoints.acks"))
        assert not wrong, f"{syscall} number {number}: {wrong}"
        if done.returncode == 0:
            break
        kills += 1
    assert kills >= 1


def _paths(folder: Path) -> list[Path]:
    """What the scenario touches and has a name known beforehand; a trash name is random and the kill sweep covers it."""
    paths = [folder, folder.parent]
    for step in crash.STEPS:
        staging = directory.staging_of(folder, step, 1)
        paths += [staging, directory.path_of(folder, step), *(staging / name for name in ("model.safetensors", "optimizer.safetensors", "manifest.json"))]
    return paths


@pytest.mark.parametrize("world", [1, 2])
def test_every_state_that_a_power_cut_may_leave_keeps_the_promise(tmp_path: Path, world: int) -> None:
    seen, bad = persistence.Judge(tmp_path / "states").objections(persistence.record(tmp_path / "run", world), "checkpoints")
    assert not bad, "\n".join(bad[:5])
    assert seen > 200


_FSYNCS = [(world, number, name) for world in (1, 2) for number, name in enumerate(persistence.fsyncs_of(world))]


@pytest.mark.parametrize(("world", "number", "name"), _FSYNCS, ids=[f"world{w}-{n}-{name}" for w, n, name in _FSYNCS])
def test_the_model_objects_to_the_writer_without_any_one_of_its_fsyncs(tmp_path: Path, world: int, number: int, name: str) -> None:
    recorder = persistence.record(tmp_path / "run", world, forget=number)
    _, bad = persistence.Judge(tmp_path / "states").objections(recorder, "checkpoints", limit=1)
    assert bad, f"nothing breaks without the fsync of {name}: is it needed, or is the model blind?"


def test_the_model_objects_to_deleting_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(paths: list[Path], disk: Disk) -> None:
        for path in paths:
            for child in sorted(path.iterdir()):
                disk.unlink(child)
            disk.rmdir(path)

    monkeypatch.setattr(crash, "prune", in_place)
    _, bad = persistence.Judge(tmp_path / "states").objections(persistence.record(tmp_path / "run", 1), "checkpoints", limit=1)
    assert bad and "damaged" in bad[0]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_at_any_call_leaves_what_was_acknowledged_and_the_next_save_works(tmp_path: Path, code: int) -> None:
    def refuse(name: str) -> None:
        raise OSError(code, os.strerror(code), name)

    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at) / "checkpoints"
        folder.parent.mkdir()
        acks: list[int] = []
        disk = Counting(at, refuse)
        try:
            scenario(folder, 1, disk, acks.append)
            refused = disk.calls >= at  # in a prune or a deletion: reported, not raised
        except OSError as err:
            assert err.errno == code
            refused = True
        wrong = check(folder, max(acks, default=0))
        assert not wrong, f"call {at}: {wrong}"
        if not refused:
            break
    assert at > 70


def test_all_calls_that_change_the_disk_go_through_the_seam() -> None:
    # A call beside the seam would be a call that no sweep ends.
    text = Path(sys.modules["jobs.checkpoint.commit"].__file__ or "").read_text()
    body = text.partition("DISK = Disk()")[2]
    for call in (
        "os.mkdir",
        "os.open(",
        "os.write",
        "os.fsync",
        "os.close",
        "os.rename",
        "os.unlink",
        "os.rmdir",
        "shutil",
        ".mkdir(parents",
        ".unlink(missing",
    ):
        assert call not in body, f"{call} beside Disk"
    assert set(CALLS) == {name for name in vars(Disk) if not name.startswith("_")}


def test_a_step_that_stands_verified_is_known_and_a_damaged_one_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write_one(folder, 10, 1, Disk())
    assert Commit(folder, 10, 2).already_there()
    (folder / "step-00000010" / "model.safetensors").write_bytes(b"other")
    assert not Commit(folder, 10, 2).already_there()
    write_one(folder, 10, 2, Disk())
    assert directory.verify(folder / "step-00000010").attempt == 2
    assert (folder / ".damaged-step-00000010-2" / "model.safetensors").read_bytes() == b"other"


def test_a_zombie_of_an_older_attempt_cannot_give_its_folder_a_final_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write_one(folder, 10, 1, Disk())
    zombie = Commit(folder, 20, 1)
    zombie.begin()
    files = {name: zombie.write(name, [b"late"]) for name in ("model.safetensors", "optimizer.safetensors")}
    directory.clear_leftovers(folder)  # what attempt 2 does at its start
    with pytest.raises(FileNotFoundError):
        zombie.finish(files, {})
    assert [path.name for path in folder.iterdir()] == ["step-00000010"]


def test_pruning_keeps_the_newest_each_nth_and_the_best_by_validation(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5), (60, 2.6)):
        commit = Commit(folder, step, 1)
        commit.begin()
        files = {name: commit.write(name, [b"x"]) for name in ("model.safetensors", "optimizer.safetensors")}
        commit.finish(files, {} if loss is None else {"val_loss": loss})

    def kept(**policy: int) -> list[int]:
        gone = directory.to_prune(folder, **policy)
        return sorted(directory.step_of(path) or 0 for path in directory.complete(folder) if path not in gone)

    assert kept(keep_last=1) == [60]
    assert kept(keep_last=2, keep_every=30) == [30, 50, 60]
    assert kept(keep_last=1, keep_best=2) == [20, 30, 60]
    assert prune(directory.to_prune(folder, 1)) == []
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000060"]


# --- real disks that refuse


FILL = """
import sys, json, errno
from pathlib import Path
import crash
from private_mount import in_private_mount
from jobs.checkpoint import directory as ckpt_format
folder = Path(sys.argv[1]) / "checkpoints"
class Disk(crash.Disk): pass
said = []
for step in range(1, 40):
    commit = crash.Commit(folder, step, 1)
    try:
        commit.begin()
        files = {name: commit.write(name, [bytes(6000)]) for name in ("model.safetensors", "optimizer.safetensors")}
        commit.finish(files, {})
    except OSError as err:
        said.append(errno.errorcode[err.errno])
        commit.abandon()
        break
good = [ckpt_format.verify(path).step for path in ckpt_format.complete(folder)]
crash.prune(ckpt_format.complete(folder)[1:])
crash.write_one(folder, 99, 1, crash.Disk())
print(json.dumps([said, good, [p.name for p in sorted(folder.iterdir())]]))
"""


@pytest.mark.parametrize("options", ["size=128k", "nr_inodes=24"], ids=["no blocks left", "no inodes left"])
def test_on_a_disk_that_really_fills_up_every_complete_checkpoint_stays_complete(tmp_path: Path, options: str) -> None:
    (tmp_path / "fill.py").write_text(FILL)
    mount = tmp_path / "small"
    mount.mkdir()
    out = in_private_mount(f"PYTHONPATH={Path(crash.__file__).parent} {sys.executable} {tmp_path / 'fill.py'} {mount}", mount, options)
    said, good, left = json.loads(out)
    assert said == ["ENOSPC"]
    assert good and good == list(range(good[0], 0, -1))
    assert left == [f"step-{good[0]:08d}", "step-00000099"]
