"""What is installed, and from what: pinned versions, the environment file, and what the wheel carries."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, SMALL, pytest_collection_modifyitems, pytest_ignore_collect
from packaging.requirements import Requirement

from tools.pins import FILE, GROUPS, OF_TORCH, PYTHON, canonical, changes, chosen, read, written
from tools.repeat import failed_tests, summary

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = ("jobs", "slurm", "launcher", "train")
PINS = read((REPOSITORY / FILE).read_text())


# -- versions ----------------------------------------------------------------------------------------------------------


def wanted() -> list[Requirement]:
    """What `make setup` asks pip for."""
    groups = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for group in GROUPS for line in groups[group])]]


def test_every_requirement_has_a_pin_that_satisfies_it() -> None:
    wrong = [
        str(need) for need in wanted() if not OF_TORCH.match(need.name) and not need.specifier.contains(PINS.get(canonical(need.name), "0"), prereleases=True)
    ]
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
    names = {name for name, _ in seen if not OF_TORCH.match(name)}
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


# -- the wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the backend that pip would call, in this process: a second instead of ten."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling; `make setup` installs it")
    return Path(next(builder.WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])))


def test_the_wheel_carries_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(REPOSITORY).as_posix() for folder in PACKAGES for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert inside == wanted | {"holdfast.py"}
    # Of each kind that a command reads: job files, sweeps, site files, templates, the script by hand, the page of a report.
    kinds = ["jobs/quickstart.yaml", "jobs/sweeps/precision.yaml", "slurm/sites/generic.yaml", "slurm/script/templates/train.sbatch.j2", "slurm/train.sbatch"]
    assert {*kinds, "launcher/report/templates/report.html.j2", *(f"{folder}/py.typed" for folder in PACKAGES)} <= inside


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        said = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    assert (said["Name"], said["Version"], said["License-Expression"]) == (PROJECT["name"], PROJECT["version"], PROJECT["license"])
    assert said["Requires-Python"] == PROJECT["requires-python"] and said["Description-Content-Type"] == "text/markdown"
    assert "holdfast = launcher.cli.app:main" in entry
    assert said.get_all("Project-URL") is None, "an address must be real; add the check that it answers"


def test_the_version_has_one_home() -> None:
    number = re.compile(rf"\b{re.escape(PROJECT['version'])}\b")
    code = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    assert not [str(path) for path in [*code, REPOSITORY / "holdfast.py"] if number.search(path.read_text())]
    assert f"## {PROJECT['version']}" in (REPOSITORY / "CHANGELOG.md").read_text(), "CHANGELOG.md has no section of this version"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has its dependencies and nothing of the repository: settings, script and a training on the CPU."""
    home, away = tmp_path / "env", tmp_path / "away"
    away.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = next((home / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # What it depends on comes from here, behind it on the path; no network is needed for that. site.addsitedir would read the .pth of an editable install.
    (packages / "zz_dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    (home / "bin/holdfast").write_text(f"#!{home}/bin/python\nimport sys\nfrom launcher.cli.app import main\nsys.exit(main())\n")
    (home / "bin/holdfast").chmod(0o755)
    environ = {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(away), "LANG": "C.UTF-8"}

    def said(*command: str) -> str:
        done = subprocess.run(command, cwd=away, env=environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    for package in PACKAGES:
        assert said(f"{home}/bin/python", "-c", f"import {package}; print({package}.__file__)").startswith(str(home))
    assert "submit" in said("holdfast", "--help") and "#SBATCH" in said("holdfast", "render") and "batch_size" in said("holdfast", "explain")
    small = [f"{key}={value}" for key, value in {**SMALL, "MAX_STEPS": "20", "EVAL_EVERY": "10", "CHECKPOINT_EVERY": "10"}.items()]
    said("holdfast", "run", "jobs/quickstart.yaml", "DEVICE=cpu", *small)
    (run,) = (away / "runs").iterdir()
    assert (run / "checkpoints/step-00000020").is_dir() and (run / "code/train/__main__.py").is_file() and (run / "code/slurm/script/templates").is_dir()
    assert "finished" in said("holdfast", "status")
    assert "report.html" in said("holdfast", "report")


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
    config: Any = SimpleNamespace(getoption=lambda name: name == "--fast", hook=SimpleNamespace(pytest_deselected=lambda items: None))
    left_out = {path.name for path in (REPOSITORY / "tests").rglob("test_*.py") if pytest_ignore_collect(path, config)}
    assert {"test_resume.py", "test_models.py", "test_gpu.py"} <= left_out and not {"test_render.py", "test_commands.py", "test_watch.py"} & left_out

    def item(name: str, marker: str = "", fixture: str = "") -> Any:
        return SimpleNamespace(path=Path(name), get_closest_marker=lambda asked: asked == marker, fixturenames=[fixture])

    quick, starts, boots = item("test_a.py"), item("test_a.py", marker="trains"), item("test_a.py", fixture="cluster")
    items = [quick, starts, boots]
    pytest_collection_modifyitems(config, items)
    assert items == [quick]
