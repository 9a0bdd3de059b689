"""Nothing that another user put into a compile cache is loaded. A second user id plays that user."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from colleague import COLLEAGUE, Users, needs_two_users, two_users
from on_device import needs_compiler

pytestmark = needs_two_users


@pytest.fixture
def mine() -> Iterator[Users]:
    with two_users(owner=os.geteuid()) as made:
        yield made


@pytest.fixture
def temporary(mine: Users) -> Path:
    """A temporary folder like /tmp."""
    folder = mine.home / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


# The colleague knows every default name: torch's own and ours.
_PLANT = 'for name in torchinductor_root holdfast-compile-0; do mkdir "$T/$name"; chmod 777 "$T/$name"; done'
_WHERE = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from jobs.config.settings import Job
from jobs.run.rundir import RunDir
from train.compilation.compile_cache import CompileCache
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

rt = SimpleNamespace(device=torch.device("cpu"), is_main=True)
CompileCache(Job(job_name="t", compile=True), RunDir(Path(sys.argv[1])), rt, lambda text: print(text, file=sys.stderr)).load()
if len(sys.argv) > 2:
    print(float(torch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(8))), file=sys.stderr)
print(cache_dir())
print(triton_cache_dir(0))
"""


def _where(mine: Users, temporary: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return mine.owner(sys.executable, "-c", _WHERE, str(mine.private / "run"), *words, env={"TMPDIR": str(temporary), "USER": "root", "LOGNAME": "root", **env})


def _assert_private(path: Path) -> None:
    facts = os.lstat(path)
    assert facts.st_uid == os.geteuid() and facts.st_mode & 0o777 == 0o700


def test_planted_default_directory_is_not_used(mine: Users, temporary: Path) -> None:
    mine.plant(_PLANT, T=temporary)
    done = _where(mine, temporary)
    assert done.returncode == 0, done.stderr
    inductor, triton = map(Path, done.stdout.split())
    assert os.lstat(inductor).st_uid != COLLEAGUE, "what the colleague put there would be loaded"
    _assert_private(inductor)
    assert triton.is_relative_to(inductor)
    assert "belongs to daemon, not to you" in done.stderr and str(inductor) in done.stderr


@pytest.mark.parametrize("way", ["link", "writable"])
def test_default_directory_that_another_user_controls_is_not_used(mine: Users, temporary: Path, way: str) -> None:
    default = temporary / f"holdfast-compile-{os.geteuid()}"
    if way == "link":
        mine.plant('mkdir "$C/cache"; chmod 777 "$C/cache"; ln -s "$C/cache" "$D"', C=mine.home / "colleague", D=default)
    else:
        default.mkdir()
        default.chmod(0o777)
    done = _where(mine, temporary)
    inductor = Path(done.stdout.split()[0])
    assert inductor != default and inductor.parent == temporary, done.stderr
    _assert_private(inductor)


def test_default_directory_is_private_and_kept(mine: Users, temporary: Path) -> None:
    first, second = (_where(mine, temporary) for _ in range(2))
    assert first.stdout == second.stdout and not first.stderr, first.stderr
    _assert_private(temporary / f"holdfast-compile-{os.geteuid()}")
    assert Path(first.stdout.split()[0]) == temporary / f"holdfast-compile-{os.geteuid()}"


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
@pytest.mark.parametrize("way", ["foreign", "writable", "link", "parent", "own", "missing"])
def test_directory_named_by_a_variable_is_checked(mine: Users, temporary: Path, variable: str, way: str) -> None:
    path = temporary / "cache"
    if way == "foreign":
        mine.plant('mkdir "$D"; chmod 777 "$D"', D=path)
    elif way == "link":
        (mine.private / "cache").mkdir()
        mine.plant('ln -s "$P" "$D"', P=mine.private / "cache", D=path)
    elif way == "parent":
        path = mine.shared / "cache"
        path.mkdir(mode=0o700)
    elif way != "missing":
        path.mkdir()
        path.chmod(0o775 if way == "writable" else 0o755)
    done = _where(mine, temporary, **{variable: str(path)})
    if way in ("own", "missing"):
        assert done.returncode == 0 and str(path) in done.stdout.split(), done.stderr
        return
    assert done.returncode != 0 and f"SettingError: {variable}={path}" in done.stderr and f"unset {variable}" in done.stderr, done.stderr


@pytest.mark.slow
@needs_compiler
def test_compilation_works_beside_a_planted_directory(mine: Users, temporary: Path) -> None:
    mine.plant(_PLANT, T=temporary)
    done = _where(mine, temporary, "compile")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(Path(done.stdout.split()[0]).rglob("*.so"))
    assert not [path for path in temporary.rglob("*") if path.stat().st_uid == os.geteuid() and path.is_relative_to(temporary / "torchinductor_root")]
