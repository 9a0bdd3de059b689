"""Whether each sample of an epoch was trained on exactly once: the check over what the ranks wrote down (log_samples).

Steps that an attempt trained and lost are trained again by the next one. What counts is a step's last training: the
attempts of a run are laid over each other, each from the step that it resumed from.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import safe_read
from jobs.core.contract import Event
from jobs.core.errors import DamagedFileError
from jobs.run import event_log
from jobs.run.rundir import RunDir

# Bytes of one rank's file that are read, and faults that are shown.
_LIMIT, _MOST_FAULTS = 2**30, 20


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
    resumed = {int(event["attempt"]): int(event.get("step", 0)) for event in event_log.read(run.ledger) if event["event"] == Event.RESUMED}
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
    trained = sorted({step for step, _ in by_use})
    for before, step in zip([-1, *trained], trained, strict=False):
        if step - before > 2:
            faults.append(f"steps {before + 1} to {step - 1} were never trained")
        elif step - before == 2:
            faults.append(f"step {before + 1} was never trained")
        # An attempt that resumed at or before this step makes all earlier trainings of it void.
        attempts = sorted(attempt for at, attempt in by_use if at == step)
        owners = [attempt for attempt, start in resumed.items() if start <= step]
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
        if count != batch or sorted(slots) != list(range(batch)):
            faults.append(f"step {step} of attempt {keeper}: {count} samples in {len(slots)} places, the batch has {batch}")
        used += count
        for slot, sample in slots.items():
            seen[(step * batch + slot) // samples, sample] += 1
    faults += [f"epoch {epoch}: sample {sample} was used {count} times" for (epoch, sample), count in seen.items() if count != 1]
    epochs = (last + 1) * batch // samples if samples else 0
    used_in = Counter(epoch for epoch, sample in seen if sample < samples)
    for epoch in range(epochs):
        if len(faults) >= _MOST_FAULTS:
            break
        if used_in[epoch] < samples:
            first = next(sample for sample in range(samples) if (epoch, sample) not in seen)
            faults.append(f"epoch {epoch}: {samples - used_in[epoch]} samples were never used, such as {first}")
    return Verdict(last + 1, used, repeated, epochs, tuple(faults[:_MOST_FAULTS]))


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one may be torn by a kill, and its samples were then not used. Raises DamagedFileError for values of wrong types."""
    records = []
    for number, text in safe_read.lines(path, _LIMIT):
        line = safe_read.parse_line(text, f"{path}: line {number}")
        if line is None:
            continue
        counts, lists = ("step", "attempt", "samples", "batch"), ("slots", "ids")
        wrong = [name for name in counts if not safe_read.is_count(line.get(name))] + [name for name in lists if not _is_counts(line.get(name))]
        if wrong or len(line["slots"]) != len(line["ids"]) or line["samples"] == 0:
            name = (wrong or ["ids" if line["samples"] else "samples"])[0]
            raise DamagedFileError(f"{path}: line {number}: {name} is {safe_read.describe(line.get(name))}; allowed: what LOG_SAMPLES writes")
        records.append(line)
    return records


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(safe_read.is_count(item) for item in value)
