"""What torch.compile and Triton need from the system: a compiler, and the header files of Python.

On a CPU torch.compile writes C++ (torch/_inductor/cpp_builder.py). On a GPU Triton compiles the launcher of each kernel as C
(triton/runtime/build.py). Both include Python.h. They report a missing one in the first step, after data and model were loaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from jobs.core.errors import ImpossibleJobError


def require_compiler(device: torch.device) -> None:
    """Raise ImpossibleJobError if COMPILE=true cannot work on `device` of this machine."""
    missing = find_missing(device)
    if missing:
        raise ImpossibleJobError(
            f"COMPILE=true needs {' and '.join(missing)} on {os.uname().nodename}. Install {' and '.join(missing.values())}, or set COMPILE=false."
        )


def find_missing(device: torch.device) -> dict[str, str]:
    """What is missing, each with the system package that has it (Debian, Ubuntu; Fedora and RHEL have gcc-c++, gcc, python3-devel)."""
    missing = {}
    if device.type == "cuda":
        compiler = os.environ.get("CC")
        if not (_runs(compiler) if compiler is not None else shutil.which("gcc") or shutil.which("clang")):
            missing[f"a C compiler (gcc or clang{_chosen('CC')})"] = "gcc"
    elif not any(_runs(one) for one in _cpp_compilers()):
        missing[f"a C++ compiler (g++{_chosen('CXX')})"] = "g++"
    scheme = sysconfig.get_default_scheme()
    include = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (include / "Python.h").is_file():
        missing[f"the header files of Python ({include}/Python.h)"] = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    return missing


def _cpp_compilers() -> list[str]:
    """The compilers that torch tries: CXX, else g++."""
    from torch._inductor import config

    named = config.cpp.cxx
    return [one for one in (named if isinstance(named, tuple | list) else (named,)) if one]


def _runs(compiler: str) -> bool:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _chosen(name: str) -> str:
    value = os.environ.get(name)
    return f"; {name}={value} does not run" if value is not None else ""
