"""`holdfast data build`: starts the program that builds token files, which needs numpy and more."""

import subprocess
from pathlib import Path

from jobs.core.contract import Exit
from launcher import subprocesses


def build(inputs: list[str], out: Path, *, tokenizer: str | None, eos: str | None, column: str, val_share: float, as_json: bool) -> int:
    """Its exit code. Output and progress are its own."""
    options = [f"--out={out}", f"--column={column}", f"--val-share={val_share}"]
    options += [f"--tokenizer={tokenizer}"] if tokenizer else []
    options += [f"--eos={eos}"] if eos else []
    options += ["--json"] if as_json else []
    builder = subprocess.Popen(subprocesses.command("train.data.build", *options, "--", *inputs))
    while True:
        try:
            code = builder.wait()
        except KeyboardInterrupt:
            continue  # it heard the same Ctrl-C, and takes away what it had begun
        return code if code >= 0 else int(Exit.FAILED)
