"""When Slurm would start a job, from the sentence of `sbatch --test-only`."""

import re
from datetime import datetime


def start_estimate(said: str) -> str:
    """`estimated 14:20 (in 35 min)` from sbatch --test-only's own sentence."""
    found = re.search(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", said)
    if not found:
        return said
    begins = datetime.fromisoformat(found.group(1))
    seconds = (begins - datetime.now()).total_seconds()
    if seconds < 60:
        return "at once, Slurm estimates"
    away = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"estimated {begins:%H:%M}" + (f" on {begins:%a %d %b}" if seconds > 43_200 else "") + f" (in {away})"
