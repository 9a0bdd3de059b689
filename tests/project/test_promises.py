"""docs/promises.md names tests that exist."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TESTS = sorted((REPO / "tests").rglob("test_*.py"))


def test_every_test_that_the_promises_name_exists() -> None:
    text = (REPO / "docs" / "promises.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {name for path in TESTS for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)}
    assert len(named) > 20
    assert not named - defined
    assert not {name for name in re.findall(r"`(test_\w+\.py)`", text) if name not in {path.name for path in TESTS}}
