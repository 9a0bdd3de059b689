"""A short form of `make chaos` on a real Slurm, and what judges a run from outside: watchdog, checks of nodes, doctor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import save_sweep
from conftest import REPOSITORY, Cluster, until

from jobs.config.settings import Job
from jobs.core.contract import STACKS_SIGNAL, RankEnv
from jobs.core.errors import SubmitError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.attempt import node_exclusion, preflight, rendezvous
from launcher.attempt.watchdog import Pace, Silence, Watchdog, read_place, suspects
from launcher.cluster.doctor import Finding, Need, Site, diagnose, of_node, policy_of, way_back
from launcher.local.executor import pids_of_ranks
from slurm.client import Slurm, parse_config
from slurm.environment import clean_environment
from tools import chaos
from tools.chaos import Stage
from train.distributed.allreduce_check import named_slow

# ------------------------------------------------------------------------------------------------------------- on the lab

SHORT = {"11": chaos.row_11, "18": chaos.row_18, "8": chaos.row_8, "23": chaos.row_23}


@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", SHORT)
def test_a_fault_of_the_table_is_survived_or_ends_the_run_for_its_own_reason(cluster: Cluster, number: str) -> None:
    row = SHORT[number](Stage(cluster))
    assert not chaos.bad(row), chaos.as_line(row)
    assert all(recorded == truth for truth, recorded in row.pairs), row.pairs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_anywhere_in_a_save_loses_nothing_that_fits_into_the_grace() -> None:
    row = chaos.swept(save_sweep.sweep([point for point in save_sweep.points() if point[0] in (0.2, 0.8)], workers=2))
    assert not chaos.bad(row), chaos.as_line(row)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_doctor_says_what_the_lab_does_and_drill_shows_it(cluster: Cluster) -> None:
    said = cluster.holdfast("doctor").stdout
    assert "SIGCONT+SIGTERM to every rank at once, SIGKILL after 20 s (GraceTime 0, KillWait 20)" in said
    assert "Slurm's own requeue" in said and "no accounting" in said
    answer = json.loads(cluster.holdfast("doctor", "--json").stdout)
    assert answer["ok"] and answer["preemption"]["mode"] == "REQUEUE"
    # Asked of a node by srun: its Python is this one, and the lab's GPUs are no real ones.
    assert answer["node"]["node"].startswith("node") and answer["node"]["executable"] == sys.executable and answer["node"]["libraries"]["torch"] in said
    broken = cluster.holdfast("doctor", "--no-node", "NODES=400", "GPUS_PER_NODE=1", "BATCH_SIZE=400", check=False)
    assert broken.returncode == 1 and "400 would wait for ever" in broken.stdout
    told = cluster.holdfast("drill", "NODES=2", "GPUS_PER_NODE=1").stdout
    assert "preempted it" in told and "ok: 0 steps lost" in told, told


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_script_of_ones_own_keeps_the_contract(cluster: Cluster) -> None:
    run = cluster.submit(NODES="2", GPUS_PER_NODE="1", ENTRY=str(REPOSITORY / "tests" / "support" / "scripts" / "own_script.py"))
    until(lambda: (run.path / "count.0").exists(), 40, "its first steps")
    Stage(cluster).preempt()
    attempts = cluster.finished(run, 60)
    assert [str(attempt.cause) for attempt in attempts] == ["preempted", "finished"], cluster.logs(run)
    assert "attempt 2 counted to 60" in run.log(attempts[1].job_id, 0).read_text()


# ------------------------------------------------------------------------------------------------------------- the watchdog


def test_limits_are_learnt_from_what_was_seen_and_never_below_the_least() -> None:
    pace = Pace()
    assert pace.limit_s("step", 600, 1800) == 1800
    pace.learn("step", 2.0)
    assert pace.limit_s("step", 600, 1800) == 600
    pace.learn("step", 200.0)
    pace.learn("step", 3.0)
    assert pace.limit_s("step", 600, 1800) == 1000
    pace.learn("first_step", 900.0)
    assert pace.limit_s("first_step", 600, 1800) == 4500
    assert pace.limit_s("start", 600, 1800) == 1800


def test_what_was_learnt_is_kept_and_forgotten_when_the_job_is_another_one(tmp_path: Path) -> None:
    pace = Pace("2x8 1b")
    pace.learn("evaluation", 70.0)
    pace.save(tmp_path / "pace.json")
    assert Pace.load(tmp_path / "pace.json", "2x8 1b").longest_s == {"evaluation": 70.0}
    assert Pace.load(tmp_path / "pace.json", "4x8 1b").longest_s == {}
    (tmp_path / "pace.json").write_text("{")
    assert Pace.load(tmp_path / "pace.json", "2x8 1b").longest_s == {}


def test_silence_counts_only_while_nothing_moves_and_learns_steps_and_sections() -> None:
    silence = Silence(Pace(), 10, 100)
    assert silence.look("first_step", 0, 5) and not silence.look("first_step", 0, 30)
    assert silence.seconds == 30 and silence.limit_s == 175.0 or silence.limit_s == 100
    for step in range(1, 20):
        assert silence.look("step", step, 1.5)
    assert silence.seconds == 0 and silence.pace.longest_s["step"] == 1.5
    assert silence.limit_s == 10
    assert silence.look("evaluation", 19, 1) and silence.limit_s == 100
    assert not silence.look("evaluation", 19, 60) and silence.look("step", 19, 1)
    assert silence.pace.longest_s["evaluation"] == 61
    assert silence.look("step", 59, 2) and silence.pace.longest_s["step"] == 1.5


def dump(*threads: list[str]) -> str:
    lines = []
    for number, frames in enumerate(threads, 1):
        lines.append(f"{'Current thread' if number == len(threads) else 'Thread'} 0x{number:016x} (most recent call first):")
        lines += [f'  File "/x/{frame.split(":")[0]}", line 4 in {frame.split(":")[1]}' for frame in frames]
        lines.append("")
    return "\n".join(lines) + "\n"


WAITS = dump(["threading.py:wait", "queue.py:get"], ["distributed_c10d.py:all_reduce", "loop.py:train"])
SLEEPS = dump(["faults.py:misbehave", "faults.py:batch", "feed.py:_run"], ["distributed_c10d.py:all_reduce", "loop.py:train"])


@pytest.mark.parametrize(
    ("stacks", "ranks", "why"),
    [
        ({0: WAITS, 1: SLEEPS}, (1,), "faults.py:misbehave"),
        ({0: WAITS, 1: ""}, (1,), "did not answer"),
        ({0: WAITS, 2: WAITS, 1: WAITS}, (3,), "did not answer"),
        ({0: WAITS, 1: WAITS}, (), "look alike"),
        ({}, (), "no rank answered"),
        ({0: SLEEPS + WAITS, 1: WAITS + SLEEPS}, (1,), "faults.py"),
        ({0: WAITS, 1: WAITS, 2: dump(["threading.py:wait"], ["queue.py:get", "feed.py:ready"])}, (2,), "somewhere else"),
    ],
)
def test_the_suspect_is_the_rank_that_keeps_the_others_waiting(stacks: dict[int, str], ranks: tuple[int, ...], why: str) -> None:
    found = suspects(stacks, max([2, *(rank + 1 for rank in stacks), *(rank + 1 for rank in ranks)]))
    assert found.ranks == ranks and why in found.why


def test_ranks_are_asked_at_the_first_limit_and_killed_at_the_second_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.attempt.watchdog._ANSWER_S", 0)
    run = RunDir(tmp_path / "a-1")
    attempt = run.attempt(1)
    attempt.path.mkdir(parents=True)
    told: list[str] = []
    dog = Watchdog(
        run,
        1,
        world=2,
        nodes=["n1", "n2"],
        per_node=1,
        pace_key="k",
        least_s=10,
        quiet_s=40,
        ask=lambda step: told.append(f"ask {step}"),
        kill=lambda step: told.append(f"kill {step}"),
    )
    assert read_place(run, 1) == ("start", -1, "")
    attempt.section.write_text("step 3".ljust(32))
    for step in range(20):
        attempt.progress.write_text(f"{step:<12d}")
        dog.tick(1.0)
    dog.tick(9)
    assert told == []
    dog.tick(2)
    assert told == ["ask 3"]
    attempt.progress.write_text("21")
    dog.tick(2)  # it goes on: nothing happened
    attempt.stacks(0).write_text(WAITS)
    attempt.stacks(1).write_text(SLEEPS)
    # A step of this run was seen to take 6.5 s, so that the limit is five times as long now.
    dog.tick(31)
    assert told == ["ask 3"]
    dog.tick(2)
    dog.tick(33)
    assert told == ["ask 3", "ask 3", "ask 3", "kill 3"]
    said = json.loads(attempt.hang.read_text())
    assert said["ranks"] == [1] and said["nodes"] == ["n2"] and "rank 1 on n2" in said["evidence"]
    assert json.loads(run.pace.read_text())["longest_s"]["step"] == 6.5
    dog.tick(100)
    assert told[-1] == "kill 3" and len(told) == 4


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_variables_of_the_flight_recorder_reach_every_rank(cluster: Cluster) -> None:
    run = cluster.submit(NODES="2", GPUS_PER_NODE="1", BATCH_SIZE="12", MAX_STEPS="100000", EVAL_EVERY="0")
    cluster.at_step(run, 1)
    try:
        for rank in range(2):
            (pid,) = pids_of_ranks(run, rank)
            variables = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
            assert variables["TORCH_FR_BUFFER_SIZE"] == "2000" and variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
            assert variables["TORCH_FR_DUMP_TEMP_FILE"] == variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{run.attempt(1).path}/nccl_trace_rank_"
            os.kill(pid, STACKS_SIGNAL)
            until(lambda rank=rank: run.attempt(1).collectives(rank).exists(), 30, "the flight recorder")  # type: ignore[misc]
            assert json.loads(run.attempt(1).collectives(rank).read_text())["entries"]
            assert "_listen" in run.attempt(1).stacks(rank).read_text()
    finally:
        cluster.slurm("scancel", cluster.job_id(run))


def test_threads_of_ours_are_no_suspects() -> None:
    places = {"train/metrics/goodput_timer.py": "_beat", "train/distributed/flight_recorder.py": "_listen", "train/metrics/tracking.py": "_work"}
    beat, listen, work = (f"/r/code/{file}:{name}" for file, name in places.items())
    for file, name in places.items():
        assert f"def {name}(" in (REPOSITORY / file).read_text(), "the watchdog knows the threads by these names"
    waits = ["distributed_c10d.py:all_reduce", "trainer.py:train"]
    ours = dump([beat], [listen], [work], waits)
    assert suspects({0: ours, 1: SLEEPS}, 2).ranks == (1,)
    # Only rank 0 has a clock; that alone makes no rank odd.
    assert suspects({0: ours, 1: dump([listen], waits), 2: dump(waits)}, 3).ranks == ()


def test_the_watchdog_costs_little_and_loads_no_library() -> None:
    code = "import sys, launcher.attempt.watchdog, launcher.attempt.preflight; print([m for m in ('pydantic', 'yaml', 'jinja2', 'torch', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- the nodes


def test_a_healthy_node_passes_quickly_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a-1")
    run.attempt(1).path.mkdir(parents=True)
    report = preflight.check(run, 1, "node1", gpus=0)
    assert not report.node_faults and not report.storage_faults
    assert report.seconds < 1 and report.facts["write_mb_s"] > 0
    assert list(run.attempt(1).path.iterdir()) == []


def test_missing_gpus_and_a_driver_that_hangs_speak_against_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "a-1")
    run.attempt(1).path.mkdir(parents=True)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/bash\necho '0, NVIDIA H100, 81559, 4, 0'; echo '1, NVIDIA H100, 81559, 4, 3'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    faults = preflight.check(run, 1, "node1", gpus=4).node_faults
    assert "2 of 4 GPUs are there" in faults[0] and "GPU 1 has 3 uncorrectable" in faults[1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "1 of 2 GPUs are there" in preflight.check(run, 1, "node1", gpus=2).node_faults[0]
    tool.write_text("#!/bin/bash\nexec sleep 9\n")
    monkeypatch.setattr(preflight, "_SMI_S", 0.2)
    assert "driver hangs" in preflight.check(run, 1, "node1", gpus=1).node_faults[0]


def test_a_gpu_that_the_kernels_log_speaks_of_is_a_fault_for_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins for nvidia-smi and dmesg: this machine has no GPU, and no test may write into the kernel's log.
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    run = RunDir(tmp_path / "a-1")
    run.attempt(1).path.mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()

    def stands_in(name: str, text: str) -> None:
        (tools / name).write_text(f"#!/bin/bash\ncat <<'EOF'\n{text}\nEOF\n")
        (tools / name).chmod(0o755)

    stands_in("nvidia-smi", "0, NVIDIA H100, 81559, 4, 0")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def faults(at: float, number: int) -> preflight.Report:
        stands_in(
            "dmesg", f"[{at:12.6f}] NVRM: Xid (PCI:0000:65:00): {number}, pid=77, name=python, GPU has fallen off the bus.\n[    1.0] usb 1-1: new device"
        )
        return preflight.check(run, 1, "node1", gpus=1)

    assert "GPU at 0000:65:00: Xid 79 (fallen off the bus)" in faults(uptime, 79).node_faults[0]
    # The job's own doing, and one that happened long ago (the clock of a machine that has just begun cannot show that).
    assert faults(uptime, 31).node_faults == []
    assert preflight.xids("[  100.000000] NVRM: Xid (PCI:0000:65:00): 79, x\n[  200.500000] NVRM: Xid (PCI:0000:65:00): 79, x", 8000.5) == [
        (79, "0000:65:00", 7800.0)
    ]
    monkeypatch.setattr(preflight, "_XID_FORGIVEN_S", -1.0)
    report = faults(uptime, 79)
    assert report.node_faults == [] and "Xid 79" in report.remarks[0]


def test_an_all_reduce_speaks_against_a_node_only_where_the_others_are_well() -> None:
    four = ["n1", "n2", "n3", "n4"]
    assert node_exclusion.judged({"gb_s": 8.0, "ranks": 32, "slow": []}, set(four), four, 1.0) == ({}, "")
    bad, remark = node_exclusion.judged({"gb_s": 0.2, "ranks": 32, "slow": ["n3"]}, set(four), four, 1.0)
    assert list(bad) == ["n3"] and "0.20 GB/s" in bad["n3"] and not remark
    bad, remark = node_exclusion.judged({"gb_s": 0.2, "ranks": 32, "slow": []}, set(four), four, 1.0)
    assert not bad and "no node stands out" in remark
    assert list(node_exclusion.judged(None, {"n1", "n2", "n4"}, four, 1.0)[0]) == ["n3"]
    assert node_exclusion.judged(None, set(), four, 1.0)[0] == {} == node_exclusion.judged(None, {"n1"}, ["n1", "n2"], 1.0)[0]
    assert named_slow({"n1": 9.0, "n2": 8.0, "n3": 0.1}, 1.0) == ["n3"]
    assert named_slow({"n1": 9.0, "n2": 0.1}, 1.0) == [] == named_slow({"n1": 0.2, "n2": 0.1, "n3": 9.0}, 1.0)


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_nodes_are_measured_by_an_all_reduce_before_they_train(cluster: Cluster) -> None:
    run = cluster.submit(
        NODES="3",
        GPUS_PER_NODE="1",
        BATCH_SIZE="12",
        MAX_STEPS="3",
        EVAL_EVERY="0",
        EVAL_SAMPLES="8",
        PREFLIGHT_ALLREDUCE="on",
        PREFLIGHT_GB_S="1000",
        PREFLIGHT_S="90",
    )
    cluster.finished(run)
    result = json.loads(run.attempt(1).allreduce.read_text())
    assert result["ranks"] == 3 and result["backend"] == "gloo" and 0 < result["gb_s"] < 1000 and result["slow"] == []
    assert {path.name for path in run.attempt(1).path.glob("joined.*")} == {
        f"joined.{node}" for node in event_log.attempts(event_log.read(run.ledger))[0].nodes
    }
    # No network is that fast: it is said, nobody is blamed, and training goes on.
    assert "at least 1000 are wanted" in run.log(cluster.job_id(run), "batch").read_text()


def test_a_disk_that_refuses_speaks_against_no_node_unless_only_one_meets_it() -> None:
    good, bad = preflight.Report("n1"), preflight.Report("n2", storage_faults=["cannot be written"])
    assert node_exclusion.faults_of({"n1": good, "n2": bad}, ["n1", "n2"]) == {"n2": "cannot be written"}
    assert node_exclusion.faults_of({"n2": bad}, ["n2"]) == {"": "cannot be written"}
    assert node_exclusion.faults_of({"n1": good, "n2": good}, ["n1", "n2", "n3"]) == {"n3": "gave no answer to the checks before the start"}
    assert node_exclusion.faults_of({"n1": good}, ["n1", "n2"]) == {}
    assert node_exclusion.faults_of({}, ["n1", "n2"]) == {}


def test_bad_nodes_are_avoided_for_a_time_and_a_suspect_of_a_hang_from_the_second_time_on() -> None:
    def event(node: str, time: float, **more: object) -> dict[str, object]:
        return {"event": "bad_node", "attempt": 1, "job_id": "7", "node": node, "time": time, **more}

    day = 86_400.0
    lines = [event("n1", 0.0), event("n2", 2 * day), event("n3", 2 * day, hang=True), event("n4", 2 * day, hang=True), event("n4", 2 * day, hang=True)]
    assert node_exclusion.avoided(lines, 24, 2 * day + 60) == ["n2", "n4"]
    assert node_exclusion.avoided(lines, 24, 9 * day) == []
    assert node_exclusion.avoided(lines, 24, -9 * day) == []


# ------------------------------------------------------------------------------------------------------------- rendezvous


def test_ports_differ_between_jobs_and_restarts_and_lie_outside_what_the_kernel_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {rendezvous.free_port(Path(run), job, restarts) for run in ("/a/runs/x", "/b/runs/x") for job in ("7", "8", "9_1") for restarts in range(3)}
    assert len(ports) == 18  # also for one number in two clusters
    monkeypatch.setattr(rendezvous, "_ephemeral", lambda: (16_000, 29_000))
    assert all(29_000 < rendezvous.free_port(Path("/runs/x"), str(job), 0) < 30_000 for job in range(20))


class Nodes(Slurm):
    def __init__(self, address: str):
        super().__init__({})
        self.address = address

    def run(self, *command: str, **_: object) -> str:
        if not self.address:
            raise SubmitError("scontrol is not on this machine")
        return f"NodeName=gpu7 NodeAddr={self.address} State=IDLE"


@pytest.mark.parametrize(
    ("known", "address", "expected"),
    [
        ({"gpu7": "10.0.0.7"}, "gpu7", "gpu7"),
        ({"10.1.1.7": "10.1.1.7"}, "10.1.1.7", "10.1.1.7"),  # the name does not resolve
        ({"gpu7": "127.0.1.1", "10.1.1.7": "10.1.1.7"}, "10.1.1.7", "10.1.1.7"),  # Debian's line for the machine's own name
        ({"gpu7": "127.0.0.17", "127.0.0.1": "127.0.0.1"}, "127.0.0.1", "gpu7"),  # the lab
        ({}, "", "192.0.2.77"),
    ],
)
def test_the_meeting_place_is_one_that_the_other_nodes_can_reach(monkeypatch: pytest.MonkeyPatch, known: dict[str, str], address: str, expected: str) -> None:
    monkeypatch.setattr(rendezvous, "_resolve", lambda name: [known[name]] if name in known else [])
    monkeypatch.setattr(rendezvous, "_own_address", lambda: "192.0.2.77")
    assert rendezvous.address_of("gpu7", Nodes(address)) == expected


def test_what_an_outer_job_left_in_the_environment_is_gone() -> None:
    outer = {
        name: "x"
        for name in ("SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SBATCH_EXCLUSIVE", "MASTER_ADDR", "RANK", RankEnv.ATTEMPT, "HOLDFAST_STARTED", "PMIX_RANK")
    }
    assert clean_environment({**outer, "SLURM_CONF": "/etc/slurm.conf", "HOLDFAST_SITE": "lab", "LANG": "C"}) == {
        "SLURM_CONF": "/etc/slurm.conf",
        "HOLDFAST_SITE": "lab",
        "LANG": "C",
    }


# ------------------------------------------------------------------------------------------------------------- the doctor

CONFIG = parse_config(
    """Configuration data as of 2026-11-21T23:42:21
AccountingStorageType   = accounting_storage/slurmdbd
JobRequeue              = 1
KillWait                = 30 sec
PreemptExemptTime       = 00:00:00
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/cgroup
SlurmctldParameters     = (null)
SlurmdTimeout           = 300 sec
SLURM_VERSION           = 23.11.4
TaskPlugin              = task/affinity,task/cgroup
"""
)
PARTITION = {
    "PartitionName": "preempt",
    "PreemptMode": "REQUEUE",
    "GraceTime": "60",
    "State": "UP",
    "TotalNodes": "64",
    "MaxTime": "2-00:00:00",
    "Default": "YES",
}
ALL = frozenset({"scontrol", "sacct", "sacctmgr"})


def job(**settings: object) -> Job:
    return Job(job_name="a", **{"batch_size": 32, "time_limit": 120, **settings})  # type: ignore[arg-type]


def site(
    config: dict[str, str] | None = None, partition: dict[str, str] | None = None, programs: frozenset[str] = ALL, qos: dict[str, str] | None = None
) -> Site:
    return Site({**CONFIG, **(config or {})}, {**PARTITION, **(partition or {})}, qos or {}, programs)


def said(at: Site, need: Need | None = None, **settings: object) -> str:
    return "\n".join(f"{finding.level} {finding.topic} {finding.text}" for finding in diagnose(at, job(**settings), need))


def test_a_well_configured_site_has_nothing_to_be_warned_of() -> None:
    text = said(site(), Need(0.9, 4.1, "gpt-k3f9"))
    assert "fault" not in text and "warning " not in text
    assert "SIGCONT+SIGTERM to every rank at once, SIGKILL after 90 s (GraceTime 60, KillWait 30)" in text
    assert "1 step (0.9 s) + 1 save (4.1 s, run gpt-k3f9) = 5.0 s of 90 s: ok" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"SlurmctldParameters": "preempt_send_user_signal"}}, "SIGUSR2 to every rank at once, SIGTERM after 60 s"),
        ({"partition": {"PreemptMode": "CANCEL"}}, "holdfast's requeue (PreemptMode=CANCEL"),
        ({"partition": {"PreemptMode": "OFF"}}, "are not preempted"),
        ({"config": {"PreemptType": "preempt/none"}}, "are not preempted"),
        ({"partition": {"PreemptMode": "SUSPEND"}}, "SIGTSTP"),
        ({"config": {"PreemptType": "preempt/qos"}, "qos": {"PreemptMode": "cancel", "GraceTime": "00:02:00"}}, "GraceTime 120"),
        ({"config": {"AccountingStorageType": "accounting_storage/none"}}, "warning no accounting"),
        ({"programs": frozenset({"sacct"})}, "warning scontrol"),
        ({"partition": {"GraceTime": "0"}}, "note GraceTime 0"),
        ({"config": {"ProctrackType": "proctrack/pgid"}}, "warning proctrack/pgid"),
        ({"partition": {"State": "DOWN"}}, "fault partition"),
        ({"partition": {"MaxTime": "01:00:00"}}, "fault time limit"),
    ],
)
def test_what_is_odd_about_a_site_is_said_in_words(changed: dict[str, object], words: str) -> None:
    assert words in said(site(**changed))  # type: ignore[arg-type]


def test_a_save_that_does_not_fit_into_the_warning_is_a_fault() -> None:
    text = said(site(partition={"GraceTime": "0"}), Need(2.0, 40.0, "a"))
    assert "fault you need" in text and "of 30 s: too long" in text
    assert "set STOP_LEAD_S" in said(site(), Need(2.0, 40.0, "a"), stop_lead_s=20)
    assert "just enough" in said(site(), Need(2.0, 60.0, "a"))


def test_what_a_node_has_is_said_and_what_it_lacks_is_a_fault() -> None:
    node = {
        "node": "gpu7",
        "python": "3.11.7",
        "executable": "/opt/python",
        "libraries": {"torch": "2.11.0", "accelerate": "1.15.0"},
        "gpus": ["NVIDIA H100, 81559 MiB"] * 8,
        "driver": "550.54",
    }
    text = "\n".join(f"{found.level} {found.text}" for found in of_node(node, "", job(), {"torch": "2.13.0", "accelerate": "1.15.0"}))
    assert (
        "ok gpu7: 8 x NVIDIA H100, 81559 MiB, driver 550.54" in text
        and "warning torch 2.13.0 here, 2.11.0 there" in text
        and "accelerate 1.15.0 here" not in text
    )
    (bare, _, fault) = of_node({**node, "libraries": {}, "gpus": [], "driver": "nvidia-smi is not there"}, "", job(), {})
    assert "no GPU (nvidia-smi is not there)" in bare.text and fault.level == "fault" and "NODE_PYTHON" in fault.text
    assert of_node(None, "no node could be asked: busy", job(), {})[0] == Finding("note", "a node", "no node could be asked: busy")


def test_the_way_back_is_chosen_from_the_clusters_own_configuration() -> None:
    assert "Slurm's own" in way_back(site())
    assert "scontrol is missing" in way_back(site(programs=frozenset()))
    assert policy_of(site()).warning_s == 90


def test_a_controller_that_does_not_answer_is_asked_again_and_one_that_refuses_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.client._RETRY_S", 0.01)
    answers = ["scontrol: Unable to contact slurm controller (connect failure)"] * 3
    asked: list[float] = []

    def ask() -> str:
        asked.append(time.monotonic())
        if answers:
            raise SubmitError(answers.pop())
        return "yes"

    assert Slurm({}).patiently(ask, 5) == "yes" and len(asked) == 4
    answers[:] = ["scontrol: Access denied"]
    with pytest.raises(SubmitError, match="denied"):
        Slurm({}).patiently(ask, 5)
    answers[:] = ["Unable to contact slurm controller"] * 1000
    with pytest.raises(SubmitError, match="contact"):
        Slurm({}).patiently(ask, 0.1)
