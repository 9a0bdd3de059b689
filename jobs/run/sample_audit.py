"""Whether each sample of an epoch was trained on exactly once: the check over what the ranks wrote down (log_samples).

Steps that an attempt trained and lost are trained again by the next one. What counts is a step's last training: the
attempts of a run are laid over each other, each from the step that it resumed from.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core.contract import Event
from jobs.run import event_log
from jobs.run.rundir import RunDir


@dataclass(frozen=True)
class Verdict:
    """`faults` is empty when all is well. `repeated` counts uses of samples in steps that were lost and trained again."""

    steps: int
    used: int
    repeated: int
    epochs: int
    faults: tuple[str, ...]


def of_run(run: RunDir) -> Verdict:
    """The verdict over a run whose ranks logged their samples."""
    resumed = {int(event["attempt"]): int(event["step"]) for event in event_log.read(run.ledger) if event["event"] == Event.RESUMED}
    return check(lines_of(run), resumed)


def lines_of(run: RunDir) -> list[dict[str, Any]]:
    """What all ranks of all attempts wrote down."""
    return [line for path in sorted((run.path / "attempts").glob("*/samples.*.jsonl")) for line in _read(path)]


def check(lines: Iterable[Mapping[str, Any]], resumed: Mapping[int, int]) -> Verdict:
    """`lines`: one per rank, attempt and step. `resumed`: the step that each attempt went on from."""
    by_use: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        by_use.setdefault((int(line["step"]), int(line["attempt"])), []).append(line)
    faults = []
    for step, attempt in by_use:
        if attempt not in resumed or step < resumed[attempt]:
            faults.append(f"attempt {attempt} trained step {step}, but resumed from {resumed.get(attempt)}")
    last = max((step for step, _ in by_use), default=-1)
    used = repeated = 0
    # (epoch, sample) -> uses, over the steps that count
    seen: Counter[tuple[int, int]] = Counter()
    samples = batch = 0
    for step in range(last + 1):
        # An attempt that resumed at or before this step makes all earlier trainings of it void.
        attempts = sorted(attempt for at, attempt in by_use if at == step)
        owners = [attempt for attempt, start in resumed.items() if start <= step]
        if not attempts:
            faults.append(f"step {step} was never trained")
            continue
        keeper = attempts[-1]
        later = [attempt for attempt in owners if attempt > keeper]
        if later and any(at > step for at, attempt in by_use if attempt in later):
            faults.append(f"step {step} was lost by attempt {keeper} and skipped by attempt {later[0]}")
        kept = by_use[step, keeper]
        repeated += sum(len(line["ids"]) for attempt in attempts[:-1] for line in by_use[step, attempt])
        slots = {int(slot): int(sample) for line in kept for slot, sample in zip(line["slots"], line["ids"], strict=True)}
        count = sum(len(line["ids"]) for line in kept)
        sizes = {(int(line["samples"]), int(line["batch"])) for line in kept}
        if len(sizes) != 1 or (samples and sizes != {(samples, batch)}):
            faults.append(f"step {step}: data or batch size changed: {sorted(sizes)}")
            continue
        samples, batch = sizes.pop()
        if sorted(slots) != list(range(batch)) or count != batch:
            faults.append(f"step {step} of attempt {keeper}: {count} samples in {len(slots)} places, the batch has {batch}")
        used += count
        for slot, sample in slots.items():
            seen[(step * batch + slot) // samples, sample] += 1
    faults += [f"epoch {epoch}: sample {sample} was used {count} times" for (epoch, sample), count in seen.items() if count != 1]
    epochs = (last + 1) * batch // samples if samples else 0
    for epoch in range(epochs):
        missing = [sample for sample in range(samples) if (epoch, sample) not in seen]
        if missing:
            faults.append(f"epoch {epoch}: {len(missing)} samples were never used, such as {missing[0]}")
    return Verdict(last + 1, used, repeated, epochs, tuple(faults[:20]))


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one may be torn by a kill, and its samples were then not used."""
    lines = []
    for text in path.read_text().split("\n")[:-1]:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
