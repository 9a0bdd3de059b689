"""Damaged checkpoints, disks that refuse, and saves in the background: nothing false is loaded, nothing is swallowed."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, weights_sha
from private_mount import in_private_mount
from torch import nn
from training import Farm, at_step, curve, events, farm, logs, result, saved

from jobs.checkpoint import directory
from jobs.checkpoint.commit import Commit
from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import CheckpointError, SettingError
from jobs.run.rundir import RunDir
from train.checkpoint import state_dict
from train.checkpoint.restore import initialise
from train.checkpoint.state_dict import TrainStateRecord

__all__ = ["farm"]
pytestmark = pytest.mark.timeout(900)

MUTATIONS = ("truncate", "flip", "delete", "rename", "swap", "append", "empty", "manifest", "folder", "dangle")


def small_model(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    commit = Commit(folder, step, 1)
    commit.begin()
    files = {name: commit.write(name, state_dict.safetensors_parts(rows)) for name, rows in state_dict.local_shards(model, optimizer, 0).items()}
    commit.finish(files, TrainStateRecord(step=step, tokens=step, seed=0, max_steps=9, batch_size=1, data="d", precision="fp32", world=1).plain())


def damage(path: Path, rng: random.Random) -> str:
    """One random injury to a checkpoint. Returns what was done, or nothing where the bytes came out the same."""
    kind = rng.choice(MUTATIONS)
    name = rng.choice(sorted(child.name for child in path.iterdir()))
    file = path / name
    data = file.read_bytes()
    if kind == "truncate":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip":
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    elif kind == "delete":
        file.unlink()
    elif kind == "rename":
        file.rename(path / (name + rng.choice([".tmp", "~", "2"])))
    elif kind == "swap":
        other = path / rng.choice([n for n in ("model.safetensors", "optimizer.safetensors", "manifest.json") if n != name])
        file.write_bytes(other.read_bytes())
    elif kind == "append":
        file.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
    elif kind == "empty":
        file.write_bytes(b"\0" * len(data))
    elif kind == "manifest":
        # Any word of the manifest becomes something else that is valid JSON.
        body = json.loads((path / "manifest.json").read_text())
        key = rng.choice([k for k in body if k != "sum"])
        body[key] = rng.choice([None, [], {}, 7, "x", {"files": {"../../x": {"bytes": 1, "sha256": ""}}}])
        (path / "manifest.json").write_text(json.dumps(rng.choice([body, [body], 3, "text"])))
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "dangle":
        file.unlink()
        file.symlink_to("nowhere")
    return f"{kind} {name}"


def test_two_hundred_random_injuries_are_all_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    rng = random.Random(20)
    older, newer = small_model(1), small_model(2)
    folder = tmp_path / "checkpoints"
    write(folder, 10, *older)
    write(folder, 20, *newer)
    seen = set()
    for number in range(200):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        what = damage(copy / "step-00000020", rng)
        seen.add(what)
        chosen, damaged = directory.newest_verified(copy, 3)
        assert chosen == copy / "step-00000010", what
        [(name, reason)] = damaged
        assert name == ".damaged-step-00000020-3" and (copy / name).is_dir()
        assert "step-00000020" in reason and len(reason) > 30, reason
        model, optimizer = small_model(3)
        state_dict.load(chosen, model, optimizer)
        for ours, theirs in zip(model.parameters(), older[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        shutil.rmtree(copy)
    assert len(seen) > 25


def test_a_renamed_checkpoint_is_no_other_step_and_strange_names_are_nobody_s(tmp_path: Path) -> None:
    write(tmp_path, 20, *small_model())
    os.rename(tmp_path / "step-00000020", tmp_path / "step-00000030")
    for name in ("step-40", "step-²0000000", "step-000000x1", "step-00000050.tmp", "Step-00000060"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000070").write_text("a file")
    chosen, damaged = directory.newest_verified(tmp_path, 1)
    assert chosen is None
    assert [reason.split(":")[0] for _, reason in damaged] == ["step-00000070", "step-00000030"]
    assert "belongs to step 20" in damaged[1][1]


@pytest.mark.parametrize(("seed", "every"), [(0, False), (0, True), *(pytest.param(seed, False, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_run_whose_newest_checkpoints_are_damaged_goes_on_from_the_one_before_and_says_so(farm: Farm, seed: int, every: bool) -> None:
    """With `every` none is left: it begins anew, with the weights that it drew the first time."""
    straight = farm.finished(KEEP_LAST="3")
    run = farm.prepare(MAX_KILLED="0", KEEP_LAST="3")

    def kill(farm: Farm, run: object) -> None:
        assert saved(run, 24)  # type: ignore[arg-type]
        farm.kill_all()

    farm.train(run, kill)
    rng = random.Random(seed)
    newest = directory.complete(run.checkpoints)
    injured = newest if every else newest[: rng.randint(1, 2)]
    what = [damage(path, rng) for path in injured]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 1)
        assert farm.train(run) == Exit.DONE, logs(run)
    assert result(run) == result(straight), what
    assert [event["name"] for event in events(run, "damaged")] == [f".damaged-{path.name}-2" for path in injured]
    assert events(run, "resumed")[-1]["step"] == (0 if every else directory.step_of(newest[len(injured)]))
    assert "WARNING: checkpoint" in logs(run)


def test_a_checkpoint_of_another_model_is_refused_by_the_names_of_its_weights(tmp_path: Path) -> None:
    write(tmp_path, 10, *small_model())
    other = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"missing 3.bias, 3.weight, unknown none"):
        state_dict.load(tmp_path / "step-00000010", other, None)
    with pytest.raises(CheckpointError, match=r"unknown 2.bias, 2.weight"):
        state_dict.load(tmp_path / "step-00000010", other[:2], None)
    with pytest.raises(CheckpointError, match=r"2.weight is \(4, 8\), this model has \(5, 8\)"):
        state_dict.load(tmp_path / "step-00000010", nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)), None)
    frozen, optimizer = small_model()
    frozen[0].requires_grad_(False)
    _, remarks = state_dict.load(tmp_path / "step-00000010", frozen, optimizer)
    assert remarks == ["optimizer state of 0.bias, 0.weight was dropped: this model does not train them"]


def test_nothing_in_a_checkpoint_is_a_pickle(farm: Farm) -> None:
    run = farm.finished(MAX_STEPS="8")
    names = {child.name for child in (run.checkpoints / "step-00000008").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "manifest.json"}
    state = directory.verify(run.checkpoints / "step-00000008").state
    assert {"step", "tokens", "seed", "max_steps", "versions"} <= set(state) and "torch" in state["versions"]
    from safetensors.torch import load_file

    weights = load_file(run.checkpoints / "step-00000008" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_rows_written_by_several_processes_come_back_whole(tmp_path: Path) -> None:
    # What FSDP saves: each process its rows, the last one fewer, and some processes none at all.
    full = torch.arange(35, dtype=torch.float32).view(7, 5)
    scalar = torch.tensor(3.0)
    commit = Commit(tmp_path, 10, 1)
    commit.begin()
    files = {}
    for rank, (start, end) in enumerate([(0, 3), (3, 6), (6, 7), (7, 7)]):
        rows = {"w": state_dict.TensorShard(full[start:end].contiguous(), start, 7)} | ({"s": state_dict.TensorShard(scalar)} if rank == 0 else {})
        name = directory.file_name("model", rank, 4)
        files[name] = commit.write(name, state_dict.safetensors_parts(rows))
    files["optimizer.safetensors"] = commit.write("optimizer.safetensors", state_dict.safetensors_parts({}))
    path = commit.finish(files, {})
    saved = state_dict.CheckpointReader(path, directory.verify(path).of_kind("model"))
    assert torch.equal(saved.whole("w"), full) and torch.equal(saved.whole("s"), scalar)
    assert torch.equal(saved._rows("w", 2, 7), full[2:7]) and saved._rows("w", 7, 7).shape == (0, 5)
    with pytest.raises(CheckpointError, match="rows are missing of w"):
        state_dict.CheckpointReader(path, ["model.00000-of-00004.safetensors"])


def test_weights_of_another_run_come_from_its_newest_checkpoint_that_verifies_and_what_was_passed_over_is_said(tmp_path: Path) -> None:
    older, newer = small_model(1), small_model(2)
    folder = tmp_path / "checkpoints"
    write(folder, 10, *older)
    write(folder, 20, *newer)
    fresh = "optimizer, schedule and data start fresh"
    assert initialise(tmp_path, small_model(3)[0]) == f"weights from {folder / 'step-00000020'}, step 20; {fresh}"
    file = folder / "step-00000020" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    model, _ = small_model(3)
    why = "step-00000020: the content of model.safetensors does not match its sum"
    said = initialise(tmp_path, model)
    assert said == f"weights from {folder / 'step-00000010'}, step 10; {fresh}; WARNING: passed over what is damaged: {why}"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), older[0].parameters(), strict=True))
    assert {path.name for path in folder.iterdir()} == {"step-00000010", "step-00000020"}, "it is another run's: nothing is set aside there"
    with pytest.raises(CheckpointError, match="does not fit this model"):
        initialise(tmp_path, nn.Sequential(nn.Linear(8, 8)))
    (folder / "step-00000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as err:
        initialise(tmp_path, model)
    both = f"{why}; step-00000010: its manifest cannot be read (No such file or directory)"
    assert str(err.value) == f"INIT_FROM: {tmp_path} has no checkpoint that verifies: {both}"
    # One that was named is the one that is meant.
    with pytest.raises(CheckpointError, match="does not match its sum"):
        initialise(folder / "step-00000020", model)


@pytest.mark.parametrize("kind", state_dict._TYPES, ids=str)
def test_every_type_comes_back_as_it_was_whole_and_by_rows(tmp_path: Path, kind: torch.dtype) -> None:
    full = (torch.arange(-6, 36).view(7, 6) * (1 + 1j if kind.is_complex else 1)).to(kind)
    model, optimizer = small_model()
    for name, tensor in (("whole", full), ("scalar", full[0, 0]), ("turned", full.clone().conj())):
        model.register_buffer(name, tensor)
    state_dict.refuse_unsavable(model, "mine")
    commit = Commit(tmp_path, 10, 1)
    commit.begin()
    files = {}
    for name, rows in state_dict.local_shards(model, optimizer, 0).items():
        copies = {
            key: state_dict.TensorShard(torch.empty(one.tensor.shape, dtype=state_dict.host_type(name, one.tensor)).copy_(one.tensor))
            for key, one in rows.items()
        }
        files[name] = commit.write(name, state_dict.safetensors_parts(copies))
    path = commit.finish(files, TrainStateRecord(step=10, tokens=1, seed=0, max_steps=9, batch_size=1, data="d", precision="fp32", world=1).plain())
    other, _ = small_model(1)
    for name in ("whole", "scalar", "turned"):
        other.register_buffer(name, torch.zeros_like(getattr(model, name)))
    state_dict.load(path, other, None)
    assert torch.equal(other.whole, full) and torch.equal(other.scalar, full[0, 0]) and torch.equal(other.turned, full.conj())
    for number, (start, end) in enumerate([(0, 3), (3, 7)]):
        parts = state_dict.safetensors_parts({"w": state_dict.TensorShard(full[start:end].contiguous(), start, 7)})
        (tmp_path / f"{number}").write_bytes(b"".join(parts))
    saved = state_dict.CheckpointReader(tmp_path, ["0", "1"])
    assert saved.whole("w").dtype == kind and torch.equal(saved.whole("w"), full) and torch.equal(saved._rows("w", 2, 5), full[2:5])


def test_types_that_the_library_does_not_read_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model()
    model.register_buffer("low", torch.zeros(2, dtype=torch.float8_e5m2))  # a weight: saved as fp32
    model.register_buffer("anew", torch.zeros(2, dtype=torch.complex128), persistent=False)
    state_dict.refuse_unsavable(model, "mine")
    model.register_buffer("freqs_cis", torch.zeros(2, dtype=torch.complex64))
    # What safetensors 0.6 says.
    monkeypatch.setitem(state_dict._TYPES, torch.complex64, "C63")
    with pytest.raises(SettingError, match=r"^model: 'mine' has what no checkpoint can hold: freqs_cis \(complex64\)\. .*: float64, .*, uint16$"):
        state_dict.refuse_unsavable(model, "mine")


# --- saves in the background, and disks that refuse


def with_fault(farm: Farm, fault: str, **settings: str):
    farm.before = fault
    try:
        run = farm.prepare(**settings)
        return run, farm.train(run)
    finally:
        farm.before = None


def test_training_goes_on_while_a_save_is_written_and_the_result_is_the_same(farm: Farm) -> None:
    settings = {"CHECKPOINT_EVERY": "20", "MAX_STEPS": "30"}
    run, code = with_fault(farm, "slow_disk", **settings)
    first, last = events(run, "checkpoint")
    assert code == Exit.DONE and (first["step"], last["step"]) == (20, 30), logs(run)
    assert first["seconds"] > 1 and first["blocked_s"] < 0.1 * first["seconds"], first
    slow, code = with_fault(farm, "slow_disk", **settings, ASYNC_SAVE="false")
    assert all(event["blocked_s"] > 0.9 * event["seconds"] for event in events(slow, "checkpoint"))
    assert result(run) == result(slow)


def test_a_disk_that_is_full_at_one_save_is_said_and_counted_and_training_goes_on(farm: Farm) -> None:
    straight = farm.finished()
    run, code = with_fault(farm, "disk_full_at_the_third_save")
    assert code == Exit.DONE, logs(run)
    [failure] = events(run, "save_failed")
    assert failure["errno"] == "ENOSPC" and failure["step"] == 24
    assert [event["step"] for event in events(run, "checkpoint")] == [8, 16, 32, 40]
    assert "could not be written" in logs(run) and "The ones before it are untouched" in logs(run)
    assert result(run) == result(straight)


@pytest.mark.parametrize(("fault", "word"), [("disk_always_full", "No space left"), ("read_only", "Read-only file system")])
def test_a_run_that_cannot_save_at_its_end_says_storage_and_is_given_up_after_its_budget(farm: Farm, fault: str, word: str) -> None:
    run, code = with_fault(farm, fault, MAX_STEPS="16")
    assert code == Exit.FAILED
    ends = events(run, "end")
    assert [end["cause"] for end in ends] == ["storage", "storage"], logs(run)
    assert word in ends[0]["evidence"]
    assert len(events(run, "save_failed")) == 2  # one periodic save in each attempt


def test_a_mistake_in_the_writer_is_raised_at_the_next_step_and_not_swallowed(farm: Farm) -> None:
    run, code = with_fault(farm, "bug_in_the_writer")
    [end] = events(run, "end")
    assert end["cause"] == "code_error" and "a mistake of ours" in end["evidence"] and end["step"] < 20, logs(run)


def test_a_folder_removed_during_the_run_is_made_again_by_the_next_save(farm: Farm) -> None:
    run = farm.prepare()

    def remove(farm: Farm, run: object) -> None:
        at_step(run, 20)  # type: ignore[arg-type]
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # type: ignore[attr-defined]

    assert farm.train(run, remove) == Exit.DONE, logs(run)
    assert directory.verify(directory.complete(run.checkpoints)[0]).step == 40


def test_a_folder_that_cannot_be_listed_is_written_down_with_what_the_disk_said(tmp_path: Path) -> None:
    # A link to itself, in the place of a stale handle; listing it is the first thing that is done with the run, before torch is imported.
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    done = subprocess.run(
        [sys.executable, "-m", "train", "--run-dir", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"RANK": "0", "HOLDFAST_ATTEMPT": "1"},
        capture_output=True,
    )
    marker = json.loads(RunDir(tmp_path).attempt(1).marker(0).read_text())
    assert (done.returncode, marker["reason"], marker["errno"]) == (Exit.FAILED, "error", errno.ELOOP), done.stderr


def test_a_clock_set_back_by_a_year_changes_nothing(farm: Farm) -> None:
    straight = farm.finished()
    run = farm.prepare(MAX_KILLED="0")

    def kill(farm: Farm, run: object) -> None:
        at_step(run, 20)  # type: ignore[arg-type]
        farm.kill_all()

    farm.train(run, kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.attempt.lifecycle.os.getpid", lambda: 1)
        farm.before = "clock_set_back_a_year"
        try:
            assert farm.train(run) == Exit.DONE, logs(run)
        finally:
            farm.before = None
    assert result(run) == result(straight)


def test_free_space_is_asked_for_before_anything_is_written(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.checkpoint import manager as module

    class Stub:
        _run, _job = farm.prepare(), type("Job", (), {"keep_last": 2})()

    save = module._Save(
        TrainStateRecord(step=1, tokens=0, seed=0, max_steps=1, batch_size=1, data="", precision="", world=1), {"model": [b"x" * 5_000_000]}, 0.0, 0.0, False, 1
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4_000_000})())
    with pytest.raises(OSError, match=r"it needs 4.9 MiB, the disk has 3.8 MiB left. KEEP_LAST=2 needs room for 3"):
        module.CheckpointManager._check_room(Stub(), save)  # type: ignore[arg-type]


def test_only_the_newest_attempt_of_a_run_may_write(farm: Farm) -> None:
    from jobs.core.errors import RunOwnedError
    from jobs.run import claim
    from train.checkpoint import manager as module

    run = farm.finished(MAX_STEPS="8")

    class Stub:
        _run, _rt = run, type("Distributed", (), {"attempt": 1})()

    module.CheckpointManager._check_claim(Stub())  # type: ignore[arg-type]
    assert claim.claim(run, 2, {"job_id": "x"})
    with pytest.raises(RunOwnedError, match="attempt 1 writes no more checkpoints"):
        module.CheckpointManager._check_claim(Stub())  # type: ignore[arg-type]


def test_an_attempt_that_has_a_successor_takes_no_old_checkpoint_away(farm: Farm) -> None:
    """The later one may be reading it just now."""
    from jobs.run import claim
    from train.checkpoint import manager as module

    run = farm.finished(MAX_STEPS="24", CHECKPOINT_EVERY="8", KEEP_LAST="3")
    job = load(run.job_yaml).model_copy(update={"keep_last": 2})
    save = module._Save(
        TrainStateRecord(step=24, tokens=0, seed=0, max_steps=1, batch_size=1, data="", precision="", world=1), {"model": [b"x"]}, 0.0, 0.0, False, 1
    )

    def left(attempt: int) -> list[int | None]:
        rt = SimpleNamespace(attempt=attempt, is_main=True, job_id="7")
        stub = SimpleNamespace(_run=run, _rt=rt, _job=job, _say=print, _disk=module.DISK)
        module.CheckpointManager._acknowledge(stub, save, background=True)  # type: ignore[arg-type]
        return [directory.step_of(path) for path in directory.complete(run.checkpoints)]

    assert claim.claim(run, 2, {"job_id": "x"})
    assert left(attempt=1) == [24, 16, 8]
    assert left(attempt=2) == [24, 16]


def test_the_best_checkpoints_by_validation_and_each_nth_are_kept(farm: Farm) -> None:
    run = farm.finished(KEEP_LAST="1", KEEP_BEST="1", KEEP_EVERY="16", EVAL_EVERY="10")
    kept = [directory.step_of(path) for path in directory.complete(run.checkpoints)]
    best = min((line for line in curve(run) if line[2] is not None), key=lambda line: line[2] or 0)[0]
    assert set(kept) == {40, 32, 16, best}, kept
    assert directory.val_loss_of(directory.path_of(run.checkpoints, best)) == min(line[2] for line in curve(run) if line[2] is not None)
    assert weights_sha(run)


def test_each_nth_step_is_kept_also_where_saves_go_by_time(farm: Farm) -> None:
    run = farm.finished(KEEP_LAST="1", KEEP_EVERY="15", CHECKPOINT_EVERY="auto", MAX_STEPS="32")
    assert [directory.step_of(path) for path in directory.complete(run.checkpoints)] == [32, 30, 15]


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_checkpoint_whose_validation_the_next_attempt_finished_is_kept_as_the_best(farm: Farm, tmp_path: Path, world: str) -> None:
    """The first validation is the best here: the rate is so high that the model only gets worse."""
    settings = {
        "DATA": "own_models:interrupted", "KEEP_BEST": "1", "KEEP_LAST": "1", "EVAL_EVERY": "2", "CHECKPOINT_EVERY": "4", "MAX_STEPS": "8",
        "LR": "30", "GRAD_CLIP": "0", "WARMUP_STEPS": "4", "PRECISION": "fp32", "GPUS_PER_NODE": world,
    }  # fmt: skip
    straight = farm.finished(**settings)
    stopped = farm.finished(**settings, DATA_OPTIONS=f"note={tmp_path / 'note'}")
    assert [event["cause"] for event in events(stopped, "end")] == ["requeued", "finished"], logs(stopped)
    assert result(stopped) == result(straight)
    kept = [[(path.name, directory.val_loss_of(path)) for path in directory.complete(run.checkpoints)] for run in (straight, stopped)]
    assert kept[0] == kept[1] and kept[0][-1][0] == "step-00000002", (kept, curve(straight))
    for path in directory.complete(stopped.checkpoints):
        directory.verify(path)


FULL = """
import os, sys, time
sys.path[:0] = {tests!r}
from training import Farm, events, logs, curve
from launcher.local import executor as local
from pathlib import Path
from jobs.checkpoint import directory as ckpt_format
farm = Farm(Path(sys.argv[1]) / "runs")
local.spawn = farm.spawn
run = farm.prepare(MAX_STEPS="200", CHECKPOINT_EVERY="10", KEEP_LAST="50", PREFLIGHT_S="0", MAX_STORAGE="0")
import threading
code = farm.train(run)
good = [ckpt_format.verify(path).step for path in ckpt_format.complete(run.checkpoints)]
print("RESULT", int(code), len(good), len(events(run, "save_failed")), [e["cause"] for e in events(run, "end")], "disk has" in logs(run) or "No space" in logs(run), flush=True)
farm.close()
"""


def test_a_run_on_a_disk_that_fills_up_keeps_every_complete_checkpoint_and_ends_with_a_clear_error(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    (tmp_path / "full.py").write_text(FULL.format(tests=[str(REPOSITORY / "tests" / place) for place in ("", "support", "support/models")]))
    out = in_private_mount(f"{sys.executable} {tmp_path / 'full.py'} {mount}", mount, "size=6m")
    code, good, failed, rest = out.partition("RESULT ")[2].split(" ", 3)
    assert int(good) >= 2 and int(failed) >= 5, out
    assert int(code) == Exit.FAILED and "storage" in rest and rest.strip().endswith("True"), out


READ_ONLY = """
import subprocess, sys
sys.path[:0] = {tests!r}
from training import Farm, events, logs, result, saved
from launcher.local import executor as local
from pathlib import Path
from jobs.checkpoint import directory as ckpt_format
from jobs.run import event_log as ledger
farm = Farm(Path(sys.argv[1]))
local.spawn = farm.spawn
settings = dict(MAX_STEPS="80", CHECKPOINT_EVERY="10", EVAL_EVERY="0", MAX_STORAGE="0")
plain = farm.finished(**settings)
run = farm.prepare(**settings)
run.checkpoints.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "none", str(run.checkpoints)], check=True)
def becomes_read_only(farm, run):
    assert saved(run, 10)
    # Refused while a save has a file open.
    while subprocess.run(["mount", "-o", "remount,ro", str(run.checkpoints)], capture_output=True).returncode:
        pass
code = farm.train(run, becomes_read_only)
good = [ckpt_format.verify(path).step for path in ckpt_format.complete(run.checkpoints)]
failed = {{event["errno"] for event in events(run, "save_failed")}}
print("RESULT", int(code), bool(good), failed, events(run, "end")[-1]["cause"], "Read-only file system" in logs(run), flush=True)
subprocess.run(["mount", "-o", "remount,rw", str(run.checkpoints)], check=True)
ledger.append(run.ledger, "submitted", attempt=0, job_id="again", by="resume")
print("AGAIN", int(farm.train(run)), events(run, "resumed")[-1]["step"] in good, result(run) == result(plain), flush=True)
farm.close()
"""


def test_a_checkpoint_folder_that_becomes_read_only_ends_the_run_for_storage_and_harms_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "runs"
    mount.mkdir()
    (tmp_path / "ro.py").write_text(READ_ONLY.format(tests=[str(REPOSITORY / "tests" / place) for place in ("", "support", "support/models")]))
    out = in_private_mount(f"{sys.executable} {tmp_path / 'ro.py'} {mount}", mount, "size=64m")
    assert "RESULT 1 True {'EROFS'} storage True" in out, out
    assert "AGAIN 0 True True" in out, out
