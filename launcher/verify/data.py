"""`holdfast verify data`: whether a run used every sample of its data as often as it should have."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from jobs.core.contract import Exit
from jobs.core.errors import SettingError
from jobs.run import sample_audit
from jobs.run.rundir import RunDir


def verify_data(run: RunDir, as_json: bool) -> int:
    """Whether each sample of an epoch was used exactly once over the steps that count."""
    if not any(True for _ in _logs(run)):
        raise SettingError(f"run {run.id} wrote down no samples; LOG_SAMPLES=true makes it do so")
    verdict = sample_audit.of_run(run)
    if as_json:
        print(json.dumps(asdict(verdict)))
    else:
        for fault in verdict.faults:
            print(fault)
        how = "NOT every sample once" if verdict.faults else "every sample once per epoch"
        print(
            f"{verdict.steps} steps, {verdict.used:,} samples over {verdict.epochs} whole epochs: {how}; {verdict.repeated:,} used again in steps that were lost and trained again"
        )
    return Exit.FAILED if verdict.faults else Exit.DONE


def _logs(run: RunDir) -> Iterator[Path]:
    return (run.path / "attempts").glob("*/samples.*.jsonl")
