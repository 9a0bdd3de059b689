"""`holdfast verify autocast MODEL`: trains a few steps in every precision of this machine and shows what each did."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError, SettingError
from launcher import subprocesses
from launcher.submission.create_run import resolve_here


def verify_autocast(model: str | None, words: Sequence[str], cwd: Path, *, steps: int, as_json: bool) -> int:
    """Runs the examination in a process of its own, since it needs torch. 0 when every precision trains, else 1."""
    resolved = resolve_here([*words, *([f"MODEL={model}"] if model else [])], os.environ, cwd)
    job = resolved.job
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        out = Path(folder) / "findings.json"
        command = subprocesses.command(
            "train.precision.check",
            "--model",
            job.model,
            "--options",
            json.dumps(job.model_options),
            "--seq-len",
            str(min(job.seq_len, 128)),
            "--steps",
            str(steps),
            "--out",
            str(out),
            user_code=True,
        )
        done = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
        if not out.exists():
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"the examination ended with {done.returncode}"
            raise SettingError(said) if done.returncode == Exit.USAGE else HoldfastError(said)
        findings = json.loads(out.read_text())
    passed = all(finding["passed"] for finding in findings)
    if as_json:
        print(json.dumps({"model": job.model, "passed": passed, "findings": findings}, indent=1))
        return Exit.DONE if passed else Exit.FAILED
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("precision", "first loss", "last loss", "max |loss - fp32|", "gradient cosine", "verdict"):
        table.add_column(column)
    for finding in findings:
        losses = finding["losses"]
        first, last = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") if losses else ("", "")
        difference = f"{100 * finding['difference']:.2f} %" if finding["difference"] == finding["difference"] else ""
        cosine = f"{finding['cosine']:.4f}" if finding["cosine"] == finding["cosine"] else ""
        table.add_row(finding["precision"], first, last, difference, cosine, Text(finding["verdict"]))
    print(f"{job.model}, {steps} steps on one batch")
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(width=300, highlight=False).print(table)
    return Exit.DONE if passed else Exit.FAILED
