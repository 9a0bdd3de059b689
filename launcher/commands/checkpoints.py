"""Looking at the checkpoints of a run, checking them, and taking one elsewhere. Needs no torch: only export starts a process that does."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.checkpoint import directory
from jobs.checkpoint.directory import DAMAGED, STAGING, TRASH
from jobs.core.contract import Exit
from jobs.core.errors import CheckpointError, NotFoundError, SettingError
from jobs.run.rundir import RunDir
from launcher import subprocesses
from launcher.status import run_status

# What an export can be, and what for.
FORMS = {"hf": "what transformers loads", "plain": "weights by our names"}


@dataclass(frozen=True)
class Row:
    """One entry of a checkpoints folder. `state` is complete, damaged, set aside, being written or being deleted."""

    name: str
    state: str
    step: int | None = None
    attempt: int | None = None
    tokens: int | None = None
    val_loss: float | None = None
    precision: str = ""
    world: int | None = None
    bytes: int | None = None
    age_s: float | None = None
    reason: str = ""


def rows_of(run: RunDir, check: bool) -> list[Row]:
    """What lies in the folder, newest step first. With `check` every byte is read; without, only names and manifests."""
    rows = [_complete(path, check) for path in directory.complete(run.checkpoints)]
    words = {STAGING: "being written", TRASH: "being deleted", DAMAGED: "set aside"}
    try:
        others = sorted(path.name for path in run.checkpoints.iterdir())
    except OSError:
        others = []
    rows += [Row(name, words[prefix]) for name in others for prefix in words if name.startswith(prefix)]
    return rows


def list_checkpoints(run: RunDir, as_json: bool) -> int:
    rows = rows_of(run, check=False)
    _print(run, rows, as_json)
    return Exit.DONE


def verify_checkpoints(run: RunDir, as_json: bool) -> int:
    """Reads every byte. 0 when all complete checkpoints are whole, 1 when one is damaged or there is none. Changes nothing."""
    rows = rows_of(run, check=True)
    _print(run, rows, as_json)
    complete = [row for row in rows if row.state in ("complete", "damaged")]
    damaged = [row for row in complete if row.state == "damaged"]
    if not as_json:
        for row in damaged:
            print(row.reason)
        whole = next((row for row in complete if row.state == "complete"), None)
        print(
            f"{len(complete) - len(damaged)} of {len(complete)} verified"
            + (f"; a resume would use step {whole.step:,}" if whole else "; a resume would begin anew")
        )
    return Exit.DONE if complete and not damaged else Exit.FAILED


def export(run: RunDir, step: int | None, out: Path | None, form: str) -> int:
    """Starts the process that reads the tensors. Returns its exit code. Raises SettingError for what has no such form."""
    if form not in FORMS:
        raise SettingError(f"--form {form!r}: write one of {', '.join(f'{name} ({meaning})' for name, meaning in FORMS.items())}.")
    path = directory.path_of(run.checkpoints, step) if step is not None else next(iter(directory.complete(run.checkpoints)), None)
    if path is None or not path.is_dir():
        there = ", ".join(str(directory.step_of(path)) for path in directory.complete(run.checkpoints)) or "none"
        raise NotFoundError(
            f"run {run.id} has no checkpoint of step {step}; there are: {there}" if step is not None else f"run {run.id} has no complete checkpoint"
        )
    if directory.read_manifest(path).state.get(directory.OWN):
        raise SettingError(
            f"run {run.id} trains a script of your own, and {run_status.near(path)}/ holds the files that it wrote, as it wrote them: take them from there. Only a MODEL can be exported."
        )
    target = out or Path(f"{run.path.name}-step{directory.step_of(path)}-{form}")
    words = ["--run-dir", str(run.path), "--checkpoint", str(path), "--out", str(target.absolute()), "--form", form]
    return subprocess.run(subprocesses.command("train.checkpoint.export", *words)).returncode


def _complete(path: Path, check: bool) -> Row:
    try:
        manifest = directory.verify(path) if check else directory.read_manifest(path)
    except CheckpointError as err:
        return Row(path.name, "damaged", directory.step_of(path), reason=str(err))
    state = manifest.state
    return Row(
        path.name,
        "complete",
        manifest.step,
        manifest.attempt,
        state.get("tokens"),
        state.get("val_loss"),
        str(state.get("precision", "")),
        state.get("world"),
        manifest.bytes,
        round(time.time() - path.stat().st_mtime, 1),
    )


def _print(run: RunDir, rows: list[Row], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if not rows:
        print(f"run {run.id} has no checkpoint in {run_status.near(run.checkpoints)}/")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("checkpoint", "state", "attempt", "tokens", "val loss", "trained as", "size"):
        table.add_column(name, justify="right" if name in ("attempt", "tokens", "val loss", "size") else "left")
    for row in rows:
        cells = (
            row.name,
            row.state,
            "" if row.attempt is None else str(row.attempt),
            "" if row.tokens is None else f"{row.tokens:,}",
            "" if row.val_loss is None else f"{row.val_loss:.4f}",
            f"{row.precision} x {row.world}" if row.world else "",
            "" if row.bytes is None else directory.size_text(row.bytes),
        )
        table.add_row(*(Text(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=True).print(table)
