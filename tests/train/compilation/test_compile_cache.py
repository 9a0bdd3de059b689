"""What torch.compile made outlives the attempt, and no fault of the file harms one. With a real compiler: `make test-slow`, `make test-gpu`."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiled_attempts import two_attempts
from conftest import REPOSITORY
from on_device import needs_compiler

from jobs.config.settings import Job
from jobs.run.rundir import RunDir
from train.compilation import kernel_cache as kernel_cache_module
from train.compilation.compile_cache import CompileCache
from train.compilation.kernel_cache import KernelCache


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


@pytest.mark.slow
@needs_compiler
def test_the_next_attempt_does_not_compile_again(tmp_path: Path) -> None:
    first, second = two_attempts(tmp_path, "cpu")
    assert "hits 0 misses 1" in first and "compiled parts of an earlier attempt loaded" in second and "hits 1 misses 0" in second
    assert first.splitlines()[0] == second.splitlines()[1]
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "compiled").iterdir()] == [0o644]


_KERNEL = """
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from train.kernels import swiglu
from train.compilation.kernel_cache import KernelCache

path, folder = map(Path, sys.argv[1:3])
cache = KernelCache(path, folder)
if path.exists():
    print("loaded", cache.load())
types = {"packed_ptr": "*bf16", "h_ptr": "*bf16", "rows": "i32", "width": "i32", "ROWS": "constexpr", "BLOCK": "constexpr"}
before = {one: one.stat().st_ino for one in folder.rglob("*")}
made = triton.compile(ASTSource(swiglu._forward, signature=types, constexprs={"ROWS": 4, "BLOCK": 512}), target=GPUTarget("cuda", int(sys.argv[3]), 32))
print("cubin", len(made.asm["cubin"]), "new", sorted(one.name for one in folder.rglob("*") if one.is_file() and before.get(one) != one.stat().st_ino))
cache.keep()
"""


def test_a_kernel_is_not_compiled_again_on_another_node(tmp_path: Path) -> None:
    """Triton compiles for a GPU that is not here; it writes a file anew when it compiles again."""

    def node(name: str, arch: int = 90) -> list[str]:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path / name)}
        words = [sys.executable, "-c", _KERNEL, str(tmp_path / "run" / "k.zip"), str(tmp_path / name), str(arch)]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    first = node("a")
    assert "_forward.cubin" in first[0]
    written = (tmp_path / "run" / "k.zip").stat().st_ino
    second = node("b")
    assert second == ["loaded 1", first[0].partition(" new")[0] + " new []"] and (tmp_path / "run" / "k.zip").stat().st_ino == written
    assert "_forward.cubin" in node("c", 80)[1], "another GPU has another kernel, and then there are two"
    assert node("d") == ["loaded 2", second[1]] and node("d", 80)[1].endswith(" new []")


def kernel_cache(folder: Path, name: str) -> KernelCache:
    return KernelCache(folder / "k.zip", folder / name)


def test_the_folder_of_the_file_is_made_with_what_it_lies_in(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "runs" / "compiled" / "k.zip", tmp_path / "node")
    kernel(tmp_path / "node", "A", cubin="1")
    cache.keep()
    assert (tmp_path / "runs" / "compiled" / "k.zip").is_file()


def kernel(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, text in files.items():
        (folder / name / file).write_text(text)


def test_only_kernels_that_came_meanwhile_and_are_not_torchs_are_kept(tmp_path: Path) -> None:
    kernel(tmp_path / "a", "OLD", f="1")
    cache = kernel_cache(tmp_path, "a")
    cache.keep()
    assert not (tmp_path / "k.zip").exists(), "nothing new"
    kernel(tmp_path / "a", "TORCHS", triton_poi_fused="2")
    kernel(tmp_path / "a", "OURS", cubin="3", lock="", __grp__f=json.dumps({"child_paths": {"cubin": "/elsewhere/OURS/cubin"}}))
    (tmp_path / "a" / "OURS" / "tmp.pid_1").mkdir()
    cache.keep()
    other = kernel_cache(tmp_path, "b")
    assert other.load() == 1 and sorted(path.name for path in (tmp_path / "b" / "OURS").iterdir()) == ["__grp__f", "cubin"]
    assert json.loads((tmp_path / "b" / "OURS" / "__grp__f").read_text()) == {"child_paths": {"cubin": str(tmp_path / "b" / "OURS" / "cubin")}}
    kernel(tmp_path / "b", "MORE", cubin=os.urandom(20_000).hex())
    other.keep()
    written = (tmp_path / "k.zip").stat().st_ino
    other.keep()
    assert (tmp_path / "k.zip").stat().st_ino == written, "nothing new since"
    kernel(tmp_path / "b", "THIRD", cubin="5")
    other.keep()
    assert kernel_cache(tmp_path, "c").load() == 3 and (tmp_path / "c" / "MORE" / "cubin").stat().st_size == 40_000
    (tmp_path / "b" / "OURS" / "cubin").write_text("of this node")
    again = kernel_cache(tmp_path, "b")
    assert again.load() == 3 and (tmp_path / "b" / "OURS" / "cubin").read_text() == "of this node"


@pytest.mark.parametrize("name", ["../a", "/a/b", "a", "a/b/c", "a/../b", "a/"])
def test_a_file_that_reaches_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "k.zip", "w") as file:
        file.writestr(name, "x")
    with pytest.raises(ValueError, match="is no file of a kernel"):
        kernel_cache(tmp_path, "a").load()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [b"torn", b""])
def test_damaged_kernels_cost_a_compilation_and_are_told(tmp_path: Path, content: bytes) -> None:
    said: list[str] = []
    cache = cache_of(RunDir(tmp_path), said)
    path = the_file(RunDir(tmp_path)).with_name(f"torch-{torch.__version__}-CPU-triton.zip")
    path.write_bytes(content)
    cache._kernels = KernelCache(cache._kernels_path, tmp_path / "node")
    assert cache._kernels_path == path
    cache.load()
    assert len(said) == 1 and "cannot be used" in said[0] and "kernels are compiled anew" in said[0]


def test_too_many_kernels_are_not_kept_and_it_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache_module, "_MOST_BYTES", 1000)
    said: list[str] = []
    cache = cache_of(RunDir(tmp_path), said)
    cache._wanted, cache._kernels = False, KernelCache(cache._kernels_path, tmp_path / "node")
    kernel(tmp_path / "node", "A", cubin=os.urandom(1000).hex())
    cache.keep(validated=False)
    cache.keep(validated=True)
    assert len(said) == 1 and "kernels could not be kept: kernels of more than" in said[0] and not cache._kernels_path.exists()
