"""What an attempt left behind, read without ever failing: markers of its ranks, its logs, its times, its nodes."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.config.types import parse_minutes
from jobs.core import safe_read
from jobs.core.contract import LOG_OFFSET, Event, RankEnv
from jobs.core.errors import DamagedFileError, SubmitError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.attempt.classify_exit import Evidence
from slurm.client import JobInfo, Slurm
from slurm.states import is_lost

# What a person may want to read of a traceback without opening a file.
_SHOWN_LINES = 40


def evidence_of(run: RunDir, job: Job, number: int, job_id: str, slurm: Slurm | None) -> Evidence:
    """What is to be found of an attempt, whoever looks; how its step ended is not among it, and stands as 1."""
    markers = _markers(run, number, job.world_size)
    missing = sorted(set(range(job.world_size)) - set(markers))
    return Evidence(
        code=1,
        markers=markers,
        world=job.world_size,
        log=tail_of_log(run.log(job_id, "batch"), _log_offset(run, number)),
        rank_logs=_rank_logs(run, job, job_id, number, missing),
        cancel_wished=_cancel_wished(run),
        hang=_hang(run, number),
        lost_nodes=_lost(slurm, nodes_of(run, number), job, missing),
        stop_file=_stop_words(run),
        **(_guard_evidence(run, number, job.world_size) if job.entry is not None else {}),
    )


def _guard_evidence(run: RunDir, number: int, world: int) -> dict[str, Any]:
    """Stop, time limit and first failure of a user script, as its helper and the step guard recorded them."""
    attempt = run.attempt(number)
    guard = _read_object(attempt.step_guard)
    # Every rank that uses the helper has this file; the first one with a signal is enough.
    heard = next((str(record["signal"]) for rank in range(world) if (record := _read_object(attempt.helper(rank))).get("signal")), "")
    failed = guard.get("failed")
    return {
        "stop_sent": heard or str(guard.get("signal") or ""),
        "limit_near": bool(guard.get("limit")),
        "failed_rank": (int(failed[0]), int(failed[1])) if isinstance(failed, list) and len(failed) == 2 and all(map(safe_read.is_number, failed)) else None,
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return safe_read.read_object(path)
    except (OSError, DamagedFileError):
        return {}


def clock_record(run: RunDir, number: int) -> dict[str, Any] | None:
    """The last record of rank 0's clock in an attempt; None where there is none, empty where it cannot be read."""
    try:
        return safe_read.read_object(run.attempt(number).clock, finite=True)
    except FileNotFoundError:
        return None
    except DamagedFileError:
        return {}


def _markers(run: RunDir, number: int, world: int) -> dict[int, dict[str, object]]:
    found = {}
    for rank in range(world):
        try:
            found[rank] = safe_read.read_object(run.attempt(number).marker(rank))
        except (OSError, DamagedFileError):
            continue
    return found


def _hang(run: RunDir, number: int) -> dict[str, Any] | None:
    try:
        return safe_read.read_object(run.attempt(number).hang)
    except (OSError, DamagedFileError):
        return None


def _stop_words(run: RunDir) -> str:
    try:
        return " ".join(safe_read.read_bytes(run.stop_file).decode(errors="replace").split())[:200]
    except (OSError, DamagedFileError):
        return ""


def tail_of_log(log: Path, offset: int, most: int = 65_536) -> str:
    """What was written to a log since `offset`; at most its last `most` bytes."""
    try:
        with safe_read.open_file(safe_read.follow_own_link(log)) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset if offset <= size else 0, size - most))
            return safe_read.read_some(file, log, most).decode(errors="replace")
    except (OSError, DamagedFileError):
        return ""


def log_sizes(run: RunDir, job_id: str) -> dict[str, int]:
    """`0`, `1`, `batch` -> bytes that the job's earlier attempts have written to that log."""
    begin = len(job_id) + 1
    return {
        path.name.removesuffix(".out")[begin:]: path.stat().st_size
        for path in run.logs.iterdir()
        if path.name.startswith(f"{job_id}.") and path.name.endswith(".out")
    }


def _rank_logs(run: RunDir, job: Job, job_id: str, number: int, missing: Sequence[int]) -> str:
    """The last words of ranks that left no marker: slurmstepd writes there why it killed them."""
    begun = started_at(run, number)
    texts = []
    for writer in sorted({job.log_number(rank) for rank in missing})[:16]:
        log = run.log(job_id, writer)
        try:
            if log.stat().st_mtime >= begun - 1:
                texts.append(tail_of_log(log, 0, most=2048))
        except OSError:
            continue
    return "\n".join(texts)


def _log_offset(run: RunDir, number: int) -> int:
    """The size that the batch log had when the attempt began, as the variables of the attempt say it."""
    try:
        for line in safe_read.read_text(run.attempt(number).env).splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            if name == LOG_OFFSET and value.isdigit():
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def started_at(run: RunDir, number: int) -> float:
    starts = [event for event in event_log.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number]
    return float(starts[-1]["time"]) if starts else 0.0


def elapsed(run: RunDir, number: int, environ: Mapping[str, str]) -> float:
    """Seconds since the attempt began: by the clock that nobody sets where this is the same machine, else by the wall's."""
    try:
        passed = time.monotonic() - float(environ[RankEnv.STARTED])
        if passed >= 0:
            return passed
    except (KeyError, ValueError):
        pass
    begun = started_at(run, number)
    return max(time.time() - begun, 0.0) if begun else 0.0


def seconds_to_limit(run: RunDir, number: int, job: Job, info: JobInfo | None, environ: Mapping[str, str]) -> float | None:
    """Until the time limit: Slurm's own, which somebody may have changed, else the one that was asked for."""
    minutes: float = job.time_limit
    if info is not None:
        try:
            minutes = parse_minutes(info.time_limit)
        except ValueError:  # UNLIMITED
            return None
    return minutes * 60 - elapsed(run, number, environ) if started_at(run, number) else None


def nodes_of(run: RunDir, number: int) -> list[str]:
    starts = [event for event in event_log.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number]
    return [str(node) for node in starts[-1].get("nodes", [])] if starts else []


def _lost(slurm: Slurm | None, nodes: list[str], job: Job, missing: Sequence[int]) -> list[str]:
    """Nodes of ranks without a marker that slurmctld no longer reaches."""
    wanted = sorted({nodes[rank // job.gpus_per_node] for rank in missing if rank // job.gpus_per_node < len(nodes)})
    if slurm is None or not wanted:
        return []
    try:
        states = slurm.node_states(wanted)
    except SubmitError:
        return []
    return [node for node in wanted if is_lost(states.get(node, ""))]


def _cancel_wished(run: RunDir) -> bool:
    """Whether `holdfast cancel` was called after the run was last submitted."""
    wished = False
    for event in event_log.read(run.ledger):
        if event["event"] == Event.CANCEL:
            wished = True
        elif event["event"] == Event.SUBMITTED:
            wished = False
    return wished


def show_error(run: RunDir, number: int, world: int) -> None:
    """The traceback of the first rank that failed by itself, on standard output."""
    markers = [marker for marker in _markers(run, number, world).values() if marker.get("reason") == "error"]
    for marker in sorted(markers, key=lambda marker: str(marker.get("time")))[:1]:
        try:
            lines = safe_read.read_text(run.attempt(number).error(int(str(marker["rank"])))).splitlines()
        except (OSError, ValueError, KeyError):
            continue
        print(f"holdfast: rank {marker['rank']} said:\n" + "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:]), flush=True)
