"""`holdfast` as a user calls it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

HOLDFAST = Path(sys.executable).with_name("holdfast")


def holdfast(*words: str, cwd: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))}
    return subprocess.run([HOLDFAST, *words], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=120)
