"""A small file system that only one test sees."""

import os
import shutil
import subprocess
from pathlib import Path

import crash
import pytest


def in_private_mount(script: str, folder: Path, options: str) -> str:
    """Output of a shell script that has a small file system of its own at `folder`; skips where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, for a mount that only the test sees")
    mount = f"mount -t tmpfs -o {options} none {folder}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount here")
    done = subprocess.run(["unshare", "-m", "sh", "-ec", f"{mount}\n{script}"], capture_output=True, text=True, timeout=150, cwd=Path(crash.__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
