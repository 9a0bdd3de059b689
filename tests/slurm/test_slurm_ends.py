"""The main promise, on a real Slurm, for what ends an attempt other than preemption: time limit, requeue, a killed rank, scancel."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, SMALL, Cluster, assert_same_result, booted, until

from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.local.executor import pid_of_rank
from slurm.client import Slurm
from slurm.devcluster import lab
from slurm.devcluster.prefix import VARIABLE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# Half the processes, most of whose time is `import torch`, where what is shown does not need two on a node.
PAIR = {"NODES": "2", "GPUS_PER_NODE": "1"}


@pytest.fixture(scope="module")
def undisturbed_pair(cluster: Cluster) -> RunDir:
    """2 nodes x 1 rank, fp32, from the first step to the last in one attempt."""
    return cluster.straight(**PAIR)


def test_a_run_at_its_time_limit_is_warned_requeued_and_ends_with_identical_weights(cluster: Cluster) -> None:
    # The warning comes 21 to 39 s after the start: late enough for imports on a busy machine, and the steps wait so that they are
    # not through by then. Should imports take longer, such attempts are no progress, and as many as it takes are allowed here.
    limits = {"TIME_LIMIT": "1", "STOP_LEAD_S": "30", "PREFLIGHT_S": "0", "MAX_NO_PROGRESS": "30"}
    model = {"MODEL": "tests.support.models.patient:build", "MAX_STEPS": "360", "EVAL_EVERY": "120", "CHECKPOINT_EVERY": "120"}
    run = cluster.submit(**{**PAIR, **model, **limits, "MODEL_OPTIONS": f"pause=0.1,{SMALL['MODEL_OPTIONS']}"})
    reference = cluster.submit(**PAIR, **model)
    attempts = cluster.finished(run, seconds=200)
    causes = [attempt.cause.value for attempt in attempts if attempt.cause]
    assert len(causes) >= 2 and set(causes[:-1]) == {"time_limit"}, cluster.logs(run)
    assert sum(attempt.lost_steps for attempt in attempts) == 0
    cluster.finished(reference)
    assert_same_result(run, reference)


def test_scontrol_requeue_loses_nothing(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 45)
    cluster.slurm("scontrol", "requeue", cluster.job_id(run))
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["requeued", "finished"], cluster.logs(run)
    assert attempts[0].lost_steps == 0
    assert_same_result(run, undisturbed_pair)


def test_a_killed_rank_costs_at_most_one_checkpoint_interval(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 60)
    kill_rank(run, 1)
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["killed", "finished"], cluster.logs(run)
    assert "rank 1" in attempts[0].evidence
    assert 0 < attempts[0].lost_steps <= int(SMALL["CHECKPOINT_EVERY"])
    # The newest checkpoint, whichever that was when the signal arrived.
    assert attempts[1].start_step >= 40 and attempts[1].start_step % int(SMALL["CHECKPOINT_EVERY"]) == 0
    assert_same_result(run, undisturbed_pair)


def test_scancel_stops_a_run_for_good_and_resume_goes_on(cluster: Cluster, undisturbed_pair: RunDir) -> None:
    run = cluster.submit(**PAIR)
    cluster.at_step(run, 20)
    cluster.slurm("scancel", cluster.job_id(run))
    until(lambda: [a for a in event_log.attempts(event_log.read(run.ledger)) if a.cause], 30, "the end of the attempt")
    until(
        lambda: not cluster.slurm("squeue", "-h", "-j", cluster.job_id(run), "-t", "all", "-o", "%T").replace("CANCELLED", "").strip(), 30, "the job to leave"
    )
    attempt = event_log.attempts(event_log.read(run.ledger))[0]
    assert attempt.cause is not None and attempt.cause.value == "cancelled", cluster.logs(run)
    assert "cancelled" in cluster.holdfast("status", str(run.path)).stdout
    cluster.holdfast("resume", str(run.path))
    attempts = cluster.finished(run)
    assert [attempt.cause.value for attempt in attempts if attempt.cause] == ["cancelled", "finished"], cluster.logs(run)
    assert_same_result(run, undisturbed_pair)


def test_a_run_that_waits_again_is_said_to_wait_and_can_be_cancelled(cluster: Cluster) -> None:
    def row() -> dict[str, Any]:
        return dict(json.loads(cluster.holdfast("status", "--json", str(run.path)).stdout)[0])

    run = cluster.submit(**PAIR)
    cluster.at_step(run, 5)
    first = cluster.job_id(run)
    cluster.slurm("scontrol", "requeuehold", "State=SpecialExit", first)
    until(lambda: cluster.slurm("squeue", "-h", "-j", first, "-o", "%T").strip() == "SPECIAL_EXIT", 60, "the job to be held")
    until(lambda: event_log.attempts(event_log.read(run.ledger))[-1].cause, 30, "the end of the attempt")
    held = row()
    assert (held["state"], held["job_id"]) == ("waiting", first) and held["queue_reason"], held
    assert f"cancelled job {first}" in cluster.holdfast("cancel", str(run.path)).stdout
    until(lambda: not cluster.slurm("squeue", "-h", "-n", run.id).strip(), 30, "the job to leave the queue")
    assert row()["state"] == "cancelled"
    cluster.holdfast("resume", str(run.path), "SBATCH_OPTIONS=begin=now+1hour")
    second = cluster.job_id(run)
    again = row()
    assert (again["state"], again["job_id"]) == ("waiting", second) and second != first, again
    assert f"is waiting as job {second}" in cluster.holdfast("resume", str(run.path), check=False).stderr
    assert f"cancelled job {second}" in cluster.holdfast("cancel", str(run.path)).stdout
    until(lambda: not cluster.slurm("squeue", "-h", "-n", run.id).strip(), 30, "the job to leave the queue")
    assert row()["state"] == "cancelled"


@pytest.fixture(scope="module")
def cancelling() -> Iterator[Cluster]:
    """A cluster that cancels what it preempts: back into the queue comes only what asks for it itself."""
    with booted(lab.LabConfig(nodes=2, preempt_mode="CANCEL")) as here:
        yield here


def in_setup(cluster: Cluster, tmp_path: Path, **settings: str) -> RunDir:
    """A run whose job is in its setup script, where it will be for some time at the first attempt."""
    (tmp_path / "setup.sh").write_text(f"[ -e {tmp_path}/begun ] || {{ touch {tmp_path}/begun; sleep 8; }}\n")
    run = cluster.submit(**PAIR, SETUP_SCRIPT=str(tmp_path / "setup.sh"), **settings)
    until((tmp_path / "begun").exists, 30, lambda: f"the setup script\n{cluster.logs(run)}")
    time.sleep(3)
    return run


@pytest.mark.parametrize(
    "settings", [{"ENTRY": str(REPOSITORY / "tests" / "support" / "scripts" / "own_script.py")}, {"MAX_STEPS": "20"}], ids=["own script", "built-in"]
)
def test_a_run_preempted_while_its_node_is_being_set_up_comes_back_also_where_slurm_cancels(
    cancelling: Cluster, tmp_path: Path, settings: dict[str, str]
) -> None:
    run = in_setup(cancelling, tmp_path, **settings)
    cancelling.slurm("sbatch", "-p", "high", "-N2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    attempts = cancelling.finished(run)
    assert [str(attempt.cause) for attempt in attempts] == ["preempted", "finished"], cancelling.logs(run)
    assert attempts[0].job_id == attempts[1].job_id and "preempt" in attempts[0].evidence.lower()
    assert not run.attempt(1).progress.exists()


def test_a_job_cancelled_while_its_node_is_being_set_up_is_cancelled(cancelling: Cluster, tmp_path: Path) -> None:
    run = in_setup(cancelling, tmp_path)
    cancelling.slurm("scancel", cancelling.job_id(run))
    until(lambda: [a for a in event_log.attempts(event_log.read(run.ledger)) if a.cause], 30, lambda: f"the end\n{cancelling.logs(run)}")
    until(lambda: not cancelling.slurm("squeue", "-h", "-j", cancelling.job_id(run)), 30, "the job to leave")
    assert [str(attempt.cause) for attempt in event_log.attempts(event_log.read(run.ledger))] == ["cancelled"], cancelling.logs(run)


def test_one_cancelled_task_of_an_array_is_over_and_the_others_go_on(cluster: Cluster) -> None:
    settings = {**SMALL, **PAIR, "MAX_STEPS": "600"}
    answer = json.loads(cluster.holdfast("submit", "--json", "--array", "SEED=1,2", *(f"{k}={v}" for k, v in settings.items() if k != "SEED")).stdout)
    first, second = (RunDir(Path(answer["path"])).member(index) for index in range(2))
    cluster.at_step(first, 10)
    cluster.at_step(second, 1)
    cluster.slurm("scancel", f"{answer['job_id']}_0")
    until(lambda: event_log.attempts(event_log.read(first.ledger))[0].cause, 30, lambda: f"the end\n{cluster.logs(first)}")
    until(lambda: not cluster.slurm("squeue", "-h", "-r", "-j", f"{answer['job_id']}_0"), 30, "the task to leave")
    assert ended(first) == ["cancelled"], cluster.logs(first)
    assert ended(second)[0] in ("None", "finished"), cluster.logs(second)
    cluster.slurm("scancel", str(answer["job_id"]))


DELAYED = """import atexit, pathlib, sys, time
def wait():
    pathlib.Path({folder!r}, "reached").touch()
    time.sleep(8)
if sys.orig_argv[-1] == {command!r} and any("launcher.attempt" in word for word in sys.orig_argv):
    atexit.register(wait) if {command!r} == "adopt" else wait()
"""


def delayed(folder: Path, command: str) -> dict[str, str]:
    """Environment in which `python -m launcher.attempt COMMAND` writes the file `reached` and takes 8 s longer: `adopt` at its end."""
    (folder / "sitecustomize.py").write_text(DELAYED.format(folder=str(folder), command=command))
    return {"PYTHONPATH": str(folder)}


def test_a_job_cancelled_while_its_attempt_begins_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.submit(**PAIR, NODE_ENV=f"PYTHONPATH={delayed(tmp_path, 'begin')['PYTHONPATH']}")
    until((tmp_path / "reached").exists, 60, lambda: f"the beginning of the attempt\n{cluster.logs(run)}")
    cluster.slurm("scancel", cluster.job_id(run))
    until(lambda: [a for a in event_log.attempts(event_log.read(run.ledger)) if a.cause], 30, lambda: f"the end\n{cluster.logs(run)}")
    until(lambda: not cluster.slurm("squeue", "-h", "-j", cluster.job_id(run)), 30, "the job to leave")
    assert ended(run) == ["cancelled"] and not run.attempt(1).progress.exists(), cluster.logs(run)


def test_a_job_submitted_by_hand_and_cancelled_while_its_run_is_made_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run = submit_by_hand(cluster, f"--output={cluster.runs}/slurm-%j.out", **delayed(tmp_path, "adopt"))
    until((tmp_path / "reached").exists, 30, "the run to be made")
    cluster.slurm("scancel", cluster.job_id(run))
    until(lambda: not cluster.slurm("squeue", "-h", "-j", cluster.job_id(run)), 30, "the job to leave")
    info = Slurm(cluster.env).job(cluster.job_id(run))
    assert info is not None and (info.state, info.restarts) == ("CANCELLED", 0)
    (row,) = json.loads(cluster.holdfast("status", "--json", str(run.path)).stdout)
    assert (row["state"], row["attempt"]) == ("cancelled", 0), row


BY_HAND = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=4G", "--time=10", "slurm/train.sbatch")


def submit_by_hand(cluster: Cluster, *options: str, **more: str) -> RunDir:
    """A run of slurm/train.sbatch, whose log is the slurm-ID.out of its folder unless the options say otherwise."""
    env = {**cluster.env, **SMALL, "MAX_STEPS": "600", "HOLDFAST_SITE": "lab", "HOLDFAST_PYTHON": sys.executable, **more}
    job = subprocess.run(
        ["sbatch", "--parsable", *options, *BY_HAND], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True, timeout=90
    ).stdout.strip()
    return RunDir(until(lambda: list(cluster.runs.glob(f"*-j{job}")), 60, "the run directory of the job")[0])


@pytest.mark.parametrize("log", ["slurm-%j.out", "/dev/null"])
def test_scancel_of_a_job_submitted_by_hand_is_no_requeue(cluster: Cluster, log: str) -> None:
    run = submit_by_hand(cluster, f"--output={log if log == '/dev/null' else cluster.runs / log}")
    cluster.at_step(run, 10)
    job = cluster.job_id(run)
    cluster.slurm("scancel", job)
    until(lambda: event_log.attempts(event_log.read(run.ledger))[0].cause, 30, lambda: f"the end\n{cluster.logs(run)}")
    until(lambda: not cluster.slurm("squeue", "-h", "-j", job), 30, "the job to leave")
    assert ended(run) == ["cancelled"], cluster.logs(run)


LAB_OF_USER = """import json, sys
from pathlib import Path
from slurm.devcluster import lab
from slurm.devcluster.prefix import VARIABLE
root = Path(sys.argv[1])
print(json.dumps(lab.start(root, lab.LabConfig(nodes=1)).env()) if sys.argv[2] == "start" else lab.load(root).stop())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_scancel_by_root_of_another_users_run_is_no_requeue() -> None:
    """The cluster and the run belong to an ordinary user."""
    user, packages = "games", sysconfig.get_path("purelib")
    room = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    room.chmod(0o755)
    with suppress(LookupError):
        shutil.chown(room, user, user)
    env = {
        "PATH": os.environ["PATH"], "HOME": str(room), "PYTHONPATH": f"{REPOSITORY}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "RUNS_DIR": f"{room}/runs",
        "HOLDFAST_SITE": "lab", VARIABLE: os.environ.get(VARIABLE, ""), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
    }  # fmt: skip

    def call(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        # `env`, since the first program after setpriv is still looked up with root's capabilities.
        become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "env")
        return subprocess.run([*become, *command], cwd=REPOSITORY, env={**env, **more}, capture_output=True, text=True, timeout=120)

    # An interpreter in the home of root cannot be started by others.
    python = next((python for python in (sys.executable, "/usr/bin/python3") if call(python, "-c", "import launcher.cli.app, torch").returncode == 0), None)
    if python is None:
        shutil.rmtree(room)
        pytest.skip(f"no Python here that user {user} can start and that has the libraries")
    try:
        client = json.loads(call(python, "-c", LAB_OF_USER, f"{room}/lab", "start").stdout)
        script = REPOSITORY / "tests" / "support" / "scripts" / "until_stopped.py"
        words = (f"ENTRY={script}", "NODES=1", "GPUS_PER_NODE=1", f"NODE_ENV=PYTHONPATH={packages}", "REQUEUE_CONFIRM_S=0")
        submitted = call(python, "-m", "launcher.cli.app", "submit", "--json", *words, **client)
        assert submitted.returncode == 0, submitted.stderr
        run, job = RunDir(Path(json.loads(submitted.stdout)["path"])), json.loads(submitted.stdout)["job_id"]
        until((run.path / "running.1").exists, 60, lambda: "the script\n" + "\n".join(path.read_text() for path in run.logs.glob("*")))
        here = {**os.environ, **client}
        assert f"UserId={user}(" in subprocess.run(["scontrol", "show", "job", job], env=here, capture_output=True, text=True).stdout
        subprocess.run(["scancel", job], env=here, check=True, timeout=60)
        until(lambda: event_log.attempts(event_log.read(run.ledger))[0].cause, 30, "the end")
        until(lambda: (info := Slurm(here).job(job)) and info.state == "CANCELLED", 30, "the job to leave")
        info = Slurm(here).job(job)
        assert info is not None and info.restarts == 0 and ended(run) == ["cancelled"]
    finally:
        call(python, "-c", LAB_OF_USER, f"{room}/lab", "stop")
        shutil.rmtree(room, ignore_errors=True)


def test_a_preemption_of_a_job_submitted_by_hand_is_recorded_as_one(cluster: Cluster) -> None:
    run = submit_by_hand(cluster, f"--output={cluster.runs}/slurm-%j.out")
    cluster.at_step(run, 10)
    cluster.slurm("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
    until(lambda: len(event_log.attempts(event_log.read(run.ledger))) > 1, 60, lambda: f"the second attempt\n{cluster.logs(run)}")
    assert ended(run)[0] == "preempted", cluster.logs(run)
    assert "PREEMPTION" in run.log(cluster.job_id(run), "batch").read_text()
    cluster.slurm("scancel", cluster.job_id(run))


def test_words_of_a_command_line_are_no_fields_of_the_job(cluster: Cluster) -> None:
    """Slurm 26.05 prints the words of sbatch behind the fields (SubmitLine), every version the job's name before them."""
    words = "JobState=CANCELLED Restarts=9 PreemptTime=2026-01-01T00:00:00 Comment=other EndTime=2026-01-01T00:00:00"
    job = cluster.slurm("sbatch", "--parsable", "--hold", "-o", "/dev/null", "-J", f"a {words}", "--comment=mine", "--wrap", f"echo {words}").strip()
    info = Slurm(cluster.env).job(job)
    cluster.slurm("scancel", job)
    assert info is not None
    assert (info.state, info.restarts, info.preempted_at, info.comment, info.name) == ("PENDING", 0, None, "mine", f"a {words}")


def ended(run: RunDir) -> list[str]:
    return [str(attempt.cause) for attempt in event_log.attempts(event_log.read(run.ledger))]


def kill_rank(run: RunDir, rank: int) -> None:
    pid = pid_of_rank(run, rank)
    assert pid is not None, f"no process of rank {rank} of {run.id}"
    os.kill(pid, signal.SIGKILL)
