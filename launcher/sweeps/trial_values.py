"""The values of a trial as its trial.json has them."""

from typing import Any

from jobs.core import safe_read
from jobs.core.errors import DamagedFileError
from jobs.run.rundir import RunDir


def values_of(run: RunDir) -> tuple[dict[str, Any], str]:
    """The values that a trial was given, as label -> value, and why they cannot be run; both empty before it has begun. Raises DamagedFileError."""
    try:
        record = safe_read.read_object(run.trial)
    except FileNotFoundError:
        return {}, ""
    values = record.get("values")
    if not isinstance(values, dict) or any(isinstance(value, dict | list) for value in values.values()):
        raise DamagedFileError(f"{run.trial}: values is {safe_read.describe(values)}; allowed: a value for each setting of the sweep")
    return values, str(record.get("problem", ""))
