"""What torch.compile made outlives the attempt, and no fault of the file harms one. With a real compiler: `make test-slow`, `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from jobs.rundir import RunDir
from jobs.settings import Job
from train.compile_cache import CompileCache


def cache_of(run: RunDir, said: list[str], *, compile: bool = True) -> CompileCache:
    rt = SimpleNamespace(device=torch.device("cpu"), is_main=True)
    return CompileCache(Job(job_name="t", compile=compile), run, rt, said.append)  # type: ignore[arg-type]


def the_file(run: RunDir) -> Path:
    path = run.compiled(f"torch-{torch.__version__}-CPU")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_a_damaged_file_costs_a_compilation_and_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    the_file(RunDir(tmp_path)).write_bytes(b"torn" * 100)
    cache_of(RunDir(tmp_path), said).load()
    assert len(said) == 1 and "is damaged; everything is compiled anew" in said[0]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    said: list[str] = []
    path = the_file(RunDir(tmp_path))
    path.write_bytes(b"code")
    os.chown(path, 12345, -1)
    cache_of(RunDir(tmp_path), said).load()
    assert len(said) == 1 and "belongs to another user" in said[0]


def test_without_compile_nothing_is_read_or_written(tmp_path: Path) -> None:
    said: list[str] = []
    path = the_file(RunDir(tmp_path))
    path.write_bytes(b"torn")
    cache = cache_of(RunDir(tmp_path), said, compile=False)
    cache.load()
    cache.keep(validated=False)
    assert not said and path.read_bytes() == b"torn"


def test_the_tasks_of_an_array_share_it(tmp_path: Path) -> None:
    assert RunDir(tmp_path).member(3).compiled("x") == RunDir(tmp_path).compiled("x") == tmp_path / "compiled" / "x.bin"


_ATTEMPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch._dynamo.utils import counters
from jobs.rundir import RunDir
from jobs.settings import Job
from train.compile_cache import CompileCache

rt = SimpleNamespace(device=torch.device(sys.argv[2]), is_main=True)
cache = CompileCache(Job(job_name="t", compile=True), RunDir(Path(sys.argv[1])), rt, print)
cache.load()
print(float(torch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(8, device=rt.device))))
cache.keep(validated=False)
cache.keep(validated=True)
print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def two_attempts(tmp_path: Path, device: str) -> list[str]:
    """What each printed. Each has a node of its own: a temporary folder without caches."""
    found = []
    for attempt in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / attempt)}
        done = subprocess.run([sys.executable, "-c", _ATTEMPT, str(tmp_path), device], env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(done.stdout)
    return found


@pytest.mark.slow
def test_the_next_attempt_does_not_compile_again(tmp_path: Path) -> None:
    first, second = two_attempts(tmp_path, "cpu")
    assert "hits 0 misses 1" in first and "compiled parts of an earlier attempt loaded" in second and "hits 1 misses 0" in second
    assert first.splitlines()[0] == second.splitlines()[1]
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "compiled").iterdir()] == [0o644]
