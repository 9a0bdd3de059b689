"""The learning rate as a pure function of the optimizer step.

There is no scheduler object: nothing to step, to save or to restore, and no way for the rate to depend on the number of
processes, on accumulation, or on the order in which things were built after a restart.

A curve has a warm-up of `warmup_steps` and a main phase. `total_iters` (default: the whole run) is the length of both
together; `T_0` and `T_max` count steps of the main phase only and win over it. Up to its end the curve is that of
torch's `SequentialLR([LinearLR(start_factor=1e-10, total_iters=warmup_steps), main], milestones=[warmup_steps])` with
main = `ConstantLR(factor=1)`, `LinearLR(1 -> min_lr / base_lr)`, `CosineAnnealingLR` or `CosineAnnealingWarmRestarts`.
Past its end the curve stays where it ended: it never climbs back, and a restart that falls exactly on the end of the
run does not happen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jobs.core.errors import SettingError
from jobs.core.imports import unknown

KINDS = ("constant", "linear", "cosine", "cosine_with_restarts", "wsd")

# torch refuses a start factor of 0, so warm-up starts here: step 0 trains at practically nothing.
WARMUP_START = 1e-10
DEFAULT_DECAY_PCT = 0.1
# A float ends at 2**1024.
_MOST_DOUBLINGS = 1023

_USED_BY = {
    "T_0": ("cosine_with_restarts",),
    "T_mult": ("cosine_with_restarts",),
    "num_cycles": ("cosine_with_restarts",),
    "T_max": ("cosine",),
    "decay_steps": ("wsd",),
    "decay_pct": ("wsd",),
    "min_lr": ("linear", "cosine", "cosine_with_restarts", "wsd"),
    "total_iters": ("linear", "cosine", "cosine_with_restarts", "wsd"),
}


@dataclass(frozen=True)
class LRSchedule:
    """What the curve depends on, and nothing else. Lengths are optimizer steps.

    kind: one of KINDS.                     base_lr: the peak, reached at step `warmup_steps`.
    total_steps: length of the run.         warmup_steps: linear rise from base_lr * 1e-10.
    min_lr: where decay ends (torch calls it eta_min).
    total_iters: length of warm-up and decay together; None: total_steps.
    T_max: length of the decay of `cosine`. T_0, T_mult: first cycle of `cosine_with_restarts`, and the factor from one
    cycle to the next. num_cycles: that many whole cycles fill the main phase; beside T_0: no restart after that many.
    decay_steps or decay_pct (share of total_iters, default 0.1): the final linear decay of `wsd`.

    Raises SettingError for a combination that describes no curve."""

    kind: str
    base_lr: float
    total_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0
    total_iters: int | None = None
    T_0: int | None = None
    T_max: int | None = None
    T_mult: int = 1
    num_cycles: int | None = None
    decay_steps: int | None = None
    decay_pct: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("lr_scheduler", self.kind, KINDS)
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise SettingError(f"lr: {self.base_lr} is not a rate; it must be finite and above 0")
        if not 0 <= self.min_lr <= self.base_lr:
            raise SettingError(f"eta_min (min_lr): {self.min_lr} must be between 0 and lr {self.base_lr}")
        for name in ("total_steps", "total_iters", "T_0", "T_max", "T_mult", "num_cycles", "decay_steps"):
            value = getattr(self, name)
            if value is not None and (int(value) != value or value < 1):
                raise SettingError(f"{name}: {value} is not allowed; it must be a whole number of at least 1")
        if int(self.warmup_steps) != self.warmup_steps or not 0 <= self.warmup_steps <= self.horizon:
            raise SettingError(
                f"warmup_steps: {self.warmup_steps} is not allowed; it must be a whole number from 0 to {self.horizon} (total_iters, or the length of the run)"
            )
        if self.decay_steps is not None and self.decay_pct is not None:
            raise SettingError("decay_steps and decay_pct say the same thing; give one of them")
        if self.decay_pct is not None and not 0 < self.decay_pct <= 1:
            raise SettingError(f"decay_pct: {self.decay_pct} must be above 0 and at most 1")
        if self.kind == "cosine_with_restarts" and self.T_0 is None and self.num_cycles is not None and self.T_mult > 1:
            # Beyond that, how many first cycles the main phase is long is a number that no float holds.
            most = max(1, int(_MOST_DOUBLINGS / math.log2(self.T_mult)))
            if self.num_cycles > most:
                raise SettingError(
                    f"num_cycles: {self.num_cycles} is not allowed with T_mult {self.T_mult}; it must be at most {most}, or the first cycle has no length"
                )
        if self.kind == "wsd" and self.decay_length > self.main_steps:
            raise SettingError(
                f"decay_steps: {self.decay_length} do not fit behind a warm-up of {self.warmup_steps} in {self.horizon} steps; choose at most {self.main_steps}"
            )

    @classmethod
    def from_params(cls, kind: str, base_lr: float, total_steps: int, params: Mapping[str, Any]) -> "LRSchedule":
        """The schedule for a mapping such as `lr_scheduler_params`; `eta_min` is min_lr, unknown names are refused."""
        allowed = [f.name for f in fields(cls) if f.name not in ("kind", "base_lr", "total_steps", "min_lr")]
        for name in params:
            if name not in (*allowed, "eta_min", "min_lr"):
                raise unknown("lr_scheduler_params", name, [*allowed, "eta_min"])
        given = {"min_lr" if name == "eta_min" else name: value for name, value in params.items()}
        # A settings file may hand every number over as a float; 500.0 steps are 500 steps, 0.5 stays and is refused.
        given = {n: int(v) if n in allowed and v is not None and v == int(v) else v for n, v in given.items()}
        return cls(kind, base_lr, total_steps, **given)

    @property
    def horizon(self) -> int:
        """Steps of warm-up and main phase together, where T_0 and T_max do not say otherwise."""
        takes_over = (self.kind == "cosine" and self.T_max) or (self.kind == "cosine_with_restarts" and self.T_0)
        return self.total_steps if self.total_iters is None or takes_over else self.total_iters

    @property
    def main_steps(self) -> int:
        return self.horizon - self.warmup_steps

    @property
    def decay_length(self) -> int:
        """Steps of the final decay of `wsd`."""
        if self.decay_steps is not None:
            return self.decay_steps
        share = DEFAULT_DECAY_PCT if self.decay_pct is None else self.decay_pct
        # By default the decay takes what a long warm-up leaves it; a share asked for by hand is kept or refused.
        length = max(1, int(self.horizon * share))
        return min(length, self.main_steps) if self.decay_pct is None else length

    @property
    def first_cycle(self) -> float:
        """Length of the first cosine cycle, in steps; not always whole when `num_cycles` sets it."""
        if self.T_0 is not None:
            return self.T_0
        if self.num_cycles is None:
            return self.main_steps
        return self.main_steps / float(sum(self.T_mult**i for i in range(self.num_cycles)))

    def __call__(self, step: int) -> float:
        """Return the rate of optimizer step `step`, counted from 0; steps past the end of the run keep its last value."""
        if step < 0:
            raise ValueError(f"step {step} is before the start of the run")
        if step < self.warmup_steps:
            return self.base_lr * (WARMUP_START + (1.0 - WARMUP_START) * step / self.warmup_steps)
        t = min(step, self.total_steps) - self.warmup_steps
        if self.kind == "constant":
            return self.base_lr
        if self.kind == "linear":
            return _linear(self, _share(t, self.main_steps))
        if self.kind == "cosine":
            return _cosine(self, _share(t, self.T_max or self.main_steps))
        if self.kind == "wsd":
            return _linear(self, _share(t - (self.main_steps - self.decay_length), self.decay_length))
        start, length = cycle_at(self, t, ended=step >= self.total_steps)
        return _cosine(self, _share(t - start, length))


def _share(t: float, length: float) -> float:
    """How much of a phase is done, held within 0 and 1: this clamp is what keeps a cosine from climbing back."""
    return 1.0 if length <= 0 else min(max(t / length, 0.0), 1.0)


def _linear(s: LRSchedule, share: float) -> float:
    return s.min_lr + (s.base_lr - s.min_lr) * (1.0 - share)


def _cosine(s: LRSchedule, share: float) -> float:
    return s.min_lr + (s.base_lr - s.min_lr) * (1.0 + math.cos(math.pi * share)) / 2.0


def cycle_at(s: LRSchedule, t: float, ended: bool) -> tuple[float, float]:
    """Start and length of the cosine cycle that main-phase step `t` lies in.

    A boundary belongs to the new cycle, except where the curve is over (`ended`, or the last of the cycles): there it
    is the end of the old one."""
    # Without T_0 the number of cycles is known, one if nothing else was said; with T_0 they go on until the run ends.
    count = s.num_cycles or (None if s.T_0 else 1)
    start, length = 0.0, float(s.first_cycle)
    if s.T_mult == 1 and length > 0:
        done = math.floor(t / length)
        if ended and done and t == done * length:
            done -= 1
        done = min(done, count - 1) if count else done
        return done * length, length
    index = 0
    while (count is None or index < count - 1) and (t > start + length or (t == start + length and not ended)):
        start, length, index = start + length, length * s.T_mult, index + 1
    return start, length


def warmup_steps_from_pct(total_steps: int, pct: float) -> int:
    """Warm-up as a share of the run's optimizer steps, rounded down: int(total_steps * pct)."""
    if not 0 <= pct <= 1:
        raise SettingError(f"warmup_pct: {pct} is not a share; it must be between 0 and 1 (0.05 is five per cent)")
    return int(total_steps * pct)


def curve(schedule: LRSchedule, points: int = 200) -> list[tuple[int, float]]:
    """At most `points` pairs (step, rate) for drawing: evenly spaced, first and last step and the peak included."""
    last = schedule.total_steps - 1
    spaces = max(1, points - 2)
    steps = {round(i * last / spaces) for i in range(spaces + 1)}
    steps |= {last, min(schedule.warmup_steps, last)}
    return [(step, schedule(step)) for step in sorted(steps)]


def describe(schedule: LRSchedule) -> list[str]:
    """The curve in words, a line per phase; then a line `warning: ...` for each thing that may not be meant."""
    s, last = schedule, schedule.total_steps - 1
    lines = [f"{s.kind}: peak lr {s.base_lr:g}, {s.total_steps} steps, last step trains at lr {s(last):.3g}"]
    if s.warmup_steps:
        lines.append(f"warm-up: steps 0 to {s.warmup_steps}, linear from {s.base_lr * WARMUP_START:.3g}")
    if s.kind == "cosine_with_restarts":
        restarts = _restarts(s)
        shown = ", ".join(f"{step:g}" for step in restarts[:8]) + (", ..." if len(restarts) > 8 else "")
        lines.append(f"restarts: {len(restarts)}" + (f", at steps {shown}" if restarts else ""))
    if s.kind == "wsd":
        lines.append(f"stable until step {s.horizon - s.decay_length}, then linear to {s.min_lr:g} at {s.horizon}")
    return lines + [f"warning: {text}" for text in _warnings(s)]


def _restarts(s: LRSchedule) -> list[float]:
    """Steps of the run, counted from 0, at which the rate jumps back to the peak."""
    found: list[float] = []
    count = s.num_cycles or (None if s.T_0 else 1)
    at, length = s.warmup_steps + s.first_cycle, s.first_cycle * s.T_mult
    while length > 0 and at < s.total_steps and (count is None or len(found) < count - 1):
        found.append(at)
        at, length = at + length, length * s.T_mult
    return found


def _warnings(s: LRSchedule) -> list[str]:
    found = []
    if not s.warmup_steps:
        found.append("no warm-up: step 0 trains at the peak rate; AdamW's second moments are still empty then")
    defaults = {f.name: f.default for f in fields(s)}
    for name, kinds in _USED_BY.items():
        if s.kind not in kinds and getattr(s, name) != defaults[name]:
            found.append(f"{name} has no effect with {s.kind}; it belongs to {', '.join(kinds)}")
    if s.total_iters is not None and s.kind == "cosine" and s.T_max:
        found.append("total_iters has no effect: T_max is given and wins")
    if s.total_iters is not None and s.kind == "cosine_with_restarts" and s.T_0:
        found.append("total_iters has no effect: T_0 is given and wins")
    if s.kind == "cosine_with_restarts" and not s.T_0 and (s.num_cycles or 1) == 1:
        found.append("no restart falls inside the run, this is plain cosine; set num_cycles or T_0")
    return found + _end_warnings(s)


def _end_warnings(s: LRSchedule) -> list[str]:
    """What the end of the run does to the curve: cut it short, or leave steps at the floor."""
    if s.kind == "constant":
        return []
    run = s.total_steps - s.warmup_steps
    start, length = 0.0, float(s.main_steps)
    if s.kind == "cosine":
        length = float(s.T_max or s.main_steps)
    elif s.kind == "cosine_with_restarts":
        start, length = cycle_at(s, run, ended=True)
    end = start + length
    final = s(s.total_steps - 1)
    # Half a step of slack: cycles made by num_cycles need not end on a whole step.
    if end > run + 0.5:
        part = f"{(run - start) / length:.0%} of its length"
        what = "the last cycle" if s.kind == "cosine_with_restarts" else "the decay"
        advice = (
            "num_cycles makes whole cycles end with the run" if s.kind == "cosine_with_restarts" else ("leave T_max and total_iters out to end with the run")
        )
        return [
            f"{what} is cut short at {part} (it would end at step {s.warmup_steps + end:g}, the run ends at"
            f" {s.total_steps}): the last step still trains at lr {final:.3g}, not {s.min_lr:g}; {advice}"
        ]
    if end < run - 0.5:
        idle = f"{run - end:g} step{'s train' if run - end != 1 else ' trains'} at lr {s.min_lr:g}"
        return [f"the decay ends at step {s.warmup_steps + end:g}, before the run does at {s.total_steps}: {idle}"]
    return []
