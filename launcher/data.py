"""`holdfast data build`: starts the program that builds token files, which needs numpy and more."""

import subprocess
import sys
from pathlib import Path

from jobs.contract import Exit


def build(inputs: list[str], out: Path, *, tokenizer: str | None, eos: str | None, column: str, val_share: float, as_json: bool) -> int:
    """Its exit code. Output and progress are its own."""
    options = [f"--out={out}", f"--column={column}", f"--val-share={val_share}"]
    options += [f"--tokenizer={tokenizer}"] if tokenizer else []
    options += [f"--eos={eos}"] if eos else []
    options += ["--json"] if as_json else []
    program = subprocess.Popen([sys.executable, "-m", "train.data.build", *options, "--", *inputs])
    while True:
        try:
            code = program.wait()
        except KeyboardInterrupt:
            continue  # it heard the same Ctrl-C, and takes away what it had begun
        return code if code >= 0 else int(Exit.FAILED)
