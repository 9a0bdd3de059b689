"""Whether a run goes on after an attempt: a pure function of its ledger and of the budgets in its settings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.core.contract import Cause, Event

if TYPE_CHECKING:  # what watches over training loads no pydantic
    from jobs.config.settings import Job

# Causes that say nothing against the run: it goes on as long as it gets forward.
UNLIMITED = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.REQUEUED})
# Causes that another attempt would only meet again, or that a person or a sweep wished for.
FINAL = frozenset({Cause.FINISHED, Cause.CANCELLED, Cause.PRUNED})
# Ended from outside. Such an attempt that had not yet made a step says nothing about the run either: on a busy cluster a job
# may be thrown out while it still imports. So many times the budget of attempts without progress are allowed to end so.
_OUTSIDE = frozenset({Cause.PREEMPTED, Cause.REQUEUED, Cause.NODE_FAILURE})
_OUTSIDE_FACTOR = 10
# How the evidence begins where a person's script left with 75 although nobody had asked it to stop.
BY_OWN_WISH = "your script asked to be started again"
# Seconds. A shorter attempt that ended so, and whose saves nobody sees, counts as one without progress: a script that leaves with 75
# whatever happens would otherwise be started for ever. One that trains in pieces takes longer for each.
_SHORT_S = 300


@dataclass(frozen=True)
class Verdict:
    """`again` says whether to start another attempt; `reason` is one sentence for the ledger and the terminal."""

    again: bool
    reason: str


@dataclass(frozen=True)
class Budgets:
    """How many attempts in all may end with a cause before the run is given up."""

    node_failure: int
    killed: int
    out_of_memory: int
    code_error: int
    hang: int
    storage: int
    unknown: int
    # Attempts in a row that end at the step they started from, whatever ended them.
    no_progress: int

    def of(self, cause: Cause) -> int:
        return int(getattr(self, cause.value))


def budgets_of(job: "Job") -> Budgets:
    return Budgets(
        node_failure=job.max_node_failure,
        killed=job.max_killed,
        out_of_memory=job.max_out_of_memory,
        code_error=job.max_code_error,
        hang=job.max_hang,
        storage=job.max_storage,
        unknown=job.max_unknown,
        no_progress=job.max_no_progress,
    )


def judge(events: Iterable[Mapping[str, Any]], budgets: Budgets) -> Verdict:
    """The verdict after the last `end` event in `events` (ledger lines, oldest first).

    A person who submits or resumes a run starts its budgets anew: what came before the last `submitted` event counts no
    more. An attempt that two wrote the end of (itself, late, and its successor) counts once, by the first end."""
    cancelled = False
    ends: dict[int, Mapping[str, Any]] = {}
    known: set[int] = set()
    for event in events:
        if event.get("event") == Event.SUBMITTED:
            # sbatch returns before this line is written: a quick job may have ended by then, and that end counts.
            ends = {number: end for number, end in ends.items() if end.get("job_id") == event.get("job_id")}
            cancelled = False
        elif event.get("event") == Event.CANCEL:
            cancelled = True
        elif event.get("event") == Event.END and event.get("attempt") not in known:
            known.add(event["attempt"])
            ends[event["attempt"]] = event
    if not ends:
        return Verdict(not cancelled, "cancelled" if cancelled else "no attempt has ended yet")
    last = list(ends.values())
    cause = cause_of(last[-1])
    if cause in FINAL:
        return Verdict(False, cause.value)
    if cancelled:
        return Verdict(False, "cancelled")
    stuck, early = _without_progress(last)
    if stuck >= budgets.no_progress:
        return Verdict(False, f"{stuck} attempts in a row made no progress (max_no_progress {budgets.no_progress}); last cause: {cause.value}")
    if early >= budgets.no_progress * _OUTSIDE_FACTOR:
        return Verdict(False, f"{early} attempts in a row ended before their first step; last cause: {cause.value}")
    if cause in UNLIMITED:
        return Verdict(True, f"{cause.value}, and the run makes progress")
    used = sum(1 for end in last if cause_of(end) is cause)
    allowed = budgets.of(cause)
    if used > allowed:
        return Verdict(False, f"{cause.value} for the {_ordinal(used)} time, {allowed} allowed (max_{cause.value})")
    return Verdict(True, f"{cause.value}, {used} of {allowed} allowed")


def cause_of(end: Mapping[str, Any]) -> Cause:
    """The cause in an `end` event; `unknown` for a word that this version does not know."""
    try:
        return Cause(str(end.get("cause")))
    except ValueError:
        return Cause.UNKNOWN


def _without_progress(ends: list[Mapping[str, Any]]) -> tuple[int, int]:
    """Of the last attempts in a row that left the newest checkpoint where they found it: how many had made steps or ended
    by themselves, and how many were ended from outside before their first step."""
    stuck = early = 0
    for end in reversed(ends):
        start = _number(end, "start_step")
        own_wish = str(end.get("evidence")).startswith(BY_OWN_WISH)
        # None: a person's own script, which saves where nobody sees it.
        unseen = end.get("saved_step", 0) is None and not (own_wish and _number(end, "seconds") < _SHORT_S)
        if unseen or _number(end, "saved_step") > start:
            break
        if cause_of(end) in _OUTSIDE and not own_wish and _number(end, "step") <= start:
            early += 1
        else:
            stuck += 1
    return stuck, early


def _number(end: Mapping[str, Any], name: str) -> int:
    value = end.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _ordinal(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
