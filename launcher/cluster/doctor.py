"""`holdfast doctor`: what this cluster will do to a run, said before it does it.

Everything is read from `scontrol show config`, the partition, the QOS where there is accounting, and the newest run's own
figures. `diagnose` is pure: text of Slurm in, findings out.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.config.types import format_minutes, parse_minutes
from jobs.core import safe_read
from jobs.core.contract import Event, Exit
from jobs.core.errors import HoldfastError, SubmitError
from jobs.run import event_log, store
from launcher.cluster import node_info
from slurm.client import Slurm

# Slurm sends the warning up to so many seconds before the time that was asked for.
_EARLY_S = 60
# How long a node is waited for that could say what it has.
_NODE_WAIT_S = 15


@dataclass(frozen=True)
class Finding:
    """One line. `level` is ok, note, warning or fault; a fault makes the command end with 1."""

    level: str
    topic: str
    text: str


@dataclass(frozen=True)
class Site:
    """What `diagnose` looks at: keys and values as Slurm prints them."""

    config: Mapping[str, str]
    partition: Mapping[str, str]
    qos: Mapping[str, str]
    programs: frozenset[str]


@dataclass(frozen=True)
class Need:
    """Seconds of one step and one save, and the run in which they were measured; None where nothing was."""

    step_s: float
    save_s: float
    run: str


@dataclass(frozen=True)
class Policy:
    """What a preemption is like: mode (REQUEUE, CANCEL, SUSPEND, OFF), the seconds between the first signal and SIGKILL, and
    the signal that comes first."""

    mode: str
    grace_s: int
    kill_wait_s: int
    user_signal: bool

    @property
    def warning_s(self) -> int:
        return self.grace_s + self.kill_wait_s


def policy_of(site: Site) -> Policy:
    """Preemption of one partition, by partition or by QOS."""
    config, kind = site.config, site.config.get("PreemptType", "preempt/none")
    of = site.qos if "qos" in kind else site.partition
    mode = of.get("PreemptMode", "").upper()
    if kind.endswith("none"):
        mode = "OFF"
    elif not mode or mode in ("CLUSTER", "GANG"):
        mode = next((word for word in config.get("PreemptMode", "OFF").upper().split(",") if word != "GANG"), "OFF")
    grace = _seconds(of.get("GraceTime", "0"))
    return Policy(mode, grace, _seconds(config.get("KillWait", "30")), "preempt_send_user_signal" in config.get("SlurmctldParameters", ""))


def way_back(site: Site) -> str:
    """How an interrupted run comes back, in one phrase; printed at submit as well."""
    if "scontrol" not in site.programs:
        return "Slurm's own requeue, else a job that waits for the end of this one (scontrol is missing here)"
    mode = policy_of(site).mode
    if mode == "CANCEL":
        return "holdfast's requeue (PreemptMode=CANCEL: Slurm itself would only end the job)"
    if mode == "SUSPEND":
        return "the same processes go on when the nodes are free again (PreemptMode=SUSPEND); holdfast's requeue at the time limit"
    if mode == "OFF":
        return "holdfast's requeue, at the time limit; nobody is preempted here"
    return "Slurm's own requeue; holdfast's if that is missing, and at the time limit"


def diagnose(site: Site, job: Job, need: Need | None) -> list[Finding]:
    """The findings, in the order in which they are read."""
    policy, name = policy_of(site), site.partition.get("PartitionName", "?")
    found = [Finding("ok", "at preemption", _at_preemption(policy, name))]
    lead = job.stop_lead_s
    found.append(Finding("ok", "at time limit", f"SIGUSR2 to every rank {lead}-{lead + _EARLY_S} s before; limit {format_minutes(job.time_limit)}"))
    found.append(_enough(policy, lead, need))
    found.append(Finding("ok", "comes back by", way_back(site)))
    found += _limits(site, job)
    found += _misconfigured(site, policy, job)
    return found


def _at_preemption(policy: Policy, partition: str) -> str:
    if policy.mode == "OFF":
        return f"nobody: jobs of partition {partition} are not preempted"
    if policy.mode == "SUSPEND":
        return "SIGTSTP to all processes, later SIGCONT: nothing is lost, and no signal comes that could be acted upon"
    kill = f"SIGKILL after {policy.warning_s} s (GraceTime {policy.grace_s}, KillWait {policy.kill_wait_s})"
    if policy.user_signal and policy.grace_s:
        return f"SIGUSR2 to every rank at once, SIGTERM after {policy.grace_s} s, {kill}"
    return f"SIGCONT+SIGTERM to every rank at once, {kill}"


def _enough(policy: Policy, lead_s: int, need: Need | None) -> Finding:
    shortest = min([lead_s, *([policy.warning_s] if policy.mode in ("REQUEUE", "CANCEL") else [])])
    if need is None:
        return Finding("note", "you need", f"1 step + 1 save within {shortest} s; no run has measured them yet")
    total = need.step_s + need.save_s
    text = f"1 step ({_s(need.step_s)}) + 1 save ({_s(need.save_s)}, run {need.run}) = {_s(total)} of {shortest} s"
    if total > shortest:
        where = "STOP_LEAD_S" if shortest == lead_s else "a shorter CHECKPOINT_EVERY, since the grace is the site's"
        return Finding("fault", "you need", f"{text}: too long. A stop would lose work since the last checkpoint; set {where}")
    return Finding("ok", "you need", f"{text}: ok" if total < 0.5 * shortest else f"{text}: just enough")


def _limits(site: Site, job: Job) -> list[Finding]:
    found: list[Finding] = []
    partition = site.partition
    name = partition.get("PartitionName", "?")
    if partition.get("State", "UP") != "UP":
        found.append(Finding("fault", "partition", f"{name} is {partition['State']}: nothing starts there now"))
    nodes = partition.get("TotalNodes", "")
    if nodes.isdigit() and job.nodes > int(nodes):
        found.append(Finding("fault", "partition", f"{name} has {nodes} nodes, NODES={job.nodes} would wait for ever"))
    try:
        longest = parse_minutes(partition.get("MaxTime", "UNLIMITED"))
        if job.time_limit > longest:
            found.append(Finding("fault", "time limit", f"{format_minutes(job.time_limit)} asked for, {name} allows {format_minutes(longest)} (MaxTime)"))
    except ValueError:  # UNLIMITED
        pass
    if job.stop_lead_s + _EARLY_S >= job.time_limit * 60:
        found.append(
            Finding(
                "warning",
                "time limit",
                f"the warning of {job.stop_lead_s} s may come {job.stop_lead_s + _EARLY_S} s before the end, which is all of TIME_LIMIT",
            )
        )
    return found


def _misconfigured(site: Site, policy: Policy, job: Job) -> list[Finding]:
    config = site.config
    found: list[Finding] = []
    warn = found.append
    if "scontrol" not in site.programs:
        warn(Finding("warning", "scontrol", "is not on this machine; if it is missing on the nodes as well, runs come back as new jobs"))
    if config.get("AccountingStorageType", "").endswith("none") or not config.get("AccountingStorageType"):
        warn(
            Finding("warning", "no accounting", "(sacct): causes are read from scontrol, the logs and the run itself; out of memory may be reported as killed")
        )
    elif "sacct" not in site.programs:
        warn(Finding("warning", "sacct", "is not on this machine, although the cluster keeps accounts"))
    if policy.mode in ("REQUEUE", "CANCEL") and policy.grace_s == 0:
        warn(Finding("note", "GraceTime 0", f"all the warning at a preemption is KillWait, {policy.kill_wait_s} s"))
    if policy.mode == "REQUEUE" and policy.grace_s and policy.grace_s < 11:
        warn(Finding("note", "GraceTime", f"{policy.grace_s} s was seen to be rounded up to about 11 s by Slurm 22.05"))
    if policy.user_signal and not policy.grace_s:
        warn(Finding("note", "user signal", "preempt_send_user_signal gives no time of its own while GraceTime is 0"))
    if config.get("JobRequeue") == "0":
        warn(Finding("note", "JobRequeue 0", "jobs are not requeued unless they ask for it; the script does (--requeue)"))
    proctrack = config.get("ProctrackType", "")
    if proctrack.endswith("pgid"):
        warn(Finding("warning", "proctrack/pgid", "a data worker that starts a session of its own outlives its job and keeps the GPU"))
    if not config.get("TaskPlugin", "").count("cgroup"):
        warn(Finding("note", "no task/cgroup", "memory is not confined: a job that takes too much may be killed by the node itself, without a word"))
    if (timeout := _seconds(config.get("SlurmdTimeout", "0"))) > 600:
        warn(Finding("note", "SlurmdTimeout", f"a dead node is noticed after {timeout} s; its GPUs and the others wait as long"))
    if _seconds(config.get("PreemptExemptTime", "0")):
        warn(Finding("note", "exempt", f"nobody is preempted in the first {config['PreemptExemptTime']} of a job"))
    if job.preflight_s == 0:
        warn(Finding("note", "PREFLIGHT_S 0", "nodes are not checked before an attempt"))
    return found


def measured(runs_dir: Path) -> Need | None:
    """Longest step and save of the newest run that has both."""
    for run in reversed(store.all_runs(runs_dir)):
        try:
            saves = [float(event["seconds"]) for event in event_log.read(run.ledger) if event["event"] == Event.CHECKPOINT and "seconds" in event]
            step = float(safe_read.read_object(run.pace, finite=True)["longest_s"]["step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if saves:
            return Need(step, max(saves), run.id)
    return None


def read_site(slurm: Slurm, job: Job) -> Site:
    """Asks Slurm. Raises SubmitError when slurmctld does not answer or the partition does not exist."""
    config = slurm.config()
    partitions = slurm.partitions()
    wanted = (job.partition or "").partition(",")[0]
    chosen = [p for p in partitions if p.get("PartitionName") == wanted] if wanted else [p for p in partitions if p.get("Default") == "YES"]
    if not chosen:
        known = ", ".join(p.get("PartitionName", "?") for p in partitions)
        raise SubmitError(
            f"PARTITION={wanted} does not exist here; there are {known}" if wanted else f"no partition is the default; choose one of {known} with PARTITION="
        )
    programs = frozenset(name for name in ("scontrol", "sacct", "sacctmgr", "squeue", "scancel") if shutil.which(name))
    return Site(config, chosen[0], _qos(slurm, job, chosen[0], config), programs)


def _qos(slurm: Slurm, job: Job, partition: Mapping[str, str], config: Mapping[str, str]) -> dict[str, str]:
    wanted = job.qos or (partition.get("QoS", "N/A") if partition.get("QoS", "N/A") != "N/A" else "normal")
    if "qos" not in config.get("PreemptType", ""):
        return {}
    try:
        for line in slurm.run("sacctmgr", "-nP", "show", "qos", "format=name,gracetime,preemptmode").splitlines():
            name, grace, mode = (line.split("|") + ["", ""])[:3]
            if name == wanted:
                return {"Name": name, "GraceTime": grace, "PreemptMode": mode}
    except SubmitError:
        pass
    return {}


def ask_a_node(slurm: Slurm, job: Job, executable: str, wait_s: int = _NODE_WAIT_S) -> tuple[dict[str, Any] | None, str]:
    """What one node of the partition has (`launcher.cluster.node_info`), by a short srun; or None and the reason why there is no answer."""
    gpus = {"gpus-per-node": ["--gpus-per-node=1"], "gres": ["--gres=gpu:1"]}.get(job.gpu_request if job.device != "cpu" else "none", [])
    where = [f"--{name}={getattr(job, name)}" for name in ("partition", "account", "qos", "constraint", "reservation") if getattr(job, name)]
    text = (Path(__file__).with_name("node_info.py")).read_text()
    command = [
        "srun",
        "--nodes=1",
        "--ntasks=1",
        f"--immediate={wait_s}",
        "--time=2",
        "--quiet",
        "--job-name=holdfast-doctor",
        *where,
        *gpus,
        job.node_python or executable,
        "-P",
        "-c",
        text,
    ]
    try:
        said = slurm.run(*command)
        found = json.loads(said.strip().splitlines()[-1])
    except SubmitError as err:
        return None, f"no node could be asked: {err}"
    except (ValueError, IndexError):
        return None, f"a node answered something else: {' '.join(said.split())[:120] or 'nothing'}"
    return found, ""


def of_node(found: Mapping[str, Any] | None, why_not: str, job: Job, here: Mapping[str, str]) -> list[Finding]:
    """The findings about one node; `here` are the versions of the libraries on this machine."""
    if found is None:
        return [Finding("note", "a node", why_not)]
    libraries = dict(found.get("libraries", {}))
    gpus = list(found.get("gpus", []))
    has = f"{len(gpus)} x {gpus[0]}, driver {found['driver']}" if gpus else f"no GPU ({found.get('driver') or 'none asked for'})"
    findings = [
        Finding("ok", "a node", f"{found.get('node')}: {has}"),
        Finding(
            "ok", "its Python", f"{found.get('python')} ({found.get('executable')}); " + ", ".join(f"{name} {version}" for name, version in libraries.items())
        ),
    ]
    if job.container_image:
        return [*findings, Finding("note", "container", "training runs in its own image; these are the versions outside of it")]
    missing = [name for name in ("torch", "accelerate") if name not in libraries]
    if missing:
        findings.append(
            Finding(
                "fault",
                "node",
                f"{' and '.join(missing)} cannot be found by {found.get('executable')}; set NODE_PYTHON to the Python of an environment that every node sees",
            )
        )
    other = [f"{name} {here[name]} here, {libraries[name]} there" for name in libraries if name in here and here[name] != libraries[name]]
    if other:
        findings.append(Finding("warning", "versions", "; ".join(other)))
    return findings


def examine(words: Sequence[str], environ: Mapping[str, str], cwd: Path, as_json: bool, ask_node: bool = True) -> int:
    """The command. Returns 0, or 1 when there is a fault."""
    from launcher.submission.create_run import resolve_here

    if not Slurm.available():
        raise SubmitError("sbatch and srun are not on this machine; is this a login node of the cluster? A private one for trying: holdfast lab start")
    job = resolve_here(words, environ, cwd).job
    slurm = Slurm(environ)
    site = read_site(slurm, job)
    findings = diagnose(site, job, measured(cwd / job.runs_dir))
    node, why_not = ask_a_node(slurm, job, sys.executable) if ask_node else (None, "not asked (--no-node)")
    findings += of_node(node, why_not, job, dict(node_info.facts()["libraries"]))  # type: ignore[call-overload]
    failed = any(finding.level == "fault" for finding in findings)
    if as_json:
        policy = asdict(policy_of(site)) | {"warning_s": policy_of(site).warning_s}
        print(
            json.dumps(
                {
                    "cluster": site.config.get("ClusterName", ""),
                    "version": site.config.get("SLURM_VERSION", ""),
                    "partition": site.partition.get("PartitionName", ""),
                    "preemption": policy,
                    "node": node,
                    "findings": [asdict(f) for f in findings],
                    "ok": not failed,
                },
                indent=1,
            )
        )
        return Exit.FAILED if failed else Exit.DONE
    print(f"Slurm {site.config.get('SLURM_VERSION', '?')} on {site.config.get('ClusterName', '?')}, partition {site.partition.get('PartitionName', '?')}")
    for finding in findings:
        topic = finding.topic if finding.level == "ok" else f"{finding.level}: {finding.topic}" if finding.topic != "you need" else "you need"
        print(f"  {topic:<16}{finding.text}" if len(topic) < 16 else f"  {topic}  {finding.text}")
    print("Fix what is called a fault first." if failed else "Try it for real: holdfast drill")
    return Exit.FAILED if failed else Exit.DONE


def said_at_submit(slurm: Slurm, job: Job) -> str:
    """One line about the time limit and preemption, for `submit`; what is known without Slurm when it does not answer."""
    start = f"{format_minutes(job.time_limit)}, warned {job.stop_lead_s} s before"
    try:
        site = read_site(slurm, job)
    except HoldfastError:
        return f"{start}; requeued by Slurm or by holdfast, resumed from the last checkpoint"
    policy = policy_of(site)
    how = "not preempted" if policy.mode == "OFF" else f"{policy.mode}, {policy.warning_s} s from signal to kill"
    return f"{start}; partition {site.partition.get('PartitionName', '?')}: {how} -> {way_back(site)}"


def _seconds(text: str) -> int:
    """Seconds of Slurm's `30`, `30 sec`, `00:05:00` or `1-00:00:00`; 0 for UNLIMITED, NONE and what is no time."""
    word = text.split()[0] if text.split() else "0"
    days, dash, clock = word.rpartition("-")
    try:
        total = 0
        for part in clock.split(":"):
            total = total * 60 + int(part)
        return total + (int(days) * 86_400 if dash and days else 0)
    except ValueError:
        return 0


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2f} s"


def node_facts(report: Mapping[str, Any]) -> str:
    """What a node said of itself before an attempt, in one line."""
    facts = dict(report.get("facts", {}))
    gpus = [value for name, value in sorted(facts.items()) if name.startswith("gpu")]
    parts = [
        f"{len(gpus)} x {gpus[0]}" if gpus else "",
        f"{facts['memory_free_gb']:.0f} GB memory free" if "memory_free_gb" in facts else "",
        f"run directory {facts['write_mb_s']:.0f} MB/s" if "write_mb_s" in facts else "",
    ]
    return ", ".join(filter(None, parts))
