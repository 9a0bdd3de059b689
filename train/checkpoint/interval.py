"""Checkpoint interval for CHECKPOINT_EVERY=auto: Young's interval from the cost of a save and the failure rate of this run.

Young 1974: T = sqrt(2 C M), where C is the time that training stands still for a save and M the mean time between stops that
come without a usable warning. A warned stop (preemption with a signal, time limit) saves first and loses nothing, so it does not
count. M comes from the run's own ledger, with what the site says of its nodes as a prior worth one failure.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.config.settings import Job
from jobs.core.contract import Cause, Event

# Beside the optimum by a factor of two costs less than half a percent, so the ends need not be exact.
LEAST_S, MOST_S = 120.0, 1800.0
_UNWARNED = frozenset({Cause.KILLED, Cause.NODE_FAILURE, Cause.HANG, Cause.OUT_OF_MEMORY, Cause.CODE_ERROR, Cause.STORAGE, Cause.UNKNOWN})


@dataclass(frozen=True)
class History:
    """Hours of training and stops without a usable warning, from the event log."""

    hours: float
    failures: int

    def mean_hours(self, prior_hours: float) -> float:
        """Expected hours between failures: the mean of a Gamma posterior whose prior is one failure in `prior_hours`."""
        return (self.hours + prior_hours) / (self.failures + 1)


def history_of(events: Iterable[Mapping[str, Any]]) -> History:
    ends = [event for event in events if event.get("event") == Event.END]
    return History(
        hours=sum(float(end.get("seconds", 0.0)) for end in ends) / 3600,
        failures=sum(1 for end in ends if end["cause"] != Cause.FINISHED and (end["cause"] in _UNWARNED or int(end.get("lost_steps", 0)) > 0)),
    )


def choose(cost_s: float | None, write_s: float | None, history: History, prior_hours: float) -> tuple[float, str]:
    """Return the seconds between saves, and the reason. `cost_s` is None before the first save, which comes soon, to be measured."""
    mean_h = history.mean_hours(prior_hours)
    if cost_s is None or write_s is None:
        return LEAST_S, f"{LEAST_S:.0f} s until the first save, whose cost is not known yet"
    best = math.sqrt(2 * cost_s * mean_h * 3600)
    floor, word = max((LEAST_S, "the least"), (10 * cost_s, "ten times the cost"), (write_s, "the time to write one"))
    chosen = min(max(best, floor), max(MOST_S, floor))
    why = f"sqrt(2 x {cost_s:.2f} s x {mean_h:.1f} h) = {best:.0f} s; {history.failures} unannounced stops in {history.hours:.1f} h, prior one in {prior_hours:.0f} h"
    if chosen != best:
        why += f"; held to {word if chosen == floor else 'the most'}, {chosen:.0f} s"
    return chosen, why


class SaveCosts(Protocol):
    """Measurements of a CheckpointManager: the step of the newest checkpoint, and seconds of the last save, None before the first.

    last_seconds: from its begin to its commit. last_blocked: that training stood still for it."""

    saved: int | None
    last_seconds: float | None
    last_blocked: float | None


class YoungInterval:
    """Time-based checkpoint interval. Without `auto` no save is ever due; the loop counts steps instead."""

    def __init__(self, job: Job, events: Iterable[Mapping[str, Any]], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._auto = job.checkpoint_every == "auto"
        self._history = history_of(events)
        self._prior = prior_hours(job.node_mtbf_days, job.nodes)
        self._say, self._clock = say, clock
        self._since = clock()
        self._logged: float | None = None

    def due(self, step: int, costs: SaveCosts) -> bool:
        if not self._auto or step == costs.saved:
            return False
        seconds, why = choose(costs.last_blocked, costs.last_seconds, self._history, self._prior)
        # Log the interval at start-up and whenever it changes by more than 2x.
        if self._logged is None or not 0.5 < seconds / self._logged < 2:
            self._logged = seconds
            self._say(f"  checkpoint every {seconds:.0f} s: {why}")
        return self._clock() - self._since >= seconds

    def saved(self) -> None:
        self._since = self._clock()


def prior_hours(node_mtbf_days: float, nodes: int) -> float:
    """Hours until one of so many nodes fails, as the site has it."""
    return node_mtbf_days * 24 / nodes
