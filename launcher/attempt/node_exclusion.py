"""Nodes that are to be left alone: checked before an attempt, remembered in the ledger, forgiven after a time."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.contract import Event, RankEnv
from jobs.run.rundir import RunDir
from launcher.attempt.preflight import Report, check, read_reports

_HOUR_S = 3600.0
# A hang may be the code's own fault, and the suspect any rank: a node is left out when it was suspected so often.
_HANGS = 2


def avoided(events: Iterable[Mapping[str, Any]], hours: float, now: float) -> list[str]:
    """Names of nodes that failed within the last `hours`. A clock that was set back does not make a fault last for ever."""
    hangs: Counter[str] = Counter()
    bad = set()
    for event in events:
        if event.get("event") != Event.BAD_NODE or not 0 <= abs(now - float(event["time"])) < hours * _HOUR_S:
            continue
        node = str(event.get("node", ""))
        if event.get("hang"):
            hangs[node] += 1
        else:
            bad.add(node)
    return sorted((bad | {node for node, count in hangs.items() if count >= _HANGS}) - {""})


def checked(run: RunDir, job: Job, attempt: int, nodes: list[str], environ: Mapping[str, str], *, under_slurm: bool) -> dict[str, str]:
    """What speaks against starting: node -> fault, and "" -> a fault of the disk. Empty when all is well.

    One process per node, by srun where there are several; here and now where this is the only one. A check that could not
    be made is no fault, unless other nodes could make it."""
    if job.preflight_s == 0:
        return {}
    gpus = 0 if job.device == "cpu" or job.gpu_request == "none" or not under_slurm else job.gpus_per_node
    if len(nodes) == 1:
        reports = {nodes[0]: check(run, attempt, nodes[0], gpus)}
        run.attempt(attempt).preflight(nodes[0]).write_text(json.dumps(asdict(reports[nodes[0]])))
    else:
        command = [
            "srun",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=0",
            "--wait=5",
            "--quiet",
            sys.executable,
            "-m",
            "launcher.attempt.preflight",
            str(gpus),
        ]
        # One process a node is asked for, whatever the job's own shape says.
        plain = {
            name: value
            for name, value in environ.items()
            if not name.startswith(("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION"))
        }
        try:
            subprocess.run(command, env={**os.environ, **plain}, timeout=job.preflight_s, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=False)
        except (OSError, subprocess.TimeoutExpired) as err:
            print(f"holdfast: the checks of the nodes did not end well: {err}", file=sys.stderr)
        reports = read_reports(run, attempt, nodes)
    bad = faults_of(reports, nodes)
    if not bad and under_slurm and (job.preflight_allreduce == "on" or (job.preflight_allreduce == "auto" and gpus and len(nodes) > 1)):
        return linked(run, job, attempt, nodes, environ)
    return bad


def linked(run: RunDir, job: Job, attempt: int, nodes: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What the all-reduce over all processes says against a node: node -> fault. It bounds itself to `preflight_s`.

    A slow network that cannot be laid at a node's door is said and no more: the attempt goes on, slowly or not."""
    python = job.node_python or sys.executable
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={job.world_size}",
        f"--ntasks-per-node={job.gpus_per_node}",
        "--kill-on-bad-exit=0",
        "--wait=5",
        "--quiet",
    ]
    command += [
        python,
        "-m",
        "train.distributed.allreduce_check",
        "--seconds",
        str(job.preflight_s),
        "--floor",
        str(job.preflight_gb_s),
        "--device",
        job.device,
    ]
    # Not the port of the training that comes after it.
    env = {**os.environ, **environ, RankEnv.MASTER_PORT: str(int(environ[RankEnv.MASTER_PORT]) + 1), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, env=env, timeout=job.preflight_s + 15, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except (OSError, subprocess.TimeoutExpired) as err:
        print(f"holdfast: the all-reduce before the start did not end well: {err}", file=sys.stderr)
    try:
        result: dict[str, Any] | None = safe_read.read_object(run.attempt(attempt).allreduce)
    except (OSError, ValueError):
        result = None
    bad, remark = judged(result, {node for node in nodes if run.attempt(attempt).joined(node).exists()}, nodes, job.preflight_gb_s)
    if remark:
        print(f"holdfast: {remark}", file=sys.stderr)
    return bad


def judged(result: Mapping[str, Any] | None, joined: set[str], nodes: list[str], floor: float) -> tuple[dict[str, str], str]:
    """(node -> fault, a remark) from what the all-reduce left behind: its result, if it came to one, and who took part."""
    if result is not None:
        if result["gb_s"] >= floor:
            return {}, ""
        said = f"{result['gb_s']:.2f} GB/s in an all-reduce over {result['ranks']} processes, at least {floor:g} are wanted (PREFLIGHT_GB_S)"
        return {node: f"is slow with all its neighbours: {said}" for node in result["slow"]}, "" if result["slow"] else f"WARNING: {said}; no node stands out"
    # A first all-reduce ends for all or for none, or for most while one hangs: only a minority can be at fault.
    away = [node for node in nodes if node not in joined]
    if away and 2 * len(away) < len(nodes):
        return {node: "did not take part in an all-reduce before the start" for node in away}, ""
    return {}, "WARNING: the all-reduce before the start came to no end; training will show whether the network works"


def faults_of(reports: Mapping[str, Report], nodes: list[str]) -> dict[str, str]:
    for report in reports.values():
        for remark in report.remarks:
            print(f"holdfast: {report.node}: {remark}", file=sys.stderr)
    bad = {node: "; ".join(report.node_faults) for node, report in reports.items() if report.node_faults}
    # Most of them must have answered: else it is the check that went wrong.
    if 2 * len(reports) > len(nodes):
        bad |= {node: "gave no answer to the checks before the start" for node in nodes if node not in reports}
    disk = [fault for report in reports.values() for fault in report.storage_faults]
    if disk and len([report for report in reports.values() if report.storage_faults]) == len(reports):
        return {**bad, "": disk[0]}
    # Where the others can write, it is this node's mount that is broken.
    return {**bad, **{node: "; ".join(report.storage_faults) for node, report in reports.items() if report.storage_faults and node not in bad}}
