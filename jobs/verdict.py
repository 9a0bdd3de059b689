"""Whether a run goes on after an attempt: a pure function of its ledger and of the budgets in its settings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.contract import Cause, Event

# Causes that say nothing against the run: it goes on as long as it gets forward.
UNLIMITED = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.REQUEUED})
# Causes that another attempt would only meet again, or that a person wished for.
FINAL = frozenset({Cause.FINISHED, Cause.CANCELLED})


@dataclass(frozen=True)
class Verdict:
    """`again` says whether to start another attempt; `reason` is one sentence for the ledger and the terminal."""

    again: bool
    reason: str


@dataclass(frozen=True)
class Budgets:
    """How many attempts in all may end with a cause before the run is given up."""

    node_failure: int = 8
    killed: int = 3
    out_of_memory: int = 0
    code_error: int = 0
    hang: int = 2
    storage: int = 1
    unknown: int = 3
    # Attempts in a row that end at the step they started from, whatever ended them.
    no_progress: int = 3

    def of(self, cause: Cause) -> int:
        return int(getattr(self, cause.value))


def judge(events: Iterable[Mapping[str, Any]], budgets: Budgets) -> Verdict:
    """The verdict after the last `end` event in `events` (ledger lines, oldest first)."""
    ends = [event for event in events if event.get("event") == Event.END]
    if not ends:
        return Verdict(True, "no attempt has ended yet")
    cause = Cause(ends[-1]["cause"])
    if cause in FINAL:
        return Verdict(False, cause.value.replace("_", " "))
    stuck = _attempts_without_progress(ends)
    if stuck >= budgets.no_progress:
        return Verdict(False, f"{stuck} attempts in a row made no progress (budget {budgets.no_progress}); last cause: {cause.value}")
    if cause in UNLIMITED:
        return Verdict(True, f"{cause.value}, and the run makes progress")
    used = sum(1 for end in ends if end["cause"] == cause)
    allowed = budgets.of(cause)
    if used > allowed:
        return Verdict(False, f"{cause.value} for the {_ordinal(used)} time, {allowed} allowed (max_{cause.value})")
    return Verdict(True, f"{cause.value}, {used} of {allowed} allowed")


def _attempts_without_progress(ends: list[Mapping[str, Any]]) -> int:
    """How many of the last attempts left the newest checkpoint where they found it."""
    count = 0
    for end in reversed(ends):
        if int(end.get("saved_step", 0)) > int(end.get("start_step", 0)):
            break
        count += 1
    return count


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
