"""Ending a lab: its jobs, its daemons in their order, and whatever else carries its marks."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from jobs.core.errors import LabError
from slurm.devcluster import proc, slurm_conf
from slurm.devcluster.state_dir import LabDir


def halt(lab: LabDir, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    if lab.process("slurmctld"):
        _cancel_jobs(lab, min(2.0, timeout_s / 4))
    found = proc.of_lab(lab.root)
    last = ["slurmdbd", "mariadbd", "munged"]  # in this order: each one needs the next to write its last words
    nodes = [p for name, group in found.daemons.items() if name not in ("slurmctld", *last) for p in group]
    # A batch script that traps SIGTERM and loops outlives its slurmstepd and its cluster, and is found by its
    # environment. Once more after the slurmds, in case one was just starting a step.
    proc.kill_all(lambda: _job_processes(lab), 5)
    proc.terminate(found.daemons.get("slurmctld", []), 5)
    # A slurmd has nothing to write, and one that was ending a job would sit out KillWait first.
    proc.terminate(nodes, 0.5)
    proc.kill_all(lambda: _job_processes(lab), 5)
    for name in last:
        proc.terminate(found.daemons.get(name, []), 8)
    # The net: whatever else carries our marks, for example what a dying daemon forked.
    left = proc.kill_all(lambda: proc.of_lab(lab.root).all(), max(2.0, end - time.monotonic()))
    if left:
        names = ", ".join(f"{p.name}({p.pid})" for p in left)
        raise LabError(f"lab in {lab.root}: still running after SIGKILL: {names}")
    if lab.config.memory_cgroup:
        _remove_cgroups(lab)
    for name in lab.daemon_names:
        lab.pid_file(name).unlink(missing_ok=True)
    (lab.root / "run" / "munge.sock").unlink(missing_ok=True)


def _remove_cgroups(lab: LabDir) -> None:
    """The folders that its slurmds made among the kernel's memory limits; one that is still in use stays."""
    for name in lab.config.node_names:
        for folder, _, _ in os.walk(slurm_conf.MEMORY_CGROUPS / f"slurm_{name}", topdown=False):
            with suppress(OSError):
                os.rmdir(folder)


def _job_processes(lab: LabDir) -> list[proc.Process]:
    return [p for group in proc.of_lab(lab.root).jobs.values() for p in group]


def _cancel_jobs(lab: LabDir, wait_s: float) -> None:
    with suppress(LabError):  # a controller that hangs must not keep the rest alive
        for partition in ("low", "high"):  # else the next one in the queue starts
            lab.ask("scontrol", "update", f"partitionname={partition}", "state=down", timeout_s=3)
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            lab.ask("scancel", "--quiet", f"--state={state}", timeout_s=3)
        proc.wait_until(lambda: not lab.ask("squeue", "--noheader", timeout_s=3).strip(), wait_s, 0.05)
