"""`make pins`: writes constraints.txt anew, with the newest versions that pyproject.toml allows. Needs pip's usual sources, installs nothing.

What is pinned is all that `make setup` installs, on Python 3.11 and Linux, down to the last dependency. torch stays at the version that
the file names already, since a new torch is a decision; `make pins TORCH=2.14.0` takes another. There are no hashes and no addresses:
whether torch comes as a build for CUDA or for CPU, and from where, is the machine's choice.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = "constraints.txt"
PYTHON = (3, 11)
# The groups of pyproject.toml that launcher/setup.sh installs.
GROUPS = ("test", "report", "digits")

_HEAD = f"""\
# The versions that the tests run with, on Python {PYTHON[0]}.{PYTHON[1]} and Linux. `make setup` and environment.yml take them; `make pins` writes this file anew.
# By hand: pip install --constraint {FILE} '.[{",".join(GROUPS)}]'. On another Python leave the option out.
"""
# A build of torch for CUDA names each of these in one exact version by itself, against which a pin could only be wrong.
OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")


def canonical(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(text: str) -> dict[str, str]:
    """Name -> version of every line."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def chosen(report: dict[str, Any], own: str) -> dict[str, str]:
    """Name -> version of what pip would install, from its report; without ourselves and without a build's own suffix (2.13.0+cpu)."""
    found = {canonical(item["metadata"]["name"]): item["metadata"]["version"].partition("+")[0] for item in report["install"]}
    return {name: version for name, version in sorted(found.items()) if name != own and not OF_TORCH.match(name)}


def written(pins: dict[str, str]) -> str:
    return _HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [f"{name}  {before.get(name, 'new')} -> {after.get(name, 'gone')}" for name in sorted(before | after) if before.get(name) != after.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pins", description="Writes constraints.txt anew.")
    parser.add_argument("--torch", help="another version of torch than the file has")
    options = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        print(f"the pins are for Python {PYTHON[0]}.{PYTHON[1]}, this is {sys.version_info[0]}.{sys.version_info[1]}", file=sys.stderr)
        return 2
    path = REPOSITORY / FILE
    before = read(path.read_text())
    own = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["name"]
    ask = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run(
        [*ask, f"torch=={options.torch or before['torch']}", f".[{','.join(GROUPS)}]"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(f"pip found no versions that go together; {FILE} is as it was", file=sys.stderr)
        return 1
    after = chosen(json.loads(done.stdout), own)
    path.write_text(written(after))
    print("\n".join(changes(before, after)) or f"{FILE} has the newest versions already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
