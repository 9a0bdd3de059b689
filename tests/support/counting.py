"""What something costs, counted in calls of functions: work that a slow or busy machine does not make more of.

python -m tests.support.counting status --json        as holdfast itself; the number is the last line on standard error
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def calls_of(do: Callable[[], Any]) -> int:
    """How many functions are called, those of C and of other threads included."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        do()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return count


def counted(*words: str, env: Mapping[str, str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """A holdfast command in a process of its own, and how many functions it called, imports included."""
    command = [sys.executable, "-m", "tests.support.counting", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=500, check=True)
    return done, int(done.stderr.splitlines()[-1])


def main() -> int:
    from launcher.cli.app import run_app

    codes: list[int] = []
    print(calls_of(lambda: codes.append(run_app())), file=sys.stderr)
    return codes[0]


if __name__ == "__main__":
    sys.exit(main())
