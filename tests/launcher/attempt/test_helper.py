"""`import holdfast` in a script of somebody else: what it needs, what it does in a run, and that it harms nothing outside of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, until

import holdfast
from jobs.checkpoint import directory, user_checkpoint
from jobs.core.contract import Cause, Exit
from jobs.core.errors import CheckpointError, SettingError
from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir
from launcher.attempt.watchdog import Watchdog
from launcher.local.executor import run_attempts
from launcher.submission import snapshot
from launcher.submission.create_run import prepare, resolve_here

SCRIPT = REPOSITORY / "tests" / "support" / "scripts" / "helped_script.py"
ENVIRON = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def end_of(seed: int, steps: int, rank: int = 0) -> int:
    """What the walk of helped_script.py ends at."""
    value = seed + rank
    for step in range(steps):
        value = (value * 6364136223846793005 + step) % (2**61 - 1)
    return value


def own_run(runs: Path, *args: str, **settings: str) -> RunDir:
    words = {
        "ENTRY": str(SCRIPT),
        "ENTRY_ARGS": ",".join(args),
        "DEVICE": "cpu",
        "NODES": "1",
        "GPUS_PER_NODE": "1",
        "SEED": "5",
        "RUNS_DIR": str(runs),
        **settings,
    }
    return prepare(resolve_here([f"{key}={value}" for key, value in words.items()], {}, REPOSITORY), REPOSITORY, sys.executable)[0]


def by_hand(cwd: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        cwd=cwd,
        env={**ENVIRON, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(run: RunDir) -> list[int]:
    return [line["step"] for line in map(json.loads, run.metrics.read_text().splitlines())]


def causes(run: RunDir) -> list[str]:
    return [str(attempt.cause) for attempt in event_log.attempts(event_log.read(run.ledger))]


def test_it_needs_the_standard_library_only() -> None:
    """A container that trains need not know what the launcher is made of."""
    program = (
        "import sys, holdfast; print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - {'__main__', '__mp_main__'}))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], env={"PYTHONPATH": str(REPOSITORY)}, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.stdout == "['holdfast', 'jobs']\n", done.stdout + done.stderr


def test_by_hand_it_keeps_everything_in_a_folder_and_a_signal_costs_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "holdfast-run")
    first = by_hand(tmp_path, "2000", "10", "0.05")
    until(lambda: directory.complete(run.checkpoints), 90, "the first checkpoint")
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=90)
    assert first.returncode == Exit.REQUEUE, said
    assert not (run.path / "attempts").exists() and not run.ledger.exists()
    stopped = directory.step_of(directory.complete(run.checkpoints)[0])
    assert stopped and f"stopped at step {stopped}" in said
    last = stopped // 10 * 10 + 20
    second = by_hand(tmp_path, str(last), "10", "0")
    said, _ = second.communicate(timeout=90)
    assert second.returncode == 0 and f"goes on from step-{stopped:08d}" in said
    assert f"rank 0 ended at {end_of(0, last)}" in said
    assert steps_of(run) == list(range(5, last + 1, 5))
    assert [path.name for path in directory.complete(run.checkpoints)] == [f"step-{last:08d}", f"step-{last - 10:08d}"]


def test_by_hand_a_second_start_finds_the_end(tmp_path: Path) -> None:
    for _ in range(2):
        done = by_hand(tmp_path, "10", "5", "0")
        said, _ = done.communicate(timeout=90)
        assert done.returncode == 0 and f"ended at {end_of(0, 10)}" in said
    assert steps_of(RunDir(tmp_path / "holdfast-run")) == [5, 10]


def test_ctrl_c_by_hand_is_what_it_always_was(tmp_path: Path) -> None:
    process = by_hand(tmp_path, "10000", "5", "0.01")
    until(lambda: directory.complete(tmp_path / "holdfast-run" / "checkpoints"), 90, "the first checkpoint")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said


def test_a_killed_run_goes_on_and_the_ledger_counts_what_was_lost(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT.read_text().replace("    stop = ", "    if step == 33 and holdfast.attempt == 1:\n        os.kill(os.getpid(), 9)\n    stop = "))
    run = own_run(tmp_path / "runs", "40", "10", "0", ENTRY=str(script))
    assert run_attempts(run, ENVIRON) == Exit.DONE, run.log(event_log.read(run.ledger)[0]["job_id"], 0).read_text()
    attempts = event_log.attempts(event_log.read(run.ledger))
    assert [attempt.cause for attempt in attempts] == [Cause.KILLED, Cause.FINISHED]
    assert (attempts[0].step, attempts[0].lost_steps, attempts[1].start_step) == (33, 3, 30)
    assert (run.path / "end.0").read_text() == str(end_of(5, 40))
    assert steps_of(run) == list(range(5, 41, 5))
    saves = [event["step"] for event in event_log.read(run.ledger) if event["event"] == "checkpoint"]
    assert saves == [10, 20, 30, 40]


def test_a_script_that_ends_without_a_checkpoint_has_lost_nothing(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("import holdfast\nfor step in range(1, 6):\n    holdfast.progress(step)\n")
    run = own_run(tmp_path / "runs", ENTRY=str(script))
    assert run_attempts(run, ENVIRON) == Exit.DONE
    [attempt] = event_log.attempts(event_log.read(run.ledger))
    assert (attempt.cause, attempt.step, attempt.lost_steps) == (Cause.FINISHED, 5, 0)


@pytest.mark.trains
def test_a_stop_file_stops_it_for_good_and_resume_goes_on(tmp_path: Path) -> None:
    run = own_run(tmp_path / "runs", "2000", "1500", "0.03", KEEP_LAST="1")
    process = subprocess.Popen([sys.executable, "-m", "launcher.local.executor", str(run.path)], cwd=REPOSITORY, env=ENVIRON)
    until(lambda: run.metrics.exists(), 90, "its first line")
    run.stop_file.touch()
    assert process.wait(90) != 0
    assert causes(run) == ["cancelled"]
    attempt = event_log.attempts(event_log.read(run.ledger))[0]
    assert attempt.lost_steps == 0 and attempt.step
    run.stop_file.unlink()
    (run.path / "hurry").touch()
    event_log.append(run.ledger, event_log.Event.SUBMITTED, attempt=0, job_id="local-1", by="resume")
    assert run_attempts(run, ENVIRON) == Exit.DONE
    assert (run.path / "end.0").read_text() == str(end_of(5, 2000))
    assert len(directory.complete(run.checkpoints)) == 1
    answer = subprocess.run([sys.executable, "-m", "launcher.cli.app", "ckpt", "verify", str(run.path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0 and "1 of 1 verified" in answer.stdout


def test_an_exception_is_written_down_with_its_kind(tmp_path: Path) -> None:
    run = own_run(tmp_path / "runs", "20", "10", "0", NODE_ENV="FAIL_AT=12")
    assert run_attempts(run, ENVIRON) == Exit.FAILED
    last = event_log.read(run.ledger)[-1]
    assert last["cause"] == "out_of_memory" and "MemoryError: no room for the walk" in last["evidence"] and last["lost_steps"] == 2
    assert "helped_script.py" in run.attempt(1).error(0).read_text()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    run = own_run(tmp_path / "runs", "20", "10", "0")
    assert run_attempts(run, ENVIRON) == Exit.DONE
    newest = directory.path_of(run.checkpoints, 20)
    (newest / "parts" / "0.bin").write_bytes(b"y" * 1000)
    event_log.append(run.ledger, event_log.Event.SUBMITTED, attempt=0, job_id="local-1", by="resume")
    assert run_attempts(run, ENVIRON) == Exit.DONE
    assert [event["name"] for event in event_log.read(run.ledger) if event["event"] == "damaged"] == [".damaged-step-00000020-2"]
    assert event_log.attempts(event_log.read(run.ledger))[1].start_step == 10
    assert (run.path / "end.0").read_text() == str(end_of(5, 20))


def test_a_ghost_writes_no_checkpoint_any_more(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for number in (1, 2):
        run.attempt(number).path.mkdir(parents=True)
    program = "import holdfast\nprint(holdfast.stop_requested())\nholdfast.new_checkpoint(5)"
    env = {**ENVIRON, "PYTHONPATH": str(REPOSITORY), "HOLDFAST_RUN_DIR": str(run.path), "HOLDFAST_ATTEMPT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == Exit.REQUEUE and done.stdout.startswith("True\nholdfast: a later attempt"), done.stderr
    assert not run.checkpoints.exists()


def test_a_stop_before_the_script_asks_ends_it_with_75(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    program = "import time, jobs.rank.stop_flag\njobs.rank.stop_flag._PATIENCE_S = 0.2\nimport holdfast\nprint('ready', flush=True)\ntime.sleep(60)"
    env = {**ENVIRON, "PYTHONPATH": str(REPOSITORY), "HOLDFAST_RUN_DIR": str(run.path), "HOLDFAST_ATTEMPT": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == Exit.REQUEUE
    assert json.loads(run.attempt(1).marker(0).read_text())["signal"] == "TERM"


def test_settings_of_the_job_can_be_read(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import holdfast\nprint('said', [holdfast.setting(n) for n in ('lr', 'note', 'entry_args', 'compile', 'qos')], holdfast.attempt)\ntry:\n  holdfast.setting('nonsense')\nexcept KeyError as err:\n  print(err)\n"
    )
    run = own_run(tmp_path / "runs", "a b", ENTRY=str(script), LR="2e-4", NOTE="Zürich: 🙂 \\ # x")
    assert run_attempts(run, {**ENVIRON, "PYTHONUTF8": "1"}) == Exit.DONE
    said = run.log(event_log.read(run.ledger)[0]["job_id"], 0).read_text()
    assert "said [0.0002, 'Zürich: 🙂 \\\\ # x', ['a b'], False, None] 1" in said and "is not a setting" in said


def test_silence_is_a_hang_only_after_the_script_has_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.attempt.watchdog._ANSWER_S", 0)
    run = RunDir(tmp_path)
    run.attempt(1).path.mkdir(parents=True)
    killed: list[str] = []
    dog = Watchdog(run, 1, world=1, nodes=["n"], per_node=1, pace_key="", least_s=0.1, quiet_s=0.1, own=True, ask=lambda _: None, kill=killed.append)
    for _ in range(50):
        dog.tick(10.0)
    assert not killed
    run.attempt(1).section.write_text("step 0")
    run.attempt(1).progress.write_text("3")
    dog.tick(1.0)
    dog.tick(10.0)
    dog.tick(10.0)
    assert killed and json.loads(run.attempt(1).hang.read_text())["step"] == 3


FULL = """
import resource, holdfast
holdfast.log(step=1, loss=1.0)
room = resource.RLIM_INFINITY
# A limit on the size of files is met like a full disk: a write is cut short, and the next one refused.
resource.setrlimit(resource.RLIMIT_FSIZE, (250, room))
for step in range(2, 7):
    holdfast.log(step=step, loss=1.0)
holdfast.log(step=6, val_loss=2.0)
for step in again:
    holdfast.log(step=step, loss=3.0)
print(holdfast.run_dir.joinpath("metrics.jsonl").stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
if save:
    folder = holdfast.new_checkpoint(7)
    (folder / "file").touch()
    holdfast.commit(folder)
else:
    holdfast.log(step=7, loss=1.0)
    holdfast.log(step=7, val_loss=2.0)
"""


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("again", [[], [4, 5], [1]], ids=str)
def test_a_full_disk_costs_no_line_of_metrics_and_ends_nothing(tmp_path: Path, again: list[int], save: bool) -> None:
    program = f"again, save = {again}, {save}\n" + FULL
    done = subprocess.run(
        [sys.executable, "-c", program], env={**ENVIRON, "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    path = tmp_path / "holdfast-run" / "metrics.jsonl"
    assert done.returncode == 0 and done.stderr == f"holdfast: {path} cannot be written: File too large. Its lines are kept until they can be.\n"
    before = [(step, 1.0, 2.0 if step == 6 else None) for step in range(1, 7)]
    expected = [line for line in before if line[0] < min(again, default=9)] + [(step, 3.0, None) for step in again] + [(7, 1.0, 2.0)] * (not save)
    assert [(line["step"], line["loss"], line.get("val_loss")) for line in map(json.loads, path.read_text().splitlines())] == expected
    assert int(done.stdout) <= 250


def test_lines_of_steps_that_are_trained_again_go_and_one_of_the_same_step_grows(tmp_path: Path) -> None:
    first = holdfast._Metrics(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        first.write(step, {"step": step, "loss": step})
    first.write(4, {"step": 4, "val_loss": 5})
    with pytest.raises(TypeError):
        first.write(5, {"step": 5, "loss": first})
    first.write(5, {"step": 5})
    second = holdfast._Metrics(tmp_path / "run" / "metrics.jsonl")
    second.write(5, {"step": 5, "loss": 6})
    second.write(3, {"step": 3, "loss": 7})
    second.write(3, {"step": 3, "loss": 8, "val_loss": 9})
    second.sync()
    assert metrics_log.read(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 8, "val_loss": 9}]


# -- the commit of files that somebody else wrote ----------------------------------------------------------------------


def filled(folder: Path, step: int, text: str = "x") -> Path:
    source = user_checkpoint.staging(folder, step, 1)
    (source / "weights.bin").write_text(text)
    return source


def test_what_cannot_be_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no files"):
        user_checkpoint.commit(user_checkpoint.staging(tmp_path, 1, 1), tmp_path, 1, 1, 2)
    with pytest.raises(CheckpointError, match="no files"):
        user_checkpoint.commit(tmp_path / "absent", tmp_path, 1, 1, 2)
    source = filled(tmp_path, 2)
    (source / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="name of the manifest"):
        user_checkpoint.commit(source, tmp_path, 2, 1, 2)
    assert directory.complete(tmp_path) == []


def test_a_checkpoint_that_is_there_stays_and_a_damaged_one_makes_room(tmp_path: Path) -> None:
    final, _ = user_checkpoint.commit(filled(tmp_path, 3, "first"), tmp_path, 3, 1, 2)
    user_checkpoint.commit(filled(tmp_path, 3, "second"), tmp_path, 3, 1, 2)
    assert (final / "weights.bin").read_text() == "first"
    (final / "weights.bin").write_text("firsd")
    user_checkpoint.commit(filled(tmp_path, 3, "third"), tmp_path, 3, 1, 2)
    assert (final / "weights.bin").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".damaged-step-00000003-1", "step-00000003"]


@pytest.mark.parametrize("to", ["{source}/weights.bin", "/etc/hostname", "../.step-00000002.tmp-1/weights.bin", "nowhere", "last.bin"])
def test_a_link_that_would_not_lead_into_the_checkpoint_is_refused(tmp_path: Path, to: str) -> None:
    source = filled(tmp_path, 2)
    (source / "deep").mkdir()
    (source / "deep" / "last.bin").symlink_to(to := to.format(source=source))
    with pytest.raises(CheckpointError) as err:
        user_checkpoint.commit(source, tmp_path, 2, 1, 2)
    said = f"{source}: deep/last.bin is a symbolic link to {to}, where the checkpoint does not keep it; copy the file to deep/last.bin instead"
    assert str(err.value) == said and directory.complete(tmp_path) == []
    (source / "deep" / "last.bin").unlink()
    assert user_checkpoint.commit(source, tmp_path, 2, 1, 2)[0].is_dir(), "it is as it was, and can be committed once that is mended"


def test_a_link_to_a_file_beside_it_is_read_under_the_final_name(tmp_path: Path) -> None:
    source = filled(tmp_path, 2, "weights")
    (source / "last.bin").symlink_to("weights.bin")
    final, _ = user_checkpoint.commit(source, tmp_path, 2, 1, 2)
    assert set(directory.verify(final).files) == {"last.bin", "weights.bin"} and (final / "last.bin").read_text() == "weights"


def test_a_checkpoint_of_an_earlier_step_than_those_there_is_not_pruned_by_its_own_commit(tmp_path: Path) -> None:
    for step in (10, 20, 30, 5):
        final, _ = user_checkpoint.commit(filled(tmp_path, step), tmp_path, step, 1, 2)
        assert directory.verify(final).step == step
    assert [directory.step_of(path) for path in directory.complete(tmp_path)] == [30, 20, 5]
    user_checkpoint.commit(filled(tmp_path, 40), tmp_path, 40, 1, 2)
    assert [directory.step_of(path) for path in directory.complete(tmp_path)] == [40, 30]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_wherever_the_disk_refuses_nothing_half_has_a_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    user_checkpoint.commit(filled(tmp_path, 1), tmp_path, 1, 1, 1)
    real, count = getattr(os, call), 0
    for allowed in range(20):
        count = 0

        def refuse(*args: object, allowed: int = allowed) -> object:
            nonlocal count
            count += 1
            if count > allowed:
                raise OSError(28, "No space left on device")
            return real(*args)

        source = filled(tmp_path, 2)
        monkeypatch.setattr(os, call, refuse)
        try:
            user_checkpoint.commit(source, tmp_path, 2, 1, 1)
        except OSError:
            assert directory.verify(user_checkpoint.newest(tmp_path, 1, may_change=False)[0] or tmp_path)
        else:
            break
        finally:
            monkeypatch.setattr(os, call, real)
            shutil.rmtree(user_checkpoint.staging(tmp_path, 2, 1))
    assert allowed < 19 and count
    assert directory.verify(directory.path_of(tmp_path, 2)).step == 2


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    for name in ("../other", "/etc/hostname", "a/../../b"):
        path = directory.path_of(tmp_path, 1)
        path.mkdir(exist_ok=True)
        (path / "manifest.json").write_text(directory.Manifest(1, 1, {name: directory.FileEntry(1, "0")}, {"own": True}).text())
        with pytest.raises(CheckpointError, match="outside"):
            directory.verify(path)


def test_leftovers_of_earlier_attempts_go_and_this_ones_stay(tmp_path: Path) -> None:
    user_checkpoint.staging(tmp_path, 4, 1), user_checkpoint.staging(tmp_path, 4, 2), (tmp_path / ".damaged-step-1-1").mkdir()
    directory.clear_leftovers(tmp_path, keep_attempt=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".damaged-step-1-1", ".step-00000004.tmp-2"]


# -- which script ------------------------------------------------------------------------------------------------------


def git(cwd: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=cwd, check=True, capture_output=True)


def project(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text("import other\nprint('hello', other.WORD)\n")
    (tmp_path / "other.py").write_text("WORD = 'frozen'\n")
    (tmp_path / ".gitignore").write_text("ignored.py\nruns/\n")
    (tmp_path / "ignored.py").write_text("print('from a file that git ignores')\n")
    git(tmp_path, "init")
    git(tmp_path, "add", "."), git(tmp_path, "commit", "-m", "x")
    return tmp_path


def started(cwd: Path, entry: str) -> str:
    run, _ = prepare(resolve_here([f"ENTRY={entry}", "DEVICE=cpu", f"RUNS_DIR={cwd}/runs"], {}, cwd), cwd, sys.executable)
    (cwd / "other.py").write_text("WORD = 'changed since'\n")
    code = run_attempts(run, ENVIRON)
    said = run.log(event_log.read(run.ledger)[0]["job_id"], 0).read_text()
    assert code == Exit.DONE, said
    return said


def test_a_script_in_a_subfolder_runs_frozen_and_finds_the_frozen_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "holdfast-run").mkdir()
    (tmp_path / "holdfast-run" / "checkpoint").write_text("of a run by hand")
    assert started(project(tmp_path) / "sub", "mine.py") == "hello frozen\n"
    assert not list(tmp_path.glob("sub/runs/*/code/holdfast-run"))


def test_a_script_that_git_ignores_or_where_there_is_no_git_is_frozen_too(tmp_path: Path) -> None:
    assert "git ignores" in started(project(tmp_path), str(tmp_path / "ignored.py"))
    plain = tmp_path / "plain"
    (plain / "train").mkdir(parents=True)
    (plain / "train.py").write_text("import train as me, holdfast\nprint(me.__file__ == __file__, holdfast.inside)\n")
    assert started(plain, "train.py") == "True True\n" * 2


@pytest.mark.parametrize(
    ("entry", "made", "said"),
    [
        ("missing.py", None, "'missing.py' does not exist"),
        ("-m train", None, "holdfast's own package"),
        ("sub/mine.py", "jobs/__init__.py", "package jobs/ in your working tree"),
    ],
)
def test_what_could_not_start_is_refused_at_submit(tmp_path: Path, entry: str, made: str | None, said: str) -> None:
    project(tmp_path)
    if made:
        (tmp_path / made).parent.mkdir()
        (tmp_path / made).touch()
    with pytest.raises(SettingError, match=said):
        prepare(resolve_here([f"ENTRY={entry}", "DEVICE=cpu"], {}, tmp_path), tmp_path, sys.executable)
    assert not (tmp_path / "runs").exists()


def test_a_train_package_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    project(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("WORD = 'mine'\n")
    (tmp_path / "sub" / "mine.py").write_text("import train\nprint(train.WORD)\n")
    assert started(tmp_path, "sub/mine.py") == "mine\n"
    assert [path.name for path in (next((tmp_path / "runs").iterdir()) / "code" / "train").iterdir() if path.name != "__pycache__"] == ["__init__.py"]


def test_settings_that_a_script_of_ones_own_does_not_use_do_not_stop_it() -> None:
    job = resolve_here(["ENTRY=x.py", "NODES=3", "GPUS_PER_NODE=5", "GPU_ARCH=sm_70"], {}, REPOSITORY).job
    assert job.world_size == 15
    # And the example of the built-in training is nothing to it, unless it is asked for.
    assert (job.job_name, job.lr, job.nodes) == ("x", 1e-3, 3)
    assert resolve_here(["ENTRY=-m pkg.mine"], {}, REPOSITORY).job.job_name == "pkg.mine"
    asked = resolve_here(["jobs/quickstart.yaml", "ENTRY=x.py"], {}, REPOSITORY).job
    assert (asked.job_name, asked.lr, asked.nodes) == ("quickstart", 3e-3, 2)
    assert snapshot.place_of("tests/support/scripts/own_script.py", REPOSITORY) == "tests/support/scripts/own_script.py"
    assert snapshot.place_of("own_script.py", REPOSITORY / "tests/support/scripts") == "tests/support/scripts/own_script.py"
    assert snapshot.place_of("/opt/x.py", REPOSITORY) == "/opt/x.py"
