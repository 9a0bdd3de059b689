"""Checkpoints as files: their names, what a manifest must say to be believed, and what is set aside, cleared and kept."""

import fcntl
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_runs import make_runs

from jobs.checkpoint import commit, directory
from jobs.checkpoint.commit import Commit, Disk
from jobs.checkpoint.directory import FileEntry, Manifest
from jobs.core.errors import CheckpointError
from jobs.run.rundir import RunDir
from train.checkpoint import restore

NAMES = ("model.safetensors", "optimizer.safetensors")


def saved(folder: Path, step: int = 10, attempt: int = 1, state: dict[str, Any] | None = None, names: tuple[str, ...] = NAMES) -> Path:
    one = Commit(folder, step, attempt)
    one.begin()
    for name in names:
        (one.staging / name).parent.mkdir(exist_ok=True)
    return one.finish({name: one.write(name, [name.encode(), b"", b"rest"]) for name in names}, state or {})


def rewritten(path: Path, **changes: Any) -> Path:
    """The checkpoint with other words in its manifest, whose sum is right again."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sum"]
    body = {name: value for name, value in {**body, **changes}.items() if value is not ...}
    (path / "manifest.json").write_text(json.dumps({**body, "sum": directory._sum_of(body)}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as err:
        directory.verify(path)
    return str(err.value)


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_say_step_attempt_and_writer() -> None:
    folder = Path("/c")
    assert directory.path_of(folder, 1200) == folder / "step-00001200"
    assert directory.staging_of(folder, 1200, 3) == folder / ".step-00001200.tmp-3"
    assert directory.file_name("model") == "model.safetensors"
    assert directory.file_name("model", 1, 2) == "model.00001-of-00002.safetensors"
    assert commit.trash_name(folder / ".step-00001200.tmp-3").name.startswith(".trash-step-00001200.tmp-3-")
    assert commit.trash_name(folder / "a") != commit.trash_name(folder / "a")


@pytest.mark.parametrize("name", ["step-10", "step-0000000a", "step-000000010", "step-00000010x", ".step-00000010", "step-00000010.tmp-1", "model"])
def test_what_is_not_exactly_a_steps_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert directory.step_of(tmp_path / name) is None and directory.complete(tmp_path) == []


def test_complete_ones_are_listed_newest_first_and_none_where_there_is_no_folder(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 30):
        directory.path_of(tmp_path, step).mkdir()
    assert [directory.step_of(path) for path in directory.complete(tmp_path)] == [100_000_000, 30, 5]
    (tmp_path / "file").write_text("")
    assert directory.complete(tmp_path / "none") == directory.complete(tmp_path / "file") == []


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_a_manifest_says_what_was_written(tmp_path: Path) -> None:
    manifest = directory.verify(saved(tmp_path, 10, 3, {"tokens": 7}))
    assert (manifest.step, manifest.attempt, manifest.state) == (10, 3, {"tokens": 7})
    assert manifest.bytes == sum(entry.bytes for entry in manifest.files.values()) == sum(len(name) + 4 for name in NAMES)
    assert manifest.of_kind("model") == ["model.safetensors"] and manifest.of_kind("mod") == []
    assert json.loads((tmp_path / "step-00000010" / "manifest.json").read_text())["format"] == directory.FORMAT


def test_a_manifest_that_another_tool_wrote_in_another_order_is_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path) / "manifest.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert directory.verify(path.parent).step == 10


def test_files_of_many_writers_are_listed_in_the_order_of_their_ranks() -> None:
    files = {directory.file_name(kind, rank, 3): FileEntry(1, "") for rank in (2, 0, 1) for kind in ("optimizer", "model")}
    assert Manifest(1, 1, files).of_kind("model") == [f"model.0000{rank}-of-00003.safetensors" for rank in range(3)]


def test_a_bit_that_flips_in_the_manifest_is_seen(tmp_path: Path) -> None:
    path = saved(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 2'))
    assert refusal(path.parent) == "step-00000010: its manifest does not match its own sum"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "cannot be read (not JSON: Expecting value"),
        ("[]", "cannot be read ("),
        ("{}", "cannot be read ('sum')"),
        ("[" * 100_000, "cannot be read ("),
        ("\udcff", "cannot be read ("),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_refusal_and_no_crash(tmp_path: Path, text: str | None, said: str) -> None:
    path = saved(tmp_path)
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"step-00000010: its manifest {said}" in refusal(path)


def test_another_format_and_another_step_are_refused(tmp_path: Path) -> None:
    assert refusal(rewritten(saved(tmp_path / "a"), format=3)) == "step-00000010: its manifest has format 3, this version reads 2"
    assert refusal(rewritten(saved(tmp_path / "b"), step=11)) == "step-00000010: its manifest belongs to step 11"
    assert "cannot be read ('files')" in refusal(rewritten(saved(tmp_path / "c"), files=...))
    assert "cannot be read" in refusal(rewritten(saved(tmp_path / "d"), state=3))


@pytest.mark.parametrize("names", [("model.safetensors",), ("optimizer.safetensors",), (*NAMES, "../a"), (*NAMES, "sub/a"), (*NAMES, ".hidden"), ()])
def test_a_manifest_lists_a_model_and_an_optimizer_and_nothing_outside(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = rewritten(saved(tmp_path), files={name: {"bytes": 0, "sha256": ""} for name in names})
    assert refusal(path) == "step-00000010: its manifest does not list a model and an optimizer"


def test_a_script_of_ones_own_has_files_of_any_name_but_inside(tmp_path: Path) -> None:
    assert list(directory.verify(saved(tmp_path, state={"own": True}, names=("deep/weights.pt", "..b"))).files) == ["deep/weights.pt", "..b"]
    for number, names in enumerate([(), ("../a",), ("/etc/passwd",), ("deep/../../a",), ("a", "/b")]):
        path = rewritten(saved(tmp_path / str(number), state={"own": True}), files={name: {"bytes": 0, "sha256": ""} for name in names})
        assert refusal(path) == "step-00000010: its manifest lists no file, or one outside of it"


# -- the files ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_to_a_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    content = (path / NAMES[1]).read_bytes()
    (path / NAMES[1]).write_bytes(content[:-1])
    assert refusal(path) == f"step-00000010: {NAMES[1]} has {len(content) - 1} bytes, the manifest says {len(content)}"
    (path / NAMES[1]).write_bytes(b"X" + content[1:])
    assert refusal(path) == f"step-00000010: the content of {NAMES[1]} does not match its sum"
    (path / NAMES[1]).unlink()
    assert refusal(path) == f"step-00000010: {NAMES[1]} cannot be read (No such file or directory)"
    with pytest.raises(CheckpointError, match="cannot be read"):
        directory.hash_files(path, NAMES)


@pytest.mark.parametrize("early", [False, True])
def test_the_newest_that_verifies_is_found_and_the_damaged_before_it_are_set_aside_each_under_a_name_of_its_own(tmp_path: Path, early: bool) -> None:
    for step in (10, 20, 30):
        saved(tmp_path, step)
    for step in (20, 30):
        (directory.path_of(tmp_path, step) / NAMES[0]).write_bytes(b"")
    (tmp_path / ".damaged-step-00000030-2").mkdir()
    found, damaged = directory.newest_verified(tmp_path, 2, directory.Ahead(tmp_path) if early else None)
    assert found == tmp_path / "step-00000010"
    assert [name for name, _ in damaged] == [".damaged-step-00000030-2+", ".damaged-step-00000020-2"] and "has 0 bytes" in damaged[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".damaged-step-00000020-2",
        ".damaged-step-00000030-2",
        ".damaged-step-00000030-2+",
        "step-00000010",
    ]
    assert directory.newest_verified(tmp_path / "none", 2) == (None, [])


def test_what_was_verified_ahead_is_not_read_again_and_what_came_since_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = saved(tmp_path, 10), []
    hash_files = directory.hash_files
    monkeypatch.setattr(directory, "hash_files", lambda path, names: read.append(path) or hash_files(path, names))
    ahead = directory.Ahead(tmp_path)
    ahead._thread.join()
    assert read == [first], "nobody has asked yet"
    assert directory.newest_verified(tmp_path, 2, ahead) == (first, []) and ahead.verify(first).step == 10 and read == [first]
    second = saved(tmp_path, 20)
    assert directory.newest_verified(tmp_path, 2, ahead) == (second, []) and read == [first, second]
    assert directory.Ahead(tmp_path / "none").verify(first).step == 10


def test_whoever_asks_while_it_is_still_being_verified_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = saved(tmp_path, 10), []
    hash_files, asked = directory.hash_files, threading.Event()
    monkeypatch.setattr(directory, "hash_files", lambda path, names: asked.wait(30) and not read.append(path) and hash_files(path, names))
    ahead = directory.Ahead(tmp_path)
    threading.Timer(0.2, asked.set).start()
    assert ahead.verify(first).step == 10 and read == [first]


def test_what_fails_ahead_for_another_reason_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 10)
    with monkeypatch.context() as broken:
        broken.setattr(directory, "hash_files", lambda path, names: 1 / 0)
        ahead = directory.Ahead(tmp_path)
        ahead._thread.join()
    assert ahead.verify(path).step == 10


def test_what_cannot_be_set_aside_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", refuse)
    assert directory.set_aside(saved_without_rename(tmp_path), 2) == "step-00000010"


def saved_without_rename(folder: Path) -> Path:
    path = directory.path_of(folder, 10)
    path.mkdir()
    return path


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    for name in (".step-00000020.tmp-1", ".trash-step-00000005-aa", ".damaged-step-00000007-1", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    moved: list[tuple[str, str]] = []
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (moved.append((Path(old).name, Path(new).name)), real(old, new)))
    directory.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".damaged-step-00000007-1", "notes", "step-00000010"]
    # A staging folder loses its name before it loses a file; what is in the trash already is only deleted.
    ((old, new),) = moved
    assert old == ".step-00000020.tmp-1" and new.startswith(".trash-step-00000020.tmp-1-")
    directory.clear_leftovers(tmp_path / "none")


def test_a_staging_folder_that_cannot_be_renamed_is_left_whole_and_the_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".step-00000020.tmp-1", ".trash-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", refuse)
    directory.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".step-00000020.tmp-1"] and (tmp_path / ".step-00000020.tmp-1" / "file").exists()


def test_a_leftover_that_cannot_be_deleted_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    (tmp_path / ".trash-a").mkdir()
    monkeypatch.setattr(os, "rmdir", refuse)
    directory.clear_leftovers(tmp_path)
    assert (tmp_path / ".trash-a").exists()


# -- which are kept ----------------------------------------------------------------------------------------------------


def test_what_is_kept_by_age_number_and_validation(tmp_path: Path) -> None:
    for step, loss in ((10, 1.0), (20, 1.0), (30, float("inf")), (40, "x"), (50, 0), (60, None)):
        saved(tmp_path, step, state={} if loss is None else {"val_loss": loss})

    def gone(**policy: int) -> list[int | None]:
        return [directory.step_of(path) for path in directory.to_prune(tmp_path, **policy)]

    assert gone(keep_last=2) == [40, 30, 20, 10]
    assert gone(keep_last=10) == []
    assert gone(keep_last=1, keep_every=20) == [50, 30, 10]
    assert gone(keep_last=1, keep_best=1) == [40, 30, 20, 10]
    # Of two that are equally good the later one is kept.
    assert gone(keep_last=1, keep_best=2) == [40, 30, 10]
    # What is no number is not among the best, even where there is no other.
    assert gone(keep_last=1, keep_best=9) == [40, 30] and directory.val_loss_of(tmp_path / "step-00000030") is None
    assert directory.val_loss_of(tmp_path / "step-00000050") == 0.0
    assert directory.val_loss_of(tmp_path / "step-00000040") is directory.val_loss_of(tmp_path / "step-00000099") is None


def test_a_list_of_names_is_cut_after_four() -> None:
    assert directory.few([]) == "none"
    assert directory.few("abcd") == "a, b, c, d"
    assert directory.few("abcde") == "a, b, c, d and 1 more"
    assert directory.few("abcdef") == "a, b, c, d and 2 more"


# -- the commit --------------------------------------------------------------------------------------------------------


def test_the_calls_of_disk_are_those_of_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, flushed, real = Disk(), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(fd), real(fd))[1])
    file, folder = disk.create(tmp_path / "a"), disk.open_folder(tmp_path)
    for fd, access in ((file, os.O_WRONLY), (folder, os.O_RDONLY)):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == access
        disk.fsync(fd)
        disk.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert flushed == [file, folder]
    with pytest.raises(NotADirectoryError):
        disk.open_folder(tmp_path / "a")
    disk.mkdir(tmp_path / "b")
    disk.rename(tmp_path / "a", tmp_path / "b" / "c")
    disk.unlink(tmp_path / "b" / "c")
    disk.rmdir(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


class Recorded(Disk):
    """Refuses one call by its name, and remembers all."""

    def __init__(self, refused: str = ""):
        self.refused, self.open = refused, 0

    def create(self, path: Path) -> int:
        self.open += 1
        return super().create(path)

    def open_folder(self, path: Path) -> int:
        self.open += 1
        return super().open_folder(path)

    def close(self, fd: int) -> None:
        self.open -= 1
        super().close(fd)
        if self.refused == "close":
            raise OSError(5, "Input/output error")

    def write(self, fd: int, data: memoryview) -> int:
        if self.refused == "write":
            raise OSError(28, "No space left on device")
        return super().write(fd, data[:3])

    def fsync(self, fd: int) -> None:
        if self.refused == "fsync":
            raise OSError(5, "Input/output error")
        super().fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        if self.refused == "rename":
            raise OSError(30, "Read-only file system")
        super().rename(old, new)


def test_a_file_is_written_whole_however_little_a_call_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_CHUNK", 4)
    disk, data = Recorded(), b"0123456789"
    entry = commit.write_file(tmp_path / "a", [data, b"", memoryview(np.zeros((0, 3))), memoryview(data)], disk)
    assert (tmp_path / "a").read_bytes() == data + data and disk.open == 0
    assert entry == FileEntry(20, directory.hash_file(tmp_path, "a"))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644 & ~_umask()
    with pytest.raises(FileExistsError):
        commit.write_file(tmp_path / "a", [data], disk)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("refused", ["write", "fsync", "close"])
def test_a_file_that_the_disk_refuses_is_an_error_and_no_open_file(tmp_path: Path, refused: str) -> None:
    disk = Recorded(refused)
    with pytest.raises(OSError):
        commit.write_file(tmp_path / "a", [b"data"], disk)
    assert disk.open == 0
    if refused == "fsync":
        with pytest.raises(OSError):
            commit.flush_folder(tmp_path, disk)
        assert disk.open == 0


def test_what_an_earlier_try_of_the_attempt_left_is_taken_away_first_and_an_abandoned_one_too(tmp_path: Path) -> None:
    one = Commit(tmp_path / "checkpoints", 10, 1)
    one.begin()
    one.write("model.safetensors", [b"old"])
    (one.staging / "deep").mkdir()
    (one.staging / "deep" / "file").write_text("x")
    (one.staging / "link").symlink_to(tmp_path)
    one.begin()
    assert list(one.staging.iterdir()) == [] and [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-00000010.tmp-1"]
    one.write("model.safetensors", [b"new"])
    one.abandon()
    one.abandon()  # nothing there any more
    assert list((tmp_path / "checkpoints").iterdir()) == []
    one.disk = Recorded("rename")
    one.begin()
    one.abandon()  # as far as the disk lets us
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-00000010.tmp-1"]


def test_two_damaged_ones_of_one_attempt_are_both_kept(tmp_path: Path) -> None:
    saved(tmp_path, 10, 2)
    (tmp_path / ".damaged-step-00000010-2").mkdir()
    assert saved(tmp_path, 10, 2) == tmp_path / "step-00000010"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010", ".damaged-step-00000010-2", ".damaged-step-00000010-2+"}


def test_a_prune_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 10), saved(tmp_path, 20)
    assert commit.prune([one], Recorded("rename")) == ["step-00000010 could not be taken away: Read-only file system"]
    assert commit.prune([tmp_path / "step-00000005", two]) == ["step-00000005 could not be taken away: No such file or directory"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_nothing_is_deleted_before_the_disk_knows_of_its_new_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (said,) = commit.prune([path], Recorded("fsync"))
    assert said == "step-00000010 could not be taken away: Input/output error"
    (trash,) = tmp_path.iterdir()
    assert trash.name.startswith(".trash-step-00000010-") and {file.name for file in trash.iterdir()} == {*NAMES, "manifest.json"}


def test_sizes_as_a_person_reads_them() -> None:
    assert [directory.size_text(count) for count in (5 * 2**20, 2**30 - 2**20, 2**30, 5 * 2**29)] == ["5.0 MiB", "1023.0 MiB", "1.0 GiB", "2.5 GiB"]


def test_a_sum_is_found_while_another_thread_keeps_the_interpreter_busy(tmp_path: Path) -> None:
    # What imports torch meanwhile gives the interpreter's lock up every 5 ms: with small blocks each of them waits that long.
    content = os.urandom(2**20) * 192
    (tmp_path / "a").write_bytes(content)
    found: list[str] = []
    hashing = threading.Thread(target=lambda: found.append(directory.hash_file(tmp_path, "a")))
    begun = time.monotonic()
    hashing.start()
    while hashing.is_alive() and time.monotonic() - begun < 20:
        sum(range(1000))
    took = time.monotonic() - begun
    hashing.join()
    assert found == [hashlib.sha256(content).hexdigest()]
    assert took < 3, "in blocks of 256 KiB it is 6 s, in blocks of 64 MiB 0.2"


@pytest.mark.parametrize("content", [b"", b"a", b"ab", bytes(range(256)) * 40])
def test_a_sum_is_that_of_the_whole_file_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(directory, "_HASH_BLOCK", 1000)
    (tmp_path / "a").write_bytes(content)
    assert directory.hash_file(tmp_path, "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "FIFO of no bytes"])
def test_init_from_refuses_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    """It hung in the read."""
    make_runs(tmp_path / "runs")
    run = RunDir(tmp_path / "runs" / "good-aaaa")
    path = directory.path_of(run.checkpoints, 20) / name
    if kind == "FIFO of no bytes":
        body = json.loads((path.parent / "manifest.json").read_text())
        rewritten(path.parent, files={**body["files"], "model.safetensors": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}})
    path.unlink()
    os.symlink("/dev/zero", path) if kind == "device" else os.mkfifo(path)
    begun = time.monotonic()
    for source in (run.path, path.parent):
        chosen, damage = restore._choose(source)
        assert chosen is None and name.removesuffix(".json") in damage and "not a regular file" in damage
    assert time.monotonic() - begun < 5
