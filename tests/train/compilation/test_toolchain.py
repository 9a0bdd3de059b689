"""COMPILE=true without a compiler or without the header files of Python is refused before training starts."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from on_device import One, job_of
from torch._inductor import config

from jobs.core.contract import Exit
from jobs.core.errors import ImpossibleJobError
from train import bench
from train.compilation import toolchain
from train.kernels import usable

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def program(folder: Path, name: str, code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is PATH, and a Python with its header files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: {"include": str(include)})
    with config.patch({"cpp.cxx": (None, "g++")}):
        yield folder


def test_cpu_needs_cpp_compiler(tools: Path) -> None:
    assert list(toolchain.find_missing(CPU).values()) == ["g++"]
    program(tools, "gcc")
    program(tools, "g++", code=1)
    assert list(toolchain.find_missing(CPU).values()) == ["g++"], "one that does not run is none"
    program(tools, "g++")
    assert not toolchain.find_missing(CPU)


def test_gpu_needs_c_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools, "g++")
    assert list(toolchain.find_missing(GPU).values()) == ["gcc"]
    program(tools, "clang")
    assert not toolchain.find_missing(GPU)
    monkeypatch.setenv("CC", "nothing-here")
    ((text, package),) = toolchain.find_missing(GPU).items()
    assert "CC=nothing-here does not run" in text and package == "gcc"


def test_both_need_python_headers(tools: Path, tmp_path: Path) -> None:
    for name in ("gcc", "g++"):
        program(tools, name)
    (tmp_path / "include" / "Python.h").unlink()
    for device in (CPU, GPU):
        ((text, package),) = toolchain.find_missing(device).items()
        assert f"{tmp_path}/include/Python.h" in text and package.startswith("python3.") and package.endswith("-dev")


def test_refused_before_model_is_built(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    monkeypatch.setattr(bench.runtime, "init", lambda job: One(CPU))
    with pytest.raises(ImpossibleJobError) as refused:
        bench.measure(job_of("fp32", "cpu", compile=True), 1, 1)
    text = str(refused.value)
    assert refused.value.exit_code == Exit.IMPOSSIBLE
    assert all(part in text for part in ("COMPILE=true", "g++", "Python.h", "-dev", "COMPILE=false"))


def test_fused_kernels_are_left_out_without_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: only what torch says about one is replaced."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = usable(GPU)
    assert reason is not None and "C compiler" in reason and "install gcc" in reason
    program(tools, "gcc")
    assert usable(GPU) is None
