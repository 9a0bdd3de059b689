"""Programs of our own that a command starts: they run ours, whatever the folder of the person holds."""

import sys
from pathlib import Path

# `-m` alone looks into the working folder first, where `train.py` may be the person's own script (docs/bring-your-own.md). Our packages are
# imported from where this file lies; then the working folder comes first as with `-m`, so that MODEL=package.module:build finds theirs.
_START = """\
import os, runpy, sys
home, module = sys.argv[1:3]
del sys.argv[1:3]
sys.path.insert(0, home)
for name in {"jobs", "slurm", module.partition(".")[0]}:
    __import__(name)
from launcher.output.streams import tolerate_closed_pipes
tolerate_closed_pipes()
sys.path[0] = os.getcwd()
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_HOME = Path(__file__).absolute().parents[1]


def command(module: str, *words: str) -> list[str]:
    """The command line that runs one of our modules, such as train.checkpoint.export, with these words behind it."""
    return [sys.executable, "-P", "-c", _START, str(_HOME), module, *words]
