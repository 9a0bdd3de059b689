"""Commands that run holdfast's own modules in a subprocess, independent of what the working folder holds.

`python -m MODULE` puts the working folder first on sys.path: a json.py or numpy.py in it would be executed, and `train.py` may be the
user's own script (docs/howto/bring_your_own_script.md). Here the working folder is on the path only where the user's code is wanted, and then last.
"""

import sys
from pathlib import Path

# PYTHONPATH may name the working folder too, also by an empty entry. Our packages are imported from where this file lies, before any others.
_START = """\
import os, sys
here, home, module, user_code = os.getcwd(), *sys.argv[1:4]
del sys.argv[1:4]
sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]
sys.path.insert(0, home)
import runpy
for name in {"jobs", "slurm", "launcher", module.partition(".")[0]}:
    __import__(name)
del sys.path[0]
if home not in sys.path:
    sys.path.append(home)
from launcher.output.streams import tolerate_closed_pipes
tolerate_closed_pipes()
if user_code and here not in sys.path:
    sys.path.append(here)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_HOME = Path(__file__).absolute().parents[1]


def command(module: str, *words: str, user_code: bool = False) -> list[str]:
    """The command line that runs one of our modules, such as train.checkpoint.export, with these words behind it.

    `user_code`: modules of the working folder can be imported, after all others (MODEL=package.module:build)."""
    return [sys.executable, "-P", "-c", _START, str(_HOME), module, "1" if user_code else "", *words]


def without_safe_path(environ: dict[str, str]) -> dict[str, str]:
    """The environment for a process that must import the frozen code of its working directory, whatever the user's shell exports."""
    return {name: value for name, value in environ.items() if name != "PYTHONSAFEPATH"}
