"""Files are replaced whole, and never through a link that another user planted."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from colleague import Users, needs_two_users, two_users

from jobs.core import atomic_write
from jobs.core.atomic_write import replace_file


@pytest.fixture
def mine() -> Iterator[Users]:
    with two_users(owner=os.geteuid()) as made:
        yield made


# -- what another user plants -------------------------------------------------------------------------------------------


def _plant_links(mine: Users, names: list[str], to: Path) -> None:
    mine.plant('for name in $NAMES; do ln -s "$TO" "$S/$name"; done', NAMES=Path(" ".join(names)), TO=to, S=mine.shared)


@needs_two_users
@pytest.mark.parametrize("way", ["replace_file", "tokens"])
def test_planted_links_of_temporary_names_are_not_followed(mine: Users, way: str) -> None:
    """Under each name that was used for a temporary file before, with the process id of the command."""
    thesis = mine.private / "thesis.tex"
    thesis.write_text("years of work")
    target = mine.shared / {"replace_file": "page", "tokens": "a.bin"}[way]
    write = {
        "replace_file": "from jobs.core.atomic_write import replace_file; replace_file(target, 'new')",
        "tokens": "import numpy; from train.data.tokens import write_tokens; write_tokens(target, numpy.arange(9), 10)",
    }[way]
    # The colleague reads the process id from /proc while the command starts; here the command waits for the links.
    program = f"""
import os, sys
from pathlib import Path
target = Path({str(target)!r})
print(os.getpid(), flush=True)
sys.stdin.readline()
{write}
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})  # fmt: skip
    assert child.stdout is not None
    pid = child.stdout.readline().strip()
    _plant_links(mine, [f".{target.name}.{pid}", f".{target.name}.{pid}.tmp", f".{target.name}.json.{pid}.tmp"], thesis)
    _, said = child.communicate("go\n", timeout=60)
    assert child.returncode == 0, said
    assert thesis.read_text() == "years of work", "the planted link was followed"
    assert target.is_file() and not target.is_symlink()


@needs_two_users
def test_planted_link_at_the_target_is_replaced(mine: Users) -> None:
    thesis = mine.private / "thesis.tex"
    thesis.write_text("years of work")
    _plant_links(mine, ["page"], thesis)
    replace_file(mine.shared / "page", "new")
    assert thesis.read_text() == "years of work" and (mine.shared / "page").read_text() == "new" and not (mine.shared / "page").is_symlink()


@needs_two_users
def test_planted_loss_curve_of_a_foreign_run_is_not_followed(mine: Users) -> None:
    """A picture that a command draws into a run directory."""
    pytest.importorskip("matplotlib")
    thesis = mine.private / "thesis.tex"
    thesis.write_text("years of work")
    mine.plant('mkdir "$S/run"; ln -s "$T" "$S/run/loss.png"; printf \'{"step":1,"loss":1.0}\\n{"step":2,"loss":0.5}\\n\' >"$S/run/metrics.jsonl"',
               S=mine.shared, T=thesis)  # fmt: skip
    program = (
        "import sys; from pathlib import Path; from jobs.run.rundir import RunDir; from launcher.report import plots; plots.draw(RunDir(Path(sys.argv[1])))"
    )
    done = mine.owner(sys.executable, "-c", program, str(mine.shared / "run"))
    assert done.returncode == 0, done.stderr
    assert thesis.read_text() == "years of work", "the planted link was followed"


# -- the writer itself --------------------------------------------------------------------------------------------------


def test_temporary_name_is_random_exclusive_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *more, **named: opened.append((os.path.basename(path), flags)) or real(path, flags, *more, **named))
    for name in ("a", "ü" * 120):
        replace_file(tmp_path / name, "x")
        replace_file(tmp_path / name, "y", mode=0o600)
        assert (tmp_path / name).read_text() == "y" and (tmp_path / name).stat().st_mode & 0o777 == 0o600
    temporary = [(name, flags) for name, flags in opened if name.startswith(".")]
    assert len({name for name, _ in temporary}) == 4 and all(re.search(r"\.[0-9a-f]{16}$", name) for name, _ in temporary)
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in temporary)


def test_no_temporary_file_is_left_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write.replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_write.replacing_by_path(tmp_path / "a") as path:
        path.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder" / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_library_that_opens_by_path_writes_into_a_private_directory(tmp_path: Path) -> None:
    with atomic_write.replacing_by_path(tmp_path / "trace.json.gz") as path:
        assert path.name == "trace.json.gz" and path.parent.parent == tmp_path and path.parent.stat().st_mode & 0o777 == 0o700
        path.write_text("x")
    assert (tmp_path / "trace.json.gz").read_text() == "x" and len(list(tmp_path.iterdir())) == 1
    with atomic_write.replacing_by_path(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()


def test_file_is_created_once(tmp_path: Path) -> None:
    assert atomic_write.create_file(tmp_path / "stop", "first\n")
    assert not atomic_write.create_file(tmp_path / "stop", "second\n")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert not atomic_write.create_file(tmp_path / "link", "x") and not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "stop").read_text() == "first\n" and sorted(path.name for path in tmp_path.iterdir()) == ["link", "stop"]
