"""What is installed, and from what: pinned versions, the environment file, and what the wheel carries."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from pins import FILE, GROUPS, PYTHON, canonical, changes, chosen, read, written
from repeat import failed_tests, summary

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = read((REPOSITORY / FILE).read_text())


# -- versions ----------------------------------------------------------------------------------------------------------


def wanted() -> list[Requirement]:
    """What `make setup` asks pip for."""
    groups = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for group in GROUPS for line in groups[group])]]


def test_every_requirement_has_a_pin_that_satisfies_it() -> None:
    wrong = [str(need) for need in wanted() if not need.specifier.contains(PINS.get(canonical(need.name), "0"), prereleases=True)]
    assert not wrong


def test_what_the_requirements_need_in_turn_is_pinned_too() -> None:
    """Followed through what is installed here, as far as that is what the pins say."""
    environment = {"python_version": ".".join(map(str, PYTHON)), "python_full_version": ".".join(map(str, PYTHON)) + ".0"}
    todo = [(canonical(need.name), frozenset(need.extras)) for need in wanted()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if here.version.partition("+")[0] != PINS.get(name):
            continue
        for need in map(Requirement, here.requires or []):
            if need.marker is None or any(need.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)):
                todo.append((canonical(need.name), frozenset(need.extras)))
    names = {name for name, _ in seen if not re.match(r"nvidia-|cuda-|triton$", name)}
    assert names <= PINS.keys(), f"no pin for {sorted(names - PINS.keys())}; `make pins` renews them"
    assert len(names) > 60


def test_pins_are_plain_versions_that_any_index_can_serve() -> None:
    text = (REPOSITORY / FILE).read_text()
    assert text == written(PINS)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in text.splitlines() if not line.startswith("#"))
    assert PROJECT["name"] not in PINS


def test_the_environment_file_asks_for_what_the_project_asks_for_in_the_pinned_versions() -> None:
    text = (REPOSITORY / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    assert environment["name"] == PROJECT["name"] and environment["channels"] == ["conda-forge"]
    by_pip = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert by_pip == [[f"--constraint {FILE}", *PROJECT["dependencies"]]]
    assert f"python={PYTHON[0]}.{PYTHON[1]}" in environment["dependencies"] and "pip" in environment["dependencies"]
    assert PROJECT["requires-python"] == f">={PYTHON[0]}.{PYTHON[1]}"
    assert not [entry for entry in by_pip[0] if "transformer" in entry] and "isolation" in text and "make te" in text


def test_make_setup_installs_what_is_pinned() -> None:
    text = (REPOSITORY / "launcher/setup.sh").read_text()
    assert f"-e '.[{','.join(GROUPS)}]'" in text and FILE in text and f"sys.version_info[:2] != ({PYTHON[0]}, {PYTHON[1]})" in text
    assert "torch==" not in text.replace("'^torch=='", ""), "the version of torch has its home in constraints.txt"


def test_a_report_of_pip_becomes_pins() -> None:
    def item(name: str, version: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": version}}

    report = {"install": [item("torch", "2.13.0+cpu"), item("Jinja2", "3.1.6"), item("nvidia-nccl-cu13", "2.28.1"), item("triton", "3.7.0"), item("own", "1")]}
    pins = chosen(report, "own")
    assert pins == {"jinja2": "3.1.6", "torch": "2.13.0"} and read(written(pins)) == pins
    assert changes({"torch": "2.12.0", "six": "1.17.0"}, pins) == ["jinja2  new -> 3.1.6", "six  1.17.0 -> gone", "torch  2.12.0 -> 2.13.0"]


# -- targets for people who change it --------------------------------------------------------------------------------------


def test_the_repeated_suite_says_which_test_failed_how_often(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x"><failure message="assert 1 == 2&#10;more">...</failure></testcase>'
        '<testcase classname="tests.test_a" name="test_y"><error message="no lab"/></testcase><testcase classname="tests.test_a" name="test_z"/></testsuite></testsuites>'
    )
    assert failed_tests(report) == {"tests.test_a::test_x": "assert 1 == 2", "tests.test_a::test_y": "no lab"}
    lines = summary(10, {"a": ["once"], "b": ["often", "often", "else"]})
    assert lines[1:] == ["  3 of 10  b  often", "  1 of 10  a  once"]
    assert summary(10, {}) == ["10 rounds, no test failed"]


def test_the_fast_tests_leave_out_what_is_long_and_keep_the_rest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--fast", "--collect-only", "-q", "tests"], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    counts = {name: int(count) for name, count in re.findall(r"^tests/(test_\w+)\.py: (\d+)$", done.stdout, re.M)}
    assert counts["test_render"] > 20 and counts["test_commands"] > 20 and sum(counts.values()) > 1000, done.stdout + done.stderr
    assert not {"test_resume", "test_slurm_runs", "test_models"} & counts.keys()
