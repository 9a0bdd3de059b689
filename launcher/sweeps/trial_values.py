"""The values of a trial as its trial.json has them."""

import json
from typing import Any

from jobs.run.rundir import RunDir


def values_of(run: RunDir) -> tuple[dict[str, Any], str]:
    """The values that a trial was given, as label -> value, and why they cannot be run; both empty before it has begun."""
    try:
        said = json.loads(run.trial.read_text())
        return dict(said["values"]), str(said.get("problem", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return {}, ""
