"""The commands as a person meets them: one clear message for each thing that is wrong, the right exit code, nothing half-made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from command import HOLDFAST, holdfast
from conftest import REPOSITORY, SMALL, Cluster, losses, until, weights_sha

from jobs.core.contract import Event, Exit
from jobs.run import claim, event_log
from jobs.run.rundir import RunDir
from launcher.cli.app import run_app
from launcher.local.executor import pid_of_rank
from launcher.submission.create_run import prepare, resolve_here

ONE = {**SMALL, "NODES": "1", "GPUS_PER_NODE": "1", "DEVICE": "cpu", "MAX_STEPS": "60", "CHECKPOINT_EVERY": "20", "EVAL_EVERY": "30"}


def pairs(settings: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["PRECISON=bf16"], 2, ["PRECISON is not a setting", "Did you mean PRECISION?"]),
        (["BATCH_SIZE=many"], 2, ["BATCH_SIZE", "'many'", "whole number", "command line"]),
        (["BATCH_SIZE=33", "MICRO_BATCH_SIZE=8"], 78, ["BATCH_SIZE=33", "not divisible by", "32"]),
        (["PRECISION=bf-16"], 2, ["'bf-16'", "fp32, tf32, bf16, fp16, fp8", "Did you mean 'bf16'?"]),
        (["PRECISION=fp8", "DEVICE=cpu"], 78, ["needs a GPU", "PRECISION=bf16"]),
        (["PRECISION=fp8", "GPU_ARCH=sm_80"], 78, ["needs sm_89", "sm_80", "PRECISION=bf16"]),
        (["jobs/quikstart.yaml"], 2, ["'jobs/quikstart.yaml'", "Did you mean jobs/quickstart.yaml?"]),
        (["SITE=moon"], 2, ["site 'moon' is not known", "generic, h100, lab"]),
        (["LR_SCHEDULER_PARAMS=T_zero=5"], 78, ["T_zero", "T_0"]),
        (["STOP_LEAD_S=7200"], 78, ["STOP_LEAD_S=7200", "TIME_LIMIT"]),
        (["PARTITION=a\nb"], 2, ["PARTITION", "U+000A"]),
        (["SBATCH_OPTIONS=requeue="], 2, ["--requeue", "holdfast itself"]),
    ],
)
@pytest.mark.parametrize("command", ["render", "submit", "run"])
def test_bad_settings_get_one_message_and_make_nothing(tmp_path: Path, command: str, words: list[str], code: int, said: list[str]) -> None:
    done = holdfast(command, *words, f"RUNS_DIR={tmp_path}/runs")
    assert done.returncode == code, done.stderr
    for part in said:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert holdfast("--version").stdout == f"holdfast {project['version']}\n"


@pytest.mark.parametrize("words", ["explain", "explain --json"])
def test_a_reader_that_goes_away_is_no_error_for_a_command_that_only_tells(words: str) -> None:
    command = f"'{sys.executable}' -m launcher.cli.app {words} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1


def test_all_faults_are_told_at_once() -> None:
    done = holdfast("render", "PRECISON=x", "LR=-1", "SEED=1.5", TIME_LIMIT="soon", HOLDFAST_NODS="2")
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("PRECISON", "LR:", "SEED:", "TIME_LIMIT:", "HOLDFAST_NODES"))


def test_a_runs_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = holdfast("run", "DEVICE=cpu", f"RUNS_DIR={tmp_path}/file/runs")
    assert done.returncode == 2
    assert "RUNS_DIR" in done.stderr and "Not a directory" in done.stderr


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume"])
def test_a_run_that_does_not_exist_is_named_beside_those_that_do(tmp_path: Path, command: str) -> None:
    done = holdfast(command, "nothing-here", f"RUNS_DIR={tmp_path}")
    assert done.returncode == 2
    assert "no run 'nothing-here'" in done.stderr


def test_without_slurm_submit_says_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = holdfast("submit", f"RUNS_DIR={tmp_path}/runs", PATH=str(empty))
    assert done.returncode == 1
    assert "sbatch is not on this machine" in done.stderr and "--local" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tag", ["%j", "%t", "%A", "%a"])
def test_a_folder_in_whose_name_submitit_would_put_a_number_is_refused_before_sbatch_is_asked(tmp_path: Path, tag: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        (programs / name).write_text(
            f"#!/bin/sh\nfor word; do [ $word = --test-only ] && exit 0; done\ntouch {tmp_path}/asked.{name}\necho Submitted batch job 17\n"
        )
        (programs / name).chmod(0o755)
    runs = tmp_path / f"50{tag}"
    for words in ([], ["--local"], ["--array", "SEED=1,2"]):
        done = holdfast("submit", f"RUNS_DIR={runs}", *words, PATH=f"{programs}:{os.environ['PATH']}")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"RUNS_DIR: '{runs}' has {tag}" in done.stderr and "choose a folder without %j, %t, %A, %a" in done.stderr
    assert not (tmp_path / "asked.sbatch").exists() and not list(runs.iterdir())
    assert holdfast("submit", f"RUNS_DIR={tmp_path}/50%", PATH=f"{programs}:{os.environ['PATH']}").returncode == 0


@pytest.mark.slurm
def test_sbatch_refusing_is_told_in_its_own_words_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.holdfast("submit", f"RUNS_DIR={tmp_path}/runs", "GPUS_PER_NODE=9", "BATCH_SIZE=18", check=False)
    assert done.returncode == 1
    assert "sbatch: " in done.stderr and "node configuration is not available" in done.stderr
    assert done.stderr.count("node configuration") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
def test_an_unreachable_slurmctld_is_told_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(cluster.lab.conf.read_text().replace(f"SlurmctldPort={cluster.lab.base_port}", "SlurmctldPort=9"))
    done = cluster.holdfast("submit", f"RUNS_DIR={tmp_path}/runs", check=False, SLURM_CONF=str(conf))
    assert done.returncode == 1
    assert "slurmctld cannot be reached" in done.stderr or "did not answer" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "Slurm does not answer" in cluster.holdfast("status", "--all", check=False, SLURM_CONF=str(conf)).stdout or not any(cluster.runs.iterdir())


@pytest.mark.slurm
def test_test_only_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.holdfast("submit", "--test-only", f"RUNS_DIR={tmp_path}/runs")
    assert "nothing was submitted" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
def test_render_prints_what_submit_submits_byte_for_byte(cluster: Cluster, tmp_path: Path) -> None:
    words = [f"RUNS_DIR={tmp_path}/runs", "RUN_ID=same", *pairs(ONE), "MAX_STEPS=1"]
    shown = cluster.holdfast("render", *words).stdout
    answer = json.loads(cluster.holdfast("submit", "--json", "--wait", *words).stdout.splitlines()[0])
    run = RunDir(Path(answer["path"]))
    assert run.script.read_text() == shown
    told = cluster.slurm("scontrol", "write", "batch_script", answer["job_id"], "-")
    assert told.rstrip("\n") == shown.rstrip("\n")


@pytest.mark.slurm
def test_a_given_run_id_is_submitted_once(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--json", f"RUNS_DIR={tmp_path}/runs", "RUN_ID=once", *pairs(ONE), "MAX_STEPS=1"]
    first, second = (json.loads(cluster.holdfast("submit", *words).stdout) for _ in range(2))
    assert first["job_id"] == second["job_id"]
    cluster.finished(RunDir(Path(first["path"])))


def queued(cluster: Cluster, run: RunDir) -> list[str]:
    return cluster.slurm("squeue", "-h", "-n", run.id, "-o", "%i").split()


@pytest.mark.slurm
def test_a_job_that_the_ledger_does_not_know_is_found_before_a_second_one_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    # The launcher was killed between sbatch and the ledger.
    words = [f"RUNS_DIR={tmp_path}/runs", "RUN_ID=lost", *pairs(ONE), "SBATCH_OPTIONS=hold="]
    run = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words).stdout)["path"]))
    (job_id,) = queued(cluster, run)
    run.ledger.unlink()
    assert f"in the queue already, as job {job_id}" in cluster.holdfast("resume", str(run.path)).stdout
    run.ledger.unlink()
    assert json.loads(cluster.holdfast("submit", "--json", *words).stdout)["job_id"] == job_id
    # The same name in another folder is another run.
    other = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words, f"RUNS_DIR={tmp_path}/others").stdout)["path"]))
    assert len(queued(cluster, run)) == 2 and other.id == run.id
    cluster.slurm("scancel", *queued(cluster, run))


@pytest.mark.slurm
def test_an_sbatch_whose_answer_was_lost_has_submitted_all_the_same(cluster: Cluster, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "sbatch"
    tool.parent.mkdir()
    # It queues the job and then reports what a client says when slurmctld answers too late.
    tool.write_text(
        f'#!/bin/bash\n"{shutil.which("sbatch")}" "$@" || exit\n[[ " $* " = *" --test-only "* ]] && exit 0\necho "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2\nexit 1\n'
    )
    tool.chmod(0o755)
    words = ["--json", f"RUNS_DIR={tmp_path}/runs", *pairs(ONE), "SBATCH_OPTIONS=hold="]
    answer = json.loads(cluster.holdfast("submit", *words, PATH=f"{tool.parent}:{cluster.env['PATH']}").stdout)
    assert queued(cluster, RunDir(Path(answer["path"]))) == [answer["job_id"]]
    cluster.slurm("scancel", answer["job_id"])


@pytest.mark.trains
def test_run_trains_in_the_foreground_and_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [*pairs({**ONE, "MAX_STEPS": "400", "EVAL_EVERY": "0"}), f"RUNS_DIR={runs}"]
    straight = holdfast("run", *words, "RUN_ID=straight")
    assert straight.returncode == 0, straight.stderr
    assert "step 400/400" in straight.stdout
    process = subprocess.Popen(
        [HOLDFAST, "run", *words, "RUN_ID=halved"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    run = RunDir(runs / "quickstart-halved")
    until(lambda: run.attempt(1).progress.exists() and int(run.attempt(1).progress.read_text() or 0) > 20, 60, "step 20")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "holdfast resume --local halved" in out or "holdfast resume --local quickstart-halved" in out
    resumed = holdfast("resume", "--local", "halved", f"RUNS_DIR={runs}")
    assert resumed.returncode == 0, resumed.stderr
    attempts = event_log.attempts(event_log.read(run.ledger))
    assert len(attempts) == 2 and attempts[0].lost_steps == 0 and attempts[1].start_step > 20
    reference = RunDir(runs / "quickstart-straight")
    assert weights_sha(run) == weights_sha(reference)
    assert losses(run) == losses(reference)


@pytest.mark.parametrize("words", [["--local"], ["--local", "TIME_LIMIT=5"], ["TIME_LIMIT=5"]], ids=" ".join)
def test_a_local_run_of_another_machine_is_not_resumed_and_stays_as_it_is(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = prepare(resolve_here([f"RUNS_DIR={tmp_path}/runs", "RUN_ID=far", "DEVICE=cpu"], {}, tmp_path), tmp_path, sys.executable)
    run.stop_file.touch()
    assert claim.claim(run, 1, {"job_id": "local-999999999", "host": "gpubox", "pid": 999_999_999, "stamp": "x:1"})
    event_log.append(run.ledger, Event.START, attempt=1, job_id="local-999999999", world=1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert run_app(["resume", str(run.path), *words]) == Exit.REQUEUE
    said = capsys.readouterr().err
    assert "was begun on gpubox without Slurm" in said and f"delete {run.attempt(1).owner}" in said
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.trains
def test_the_local_executor_survives_a_killed_rank(tmp_path: Path) -> None:
    settings = {**SMALL, "NODES": "1", "GPUS_PER_NODE": "2", "DEVICE": "cpu", "MAX_STEPS": "300", "EVAL_EVERY": "0", "CHECKPOINT_EVERY": "20"}
    done = holdfast("submit", "--local", "--json", *pairs(settings), f"RUNS_DIR={tmp_path}/runs")
    run = RunDir(Path(json.loads(done.stdout)["path"]))
    until(lambda: list(run.checkpoints.glob("step-*")), 60, "a checkpoint")
    victim = pid_of_rank(run, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)

    def causes() -> list[str]:
        return [attempt.cause.value for attempt in event_log.attempts(event_log.read(run.ledger)) if attempt.cause]

    until(lambda: causes() == ["killed", "finished"], 90, "the second attempt to finish")
    assert "finished" in holdfast("status", str(run.path), f"RUNS_DIR={tmp_path}/runs").stdout


def test_status_of_a_hundred_runs_is_one_table_and_json(tmp_path: Path) -> None:
    for index in range(100):
        run = RunDir(tmp_path / f"job-{index:04d}")
        run.path.mkdir()
        run.job_yaml.write_text('job_name: "job"\nmax_steps: 10\n')
    begun = time.monotonic()
    done = holdfast("status", "--json", f"RUNS_DIR={tmp_path}")
    assert time.monotonic() - begun < 10
    assert len(json.loads(done.stdout)) == 100


@pytest.mark.trains
def test_a_code_error_ends_the_run_and_shows_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise RuntimeError('the planted fault')\n")
    done = holdfast("run", *pairs(ONE), f"RUNS_DIR={tmp_path}/runs", f"ENTRY={script}")
    assert done.returncode == 1
    assert "the planted fault" in done.stdout
    assert "failed" in holdfast("status", f"RUNS_DIR={tmp_path}/runs").stdout


@pytest.mark.slurm
def test_an_array_is_shown_and_cancelled_as_a_whole(cluster: Cluster) -> None:
    words = ["--array", "SEED=1..12", *pairs({name: value for name, value in ONE.items() if name != "SEED"}), "SBATCH_OPTIONS=begin=now+1hour"]
    answer = json.loads(cluster.holdfast("submit", "--json", *words).stdout)
    shown = json.loads(cluster.holdfast("status", "--json", answer["path"]).stdout)
    assert [row["run"] for row in shown] == [f"{answer['run']}.{index}" for index in range(12)]
    assert {row["state"] for row in shown} == {"waiting"}
    assert "cancelled 12 runs of array" in cluster.holdfast("cancel", answer["run"].rpartition("-")[2]).stdout  # by its id
    until(lambda: not cluster.slurm("squeue", "-h", "-j", answer["job_id"]), 30, "the tasks to leave the queue")
    assert "nothing to cancel" in cluster.holdfast("cancel", answer["path"]).stdout


@pytest.mark.parametrize("word", ["ENTRY_ARGS=a,b", "MODULES=a,b", "CONTAINER_IMAGE=a,b", "NODES=1,2"])
def test_what_the_one_script_of_an_array_says_is_not_varied(tmp_path: Path, word: str) -> None:
    done = holdfast("submit", "--array", word, "DEVICE=cpu", f"RUNS_DIR={tmp_path}/runs")
    assert done.returncode == 2 and f"--array: {word.partition('=')[0]} is the same for all runs of an array" in done.stderr
    assert not (tmp_path / "runs").exists()
