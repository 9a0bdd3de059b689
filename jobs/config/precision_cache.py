"""What `holdfast precision` found, kept in the runs directory so that `PRECISION=auto` can take it.

    runs/.precision/<model>-<key>[-sm_90].json     the newest measurement of a model in one shape on one kind of device

A measurement holds for the model, its options and what else decides about speed and rounding; another seed or another learning
rate asks for no new one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.specs.precision import arch_number

_FOLDER = ".precision"
# What a measurement depends on.
_SHAPE = ("model", "model_options", "seq_len", "grad_checkpointing", "compile")


@dataclass(frozen=True)
class Advice:
    """Settings to take, the device they were measured on, when (ISO date), why, and the file that says so."""

    settings: dict[str, str]
    device: str
    date: str
    rule: str
    path: Path


def place(runs_dir: Path, job: Job, arch: int | None) -> Path:
    """The file for a measurement of this job's model on a GPU of `arch` (90 for sm_90), or on a CPU."""
    shape = json.dumps([getattr(job, name) for name in _SHAPE], sort_keys=True)
    name = "".join(c if c.isalnum() else "-" for c in job.model.rpartition("/")[2])[:40].strip("-") or "model"
    return runs_dir / _FOLDER / f"{name}-{hashlib.sha256(shape.encode()).hexdigest()[:10]}-{'cpu' if arch is None else f'sm_{arch}'}.json"


def keep(path: Path, content: dict[str, Any]) -> None:
    """Writes a measurement, aside first. `content` has at least settings, device, date and rule. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1) + "\n")


def look_up(runs_dir: Path, job: Job) -> Advice | None:
    """The newest measurement that holds for this job on the hardware that its site names; None when there is none.

    A site that names no architecture gets a GPU's, or a CPU's where it trains on one."""
    pattern = place(runs_dir, job, None).name.removesuffix("cpu.json")
    if job.device == "cpu" or (job.device == "auto" and job.gpu_request == "none"):
        wanted = f"{pattern}cpu.json"
    elif job.gpu_arch is not None:
        try:
            wanted = f"{pattern}sm_{arch_number(job.gpu_arch)}.json"
        except ValueError:  # said by the rules
            return None
    else:
        wanted = f"{pattern}sm_*.json"
    found = []
    for path in (runs_dir / _FOLDER).glob(wanted):
        try:
            content = safe_read.read_object(path)
            settings = {str(name): str(value) for name, value in content["settings"].items()}
            found.append((path.stat().st_mtime_ns, Advice(settings, str(content["device"]), str(content["date"]), str(content["rule"]), path)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # torn or of another version: as if it were not there
    return max(found, key=lambda pair: pair[0])[1] if found else None
