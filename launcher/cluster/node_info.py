"""What a node has: GPUs and driver, Python, versions of the libraries. Printed as JSON by whatever Python runs this text.

`holdfast doctor` sends it through a short srun; so it needs nothing of ours on the node, and the standard library only.
"""

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata

LIBRARIES = ("torch", "accelerate", "numpy", "safetensors", "transformers", "datasets", "transformer_engine", "torchao")
_SMI_S = 15


def facts() -> dict[str, object]:
    found: dict[str, object] = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "gpus": [],
        "driver": "",
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, errors="replace")
    except FileNotFoundError:
        found["driver"] = "nvidia-smi is not there"
        return found
    except subprocess.TimeoutExpired:
        found["driver"] = f"nvidia-smi did not answer within {_SMI_S} s"
        return found
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    if done.returncode or not rows:
        found["driver"] = "nvidia-smi: " + " ".join((done.stderr or done.stdout).split())[:200]
        return found
    found["gpus"] = [f"{name}, {total} MiB" for name, total, _ in rows]
    found["driver"] = rows[0][2]
    return found


def _version(name: str) -> str:
    for word in (name, name.replace("_", "-")):
        try:
            return metadata.version(word)
        except metadata.PackageNotFoundError:
            continue
    return ""


if __name__ == "__main__":
    print(json.dumps(facts()))
