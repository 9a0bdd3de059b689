"""What Slurm tells a job in its environment, and the times that it writes."""

import os
from collections.abc import Mapping
from datetime import datetime

from jobs.core.contract import LOCAL


def job_id_of(environ: Mapping[str, str]) -> str:
    """1234, or 1234_5 for a task of an array: the form that scontrol and squeue understand."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ.get("SLURM_JOB_ID", f"{LOCAL}{os.getpid()}")


def restarts_of(environ: Mapping[str, str]) -> int:
    try:
        return int(environ.get("SLURM_RESTART_COUNT", "0") or 0)
    except ValueError:
        return 0


def local_time(text: str) -> float:
    """Unix seconds of `2026-11-21T23:42:33` in the zone of this machine; infinity for Unknown."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return float("inf")
