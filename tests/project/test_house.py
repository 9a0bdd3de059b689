"""docs/explanation/architecture.md: its pictures and tables are current. Every file, function and test that any page names exists."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "explanation" / "architecture.md"
# ADRs describe the code at their date; every other page describes it now.
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *(path for path in sorted((REPO / "docs").rglob("*.md")) if path.parent.name != "adr")]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


draw = _load(REPO / "tools" / "draw.py")


@cache
def names_in(file: str) -> frozenset[str]:
    """`f`, `C`, `C.method` and assigned names of a Python file."""
    found: set[str] = set()
    for node in ast.parse((REPO / file).read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {node.name, *(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    return frozenset(found)


def missing(place: str) -> str:
    """What is wrong with `path.py:name` or `path`; empty where it exists."""
    file, colon, name = place.partition(":")
    if not (REPO / file).is_file():
        return f"{file} does not exist"
    return f"{file} has no {name}" if colon and name not in names_in(file) else ""


def test_pictures_and_tables_are_what_the_tree_says_now() -> None:
    stale = [name for name, text in draw.generated().items() if not (REPO / name).exists() or (REPO / name).read_text("utf-8") != text]
    assert not stale, f"{', '.join(stale)}: `make golden` writes them anew; look at the difference, and at the pictures"


@pytest.mark.parametrize("walk", draw.WALKS, ids=lambda walk: walk.name)
def test_every_station_of_a_walk_exists(walk: "draw.Walk") -> None:
    assert len(walk.steps) >= 10
    assert not [fault for step in walk.steps if (fault := missing(step.place))]
    assert {step.lane for step in walk.steps} == set(range(len(walk.lanes)))


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("walked")
    done = subprocess.run([sys.executable, str(REPO / "tests" / "support" / "walked.py"), str(folder)], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.trains
@pytest.mark.parametrize("walk", draw.WALKS, ids=lambda walk: walk.name)
def test_a_run_comes_by_the_stations_of_a_walk_in_their_order(walk: "draw.Walk", calls: list[str]) -> None:
    """A class is left out: making one is no call of Python."""
    places = [step.place for step in walk.steps if step.always and ":" in step.place and not step.place.rpartition(":")[2].istitle()]
    assert len(places) >= 10
    at = 0
    for place in places:
        assert place in calls[at:], f"{place} is {'called earlier only' if place in calls else 'never called'}"
        at = calls.index(place, at) + 1


def test_every_file_and_function_on_the_pages_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    places = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|j2|yaml)(?::[\w.]+)?|Makefile)`", text)
    places = [place for place in places if "/" in place or place in ("Makefile", "holdfast.py")]  # not job.yaml, which a run has
    assert len(places) > 150
    assert not [fault for place in sorted(set(places)) if "NAME" not in place and (fault := missing(place))]
    assert all((REPO / place).parent.is_dir() for place in places if "NAME" in place)


def test_the_check_of_names_finds_what_does_not_exist() -> None:
    assert not missing("train/train_step.py:TrainStep.__call__") and not missing("jobs/specs/precision.py:MODES")
    assert missing("train/train_step.py:TrainStep.walk") and missing("train/steps.py") and missing("jobs/run/rundir.py:run")


def test_every_module_says_what_it_is_in_one_line() -> None:
    said = draw.modules()
    assert set(said) >= {"jobs/config/settings.py", "train/data/order.py", "holdfast.py"}
    assert not {name: line for name, line in said.items() if not line or len(line) > 300}


def test_a_typical_change_touches_three_files_at_most_and_is_proven_by_tests_that_exist() -> None:
    text = PAGE.read_text()
    rows = [line.split("|")[1:-1] for line in text[text.index("## Ten changes") :].splitlines() if line.startswith("| ")][1:]
    tests = "".join(path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    assert len(rows) >= 10
    for change, files, proof in rows:
        # A command has its function in one of three modules.
        named = {re.sub(r"launcher/cli/\w+", "launcher/cli/", place) for place in re.findall(r"`([\w./]+)`", files)}
        assert 1 <= len(named) <= 3, change
        for test in re.findall(r"`(test_\w+)`", proof):
            assert f"def {test}(" in tests, (change, test)
        assert "`" in proof, change


@pytest.mark.parametrize("name", [name for name in draw.generated() if name.endswith(".svg")])
def test_a_picture_is_whole_and_can_be_read_in_light_and_dark(name: str) -> None:
    root = xml.fromstring((REPO / name).read_text())
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    assert wide <= 1200 and "prefers-color-scheme: dark" in (REPO / name).read_text()
    for part in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(part.attrib.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and 0 <= y and x + w <= wide and y + h <= high
