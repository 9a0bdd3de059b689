"""tests/promises.yaml names tests and files that exist, and docs/evidence/promises.md shows all of it."""

import re
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[2]
TESTS = sorted((REPO / "tests").rglob("test_*.py"))
ENTRIES = [entry for entries in yaml.safe_load((REPO / "tests" / "promises.yaml").read_text()).values() for entry in entries]


def test_every_test_that_the_promises_name_exists() -> None:
    named = {test for entry in ENTRIES for test in entry["tests"]}
    defined = {name for path in TESTS for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)} | {path.name for path in TESTS}
    assert len(named) > 100
    assert not named - defined


def test_every_promise_has_a_proof_and_names_code_that_exists() -> None:
    assert len(ENTRIES) > 60
    for entry in ENTRIES:
        assert entry["tests"] or entry.get("also"), entry["promise"]
        assert entry["code"] and all(list(REPO.glob(place)) for place in entry["code"]), entry


def test_the_page_shows_every_promise() -> None:
    page = (REPO / "docs" / "evidence" / "promises.md").read_text()
    assert not [entry["promise"] for entry in ENTRIES if entry["promise"] not in page]
