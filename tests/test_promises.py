"""docs/promises.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_every_test_that_the_promises_name_exists() -> None:
    text = (HERE.parent / "docs" / "promises.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)}
    assert len(named) > 20
    assert not named - defined
    assert not {name for name in re.findall(r"`(test_\w+\.py)`", text) if not (HERE / name).exists()}
