"""What is checked on every node before an attempt: the GPUs that were asked for, memory, the run directory, the clock.

    python -m launcher.attempt.preflight GPUS      one per node, by srun; writes attempts/<n>/preflight.<node>.json

A node that fails is written into the ledger and left out of the next attempt. A disk that fails is nobody's node.
Only the standard library is imported: it runs on every node of every attempt.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.contract import RankEnv
from jobs.run.rundir import RunDir

_PROBE_BYTES = 4 * 2**20
# Slower than this, a checkpoint of some GB takes longer than any warning that Slurm gives.
_LEAST_WRITE_MB_S = 1.0
_LEAST_MEMORY_GB = 0.5
_LEAST_DISK_GB = 0.05
_CLOCK_S = 60.0
_SMI_S = 20.0
_DMESG_S = 5.0
# `[ 1234.567] NVRM: Xid (PCI:0000:65:00): 79, pid=..., GPU has fallen off the bus.`
_XID = re.compile(r"^\[\s*(\d+\.\d+)\] NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", re.M)
# Those that speak of the hardware; 13, 31, 43, 45 and the like are what a program did.
_XID_HARDWARE = {
    48: "double bit memory error", 62: "internal micro-controller halted", 64: "row of memory could not be remapped", 74: "NVLink error", 79: "fallen off the bus",
    92: "many single bit memory errors", 95: "uncontained memory error", 119: "GSP does not answer", 120: "GSP error", 136: "link training failed", 140: "unrecovered memory error", 143: "GPU failed to initialise",
}  # fmt: skip
_XID_FORGIVEN_S = 3600.0


@dataclass
class Report:
    """What one node said. `node_faults` speak against the node, `storage_faults` against the disk, `remarks` against nobody."""

    node: str
    node_faults: list[str] = field(default_factory=list)
    storage_faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    seconds: float = 0.0


def check(run: RunDir, attempt: int, node: str, gpus: int) -> Report:
    """Looks at this machine; `gpus` is how many this node must show, 0 for training on the CPU. Takes well under a second
    where there are no GPUs."""
    begun = time.monotonic()
    report = Report(node)
    if gpus:
        _gpus(report, gpus)
        _kernel_log(report)
    _memory(report)
    _disk(report, run, attempt)
    report.seconds = round(time.monotonic() - begun, 3)
    return report


def read_reports(run: RunDir, attempt: int, nodes: list[str]) -> dict[str, Report]:
    """The reports that arrived, by node."""
    found = {}
    for node in nodes:
        with suppress(OSError, ValueError, TypeError):
            found[node] = Report(**safe_read.read_object(run.attempt(attempt).preflight(node)))
    return found


def _gpus(report: Report, wanted: int) -> None:
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, errors="replace")
    except FileNotFoundError:
        seen = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())
        if seen < wanted:
            report.node_faults.append(f"{seen} of {wanted} GPUs are there")
        return
    except subprocess.TimeoutExpired:
        report.node_faults.append(f"nvidia-smi did not answer within {_SMI_S:.0f} s: the driver hangs")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 4]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = min(len(rows), len([part for part in visible.split(",") if part.strip()])) if visible is not None else len(rows)
    if done.returncode or seen < wanted:
        said = " ".join((done.stderr or done.stdout).split())[:200] if done.returncode else ""
        report.node_faults.append(f"{seen} of {wanted} GPUs are there" + (f" (nvidia-smi: {said})" if said else ""))
    for index, name, total, used, ecc in rows:
        report.facts[f"gpu{index}"] = f"{name}, {total} MiB"
        if ecc.isdigit() and int(ecc) > 0:
            report.node_faults.append(f"GPU {index} has {ecc} uncorrectable memory errors since it was started")
        if used.isdigit() and total.isdigit() and int(used) > 0.2 * int(total):
            report.remarks.append(f"GPU {index} has {int(used):,} of {int(total):,} MiB in use already")
    with suppress(OSError, subprocess.TimeoutExpired):
        remapped = subprocess.run(
            ["nvidia-smi", "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_S,
            errors="replace",
        )
        for line in remapped.stdout.splitlines():
            bus, _, rest = line.partition(",")
            states = [word.strip().lower() for word in rest.split(",")]
            if len(states) == 2 and states[1] in ("1", "yes"):
                report.node_faults.append(f"GPU at {bus} could not remap a bad row of memory")
            elif len(states) == 2 and states[0] in ("1", "yes"):
                report.remarks.append(f"GPU at {bus} waits for a reset to remap a row of memory")


def _kernel_log(report: Report) -> None:
    """What the driver complained of in the kernel's log, where this user may read it. A fault that is an hour old has been seen to,
    or shows elsewhere: it is said and forgiven."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_DMESG_S, errors="replace")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return
    if done.returncode:
        return
    for number, bus, age in xids(done.stdout, uptime):
        meaning = _XID_HARDWARE.get(number)
        if meaning is None:
            continue
        said = f"GPU at {bus}: Xid {number} ({meaning}) {age / 60:.0f} min ago"
        if age <= _XID_FORGIVEN_S:
            report.node_faults.append(said)
        else:
            report.remarks.append(said)


def xids(log: str, uptime_s: float) -> list[tuple[int, str, float]]:
    """(Xid, bus, seconds ago) of every line of the driver in a kernel log; the newest of each kind."""
    found: dict[tuple[int, str], float] = {}
    for stamp, bus, number in _XID.findall(log):
        found[int(number), bus] = max(uptime_s - float(stamp), 0.0)
    return [(number, bus, age) for (number, bus), age in found.items()]


def _memory(report: Report) -> None:
    with suppress(OSError, StopIteration, ValueError, IndexError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) / 2**20
        report.facts["memory_free_gb"] = round(free, 1)
        if free < _LEAST_MEMORY_GB:
            report.node_faults.append(f"{free:.2f} GB of memory is free, {_LEAST_MEMORY_GB} GB at least is needed to start at all")


def _disk(report: Report, run: RunDir, attempt: int) -> None:
    probe = run.attempt(attempt).path / f".probe.{report.node}"
    try:
        free = shutil.disk_usage(run.path).free / 2**30
        report.facts["disk_free_gb"] = round(free, 2)
        if free < _LEAST_DISK_GB:
            report.storage_faults.append(f"{free * 1024:.0f} MB are free in {run.path}")
        begun, wall = time.monotonic(), time.time()
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(fd, b"\0" * _PROBE_BYTES)
            os.fsync(fd)
            stamp = os.fstat(fd).st_mtime
        finally:
            os.close(fd)
        seconds = max(time.monotonic() - begun, 1e-6)
        speed = _PROBE_BYTES / 2**20 / seconds
        report.facts["write_mb_s"] = round(speed, 1)
        if speed < _LEAST_WRITE_MB_S:
            report.storage_faults.append(f"{run.path} takes {speed:.2f} MB/s from {report.node}")
        apart = stamp - wall - seconds
        report.facts["clock_s"] = round(apart, 1)
        if abs(apart) > _CLOCK_S:
            report.remarks.append(f"the clock of {report.node} and that of the file system are {abs(apart):.0f} s apart")
    except OSError as err:
        report.storage_faults.append(f"{run.path} cannot be written from {report.node}: {err.strerror}")
    finally:
        with suppress(OSError):
            probe.unlink()


def main() -> int:
    run, attempt = RunDir(Path(os.environ[RankEnv.RUN_DIR])), int(os.environ[RankEnv.ATTEMPT])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = check(run, attempt, node, int(sys.argv[1]))
    replace_file(run.attempt(attempt).preflight(node), json.dumps(asdict(report)), flush=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
