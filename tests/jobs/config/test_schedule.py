"""The learning rate: equality with torch's schedulers, and what happens at the ends of the curve.

Run: pytest tests/jobs/config/test_schedule.py"""

import math
import warnings

import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torch_lr

from jobs.core.errors import SettingError
from jobs.specs.lr_schedule import KINDS, LRSchedule, curve, describe, warmup_steps_from_pct

BASE = 3e-3


def torch_rates(schedule: LRSchedule, steps: int) -> list[float]:
    """What torch's own schedulers train with at steps 0 .. steps - 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.base_lr)
    warmup, rest = schedule.warmup_steps, (schedule.total_iters or schedule.total_steps) - schedule.warmup_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main = {
            "constant": lambda: torch_lr.ConstantLR(optimizer, factor=1.0, total_iters=rest),
            "linear": lambda: torch_lr.LinearLR(optimizer, 1.0, schedule.min_lr / schedule.base_lr, total_iters=rest),
            "cosine": lambda: torch_lr.CosineAnnealingLR(optimizer, T_max=schedule.T_max or rest, eta_min=schedule.min_lr),
            "cosine_with_restarts": lambda: torch_lr.CosineAnnealingWarmRestarts(
                optimizer, T_0=schedule.T_0 or rest, T_mult=schedule.T_mult, eta_min=schedule.min_lr
            ),
        }
        if warmup:
            first = torch_lr.LinearLR(optimizer, start_factor=1e-10, total_iters=warmup)
            scheduler = torch_lr.SequentialLR(optimizer, [first, main[schedule.kind]()], milestones=[warmup])
        else:
            scheduler = main[schedule.kind]()
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


def assert_same(schedule: LRSchedule, steps: int | None = None) -> None:
    steps = steps or schedule.total_steps
    for step, expected in enumerate(torch_rates(schedule, steps)):
        # 1e-9 relative: torch multiplies from step to step and gathers rounding; ours is closed.
        assert schedule(step) == pytest.approx(expected, rel=1e-9, abs=1e-18), step


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "cosine_with_restarts"])
@pytest.mark.parametrize("warmup", [0, 1, 50])
@pytest.mark.parametrize("min_lr", [0.0, 3e-4])
def test_every_step_equals_torchs_sequential_schedulers(kind: str, warmup: int, min_lr: float) -> None:
    assert_same(LRSchedule(kind, BASE, 1000, warmup, min_lr))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_total_iters_counts_the_warm_up(kind: str) -> None:
    schedule = LRSchedule(kind, BASE, 400, 50, 1e-5, total_iters=300)
    assert_same(schedule, 300)
    assert schedule(300) == pytest.approx(1e-5)


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_t_0_counts_the_main_phase_and_wins_over_total_iters(T_mult: int) -> None:
    assert_same(LRSchedule("cosine_with_restarts", BASE, 1000, 100, 1e-5, total_iters=700, T_0=120, T_mult=T_mult))


def test_t_max_counts_the_main_phase_and_wins_over_total_iters() -> None:
    schedule = LRSchedule("cosine", BASE, 1000, 100, total_iters=300, T_max=900)
    assert_same(schedule)
    assert schedule(550) == pytest.approx(BASE / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_past_the_end_the_rate_stays_where_it_ended(kind: str) -> None:
    schedule = LRSchedule(kind, BASE, 100, 10, 1e-4)
    expected = BASE if kind == "constant" else 1e-4
    for step in (100, 101, 150, 10_000):
        assert schedule(step) == pytest.approx(expected, rel=1e-12)


def test_a_cosine_shorter_than_the_run_never_climbs_back() -> None:
    rates = [LRSchedule("cosine", BASE, 500, 20, T_max=100)(step) for step in range(20, 600)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_a_restart_exactly_at_the_end_of_the_run_does_not_happen() -> None:
    schedule = LRSchedule("cosine_with_restarts", BASE, 1000, 100, T_0=300, T_mult=1)
    assert schedule(400) == pytest.approx(BASE)
    assert schedule(1000) == pytest.approx(0.0, abs=1e-12)
    grown = LRSchedule("cosine_with_restarts", BASE, 1000, 100, T_0=300, T_mult=2)
    assert grown(1000) == pytest.approx(0.0, abs=1e-12)


def test_an_end_inside_a_cycle_holds_the_rate_of_that_moment() -> None:
    schedule = LRSchedule("cosine_with_restarts", BASE, 1000, 100, T_0=500, T_mult=2)
    assert schedule(5000) == schedule(1000) == pytest.approx(BASE * (1 + math.cos(math.pi * 0.4)) / 2)


@pytest.mark.parametrize("T_mult", [1, 2])
@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_num_cycles_fills_the_run_with_whole_cycles(cycles: int, T_mult: int) -> None:
    schedule = LRSchedule("cosine_with_restarts", BASE, 1000, 55, 1e-5, num_cycles=cycles, T_mult=T_mult)
    rates = [schedule(step) for step in range(55, 1000)]
    assert sum(later > earlier for earlier, later in zip(rates, rates[1:], strict=False)) == cycles - 1
    assert schedule(1000) == pytest.approx(1e-5, rel=1e-6)
    assert not [line for line in describe(schedule) if "cut short" in line]


def test_num_cycles_beside_t_0_stops_the_restarts() -> None:
    schedule = LRSchedule("cosine_with_restarts", BASE, 1000, 0, 1e-5, T_0=100, num_cycles=2)
    assert schedule(100) == pytest.approx(BASE)
    assert [schedule(step) for step in (200, 250, 999, 1000)] == pytest.approx([1e-5] * 4)


def test_wsd_is_constant_then_falls_in_a_line() -> None:
    schedule = LRSchedule("wsd", BASE, 1000, 50, 3e-4, decay_steps=200)
    assert {schedule(step) for step in range(50, 801)} == {BASE}
    assert schedule(900) == pytest.approx((BASE + 3e-4) / 2)
    assert schedule(1000) == pytest.approx(3e-4)
    assert LRSchedule("wsd", BASE, 1000, 50, decay_pct=0.2)(900) == pytest.approx(BASE / 2)
    assert LRSchedule("wsd", BASE, 1000, 50)(950) == pytest.approx(BASE / 2)


def test_wsd_is_the_same_for_any_horizon_until_decay_begins() -> None:
    short, long = (LRSchedule("wsd", BASE, total, 50, decay_steps=100) for total in (500, 5000))
    assert all(short(step) == long(step) for step in range(400))


@examples(150)
@given(
    kind=st.sampled_from(KINDS), total=st.integers(1, 400), pct=st.floats(0, 1), T_0=st.none() | st.integers(1, 300),
    T_mult=st.integers(1, 3), cycles=st.none() | st.integers(1, 5), step=st.integers(0, 1000),
)  # fmt: skip
def test_no_rate_leaves_the_range_between_floor_and_peak(
    kind: str, total: int, pct: float, T_0: int | None, T_mult: int, cycles: int | None, step: int
) -> None:
    warmup = warmup_steps_from_pct(total, pct)
    schedule = LRSchedule(kind, BASE, total, warmup, 1e-4, T_0=T_0, T_mult=T_mult, num_cycles=cycles)
    low = 0.0 if step < warmup else 1e-4
    assert low <= schedule(step) <= BASE * (1 + 1e-12)
    describe(schedule)


def test_warm_up_share_is_rounded_down() -> None:
    given = ((19, 0.05), (20, 0.05), (10_000, 0.05), (7, 0.0))
    assert [warmup_steps_from_pct(*one) for one in given] == [0, 1, 500, 0]
    for wrong in (-0.1, 1.1, 5):
        with pytest.raises(SettingError, match="between 0 and 1"):
            warmup_steps_from_pct(100, wrong)


def test_a_last_cycle_cut_short_is_reported_with_the_rate_it_leaves() -> None:
    lines = describe(LRSchedule("cosine_with_restarts", 1e-3, 1000, 100, T_0=500, T_mult=2, total_iters=1000))
    (cut,) = [line for line in lines if "cut short" in line]
    assert "0.000656" in cut and "40%" in cut and "step 1600" in cut
    assert any("restarts: 1, at steps 600" in line for line in lines)


def test_description_names_what_is_probably_not_meant() -> None:
    def warned(schedule: LRSchedule) -> str:
        return "\n".join(line for line in describe(schedule) if line.startswith("warning: "))

    assert "no warm-up" in warned(LRSchedule("cosine", BASE, 100))
    assert "plain cosine" in warned(LRSchedule("cosine_with_restarts", BASE, 100, 10, T_mult=2))
    assert "T_0 has no effect" in warned(LRSchedule("cosine", BASE, 100, 10, T_0=5))
    assert "total_iters has no effect" in warned(LRSchedule("cosine", BASE, 100, 10, T_max=90, total_iters=50))
    assert "40 steps train at lr 0" in warned(LRSchedule("cosine", BASE, 100, 10, total_iters=60))
    assert "cut short" in warned(LRSchedule("linear", BASE, 100, 10, total_iters=200))
    assert warned(LRSchedule("cosine", BASE, 100, 10)) == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "cosin"}, "Did you mean 'cosine'"),
        ({"base_lr": 0.0}, "above 0"),
        ({"min_lr": 1.0}, "eta_min"),
        ({"warmup_steps": 101}, "from 0 to 100"),
        ({"T_0": 0}, "T_0: 0 is not allowed"),
        ({"T_mult": 1.5}, "T_mult: 1.5"),
        ({"kind": "wsd", "decay_steps": 95}, "choose at most 90"),
        ({"kind": "wsd", "decay_steps": 5, "decay_pct": 0.1}, "one of them"),
    ],
)
def test_an_impossible_curve_is_refused_and_what_is_allowed_is_named(wrong: dict, said: str) -> None:
    given = {"kind": "cosine", "base_lr": BASE, "total_steps": 100, "warmup_steps": 10} | wrong
    with pytest.raises(SettingError, match=said):
        LRSchedule(**given)


def test_more_growing_cycles_than_a_number_can_count_are_refused_before_the_attempt() -> None:
    given = {"kind": "cosine_with_restarts", "base_lr": BASE, "total_steps": 100, "warmup_steps": 10}
    for cycles, mult, most in ((400, 10, 307), (308, 10, 307), (1024, 2, 1023), (10**300, 3, 645), (3, 10**300, 1)):
        with pytest.raises(SettingError, match=f"^num_cycles: {cycles} is not allowed with T_mult {mult}; it must be at most {most}, or"):
            LRSchedule(**given, num_cycles=cycles, T_mult=mult)
        schedule = LRSchedule(**given, num_cycles=most, T_mult=mult)
        assert all(0 <= schedule(step) <= BASE for step in range(120)) and describe(schedule)
    # Beside T_0 the number only ends the restarts, and other kinds have none.
    for schedule in (LRSchedule(**given, num_cycles=400, T_mult=10, T_0=5), LRSchedule(**(given | {"kind": "cosine"}), num_cycles=400, T_mult=10)):
        assert schedule(99) < BASE and describe(schedule)


def test_parameters_of_a_settings_file_are_understood_and_unknown_ones_refused() -> None:
    schedule = LRSchedule.from_params("cosine", BASE, 100, {"eta_min": 1e-4, "T_max": 90.0, "warmup_steps": 10})
    assert (schedule.min_lr, schedule.T_max, schedule.warmup_steps) == (1e-4, 90, 10)
    assert isinstance(schedule.T_max, int)
    assert LRSchedule.from_params("cosine", BASE, 100, {"min_lr": 1e-4}).min_lr == 1e-4
    allowed = "warmup_steps, total_iters, T_0, T_max, T_mult, num_cycles, decay_steps, decay_pct, eta_min"
    for name, hint in (("Tmax", " Did you mean 'T_max'?"), ("kind", ""), ("base_lr", ""), ("total_steps", " Did you mean 'total_iters'?")):
        with pytest.raises(SettingError) as err:
            LRSchedule.from_params("cosine", BASE, 100, {name: 90})
        assert str(err.value) == f"lr_scheduler_params: {name!r} is not known; choose one of {allowed}.{hint}"
    with pytest.raises(SettingError, match="whole number"):
        LRSchedule.from_params("cosine", BASE, 100, {"T_max": 90.5})


def test_drawn_curve_has_both_ends_and_the_peak() -> None:
    schedule = LRSchedule("cosine", BASE, 100_000, 777)
    points = curve(schedule, 50)
    assert len(points) == 50 and points[0][0] == 0 and points[-1][0] == 99_999
    assert max(rate for _, rate in points) == BASE
    assert len(curve(schedule)) == 200
    assert [step for step, _ in curve(schedule, 3)] == [0, 777, 99_999]
    assert [step for step, _ in curve(LRSchedule("cosine", BASE, 5, 5), 50)] == [0, 1, 2, 3, 4]
    assert len(curve(LRSchedule("cosine", BASE, 3), 50)) == 3


def test_a_warm_up_that_is_the_whole_run_leaves_wsd_nothing_to_decay() -> None:
    schedule = LRSchedule("wsd", BASE, 10, 10)
    assert schedule.decay_length == 0
    assert schedule(9) < BASE
    assert 0 <= schedule(10) <= BASE
    describe(schedule)


def test_shares_may_be_the_whole_and_a_decay_a_single_step() -> None:
    assert warmup_steps_from_pct(100, 1) == 100 and LRSchedule("wsd", BASE, 100, decay_pct=1.0).decay_length == 100
    assert LRSchedule("wsd", BASE, 5).decay_length == 1
    short = LRSchedule("wsd", BASE, 100, decay_steps=1)
    assert [short(step) for step in (0, 98, 99, 100)] == [BASE, BASE, BASE, 0.0]


def test_a_length_that_its_kind_does_not_use_does_not_stretch_the_curve() -> None:
    assert LRSchedule("linear", BASE, 100, total_iters=60, T_0=5, T_max=5).horizon == 60
    assert LRSchedule("cosine", BASE, 100, total_iters=60, T_0=5).horizon == 60
    assert LRSchedule("cosine_with_restarts", BASE, 100, total_iters=60, T_max=5).horizon == 60
    assert LRSchedule("cosine", BASE, 100, 70, total_iters=60, T_max=5).horizon == 100
    assert LRSchedule("cosine_with_restarts", BASE, 100, 70, total_iters=60, T_0=5).horizon == 100


@pytest.mark.parametrize("T_mult", [1, 2])
@pytest.mark.parametrize("cycles", [None, 1, 2])
def test_behind_the_last_of_its_cycles_the_rate_stays_at_the_floor(T_mult: int, cycles: int | None) -> None:
    schedule = LRSchedule("cosine_with_restarts", BASE, 100, 10, 1e-4, total_iters=60, T_mult=T_mult, num_cycles=cycles)
    assert {schedule(step) for step in range(60, 120)} == {1e-4}


def test_the_rise_begins_at_a_rate_above_nothing_and_ends_at_the_peak() -> None:
    assert [LRSchedule("linear", 1.0, 10, 2)(step) for step in (0, 1, 2)] == [1e-10, pytest.approx(0.5 + 0.5e-10, rel=1e-14), 1.0]


def test_the_curve_in_words_has_each_phase() -> None:
    assert describe(LRSchedule("linear", 1e-3, 100, 10)) == [
        "linear: peak lr 0.001, 100 steps, last step trains at lr 1.11e-05",
        "warm-up: steps 0 to 10, linear from 1e-13",
    ]
    assert "stable until step 90, then linear to 0 at 100" in describe(LRSchedule("wsd", 1e-3, 100, 10))
    assert "restarts: 8, at steps 20, 30, 40, 50, 60, 70, 80, 90" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, T_0=10))
    assert "restarts: 9, at steps 10, 20, 30, 40, 50, 60, 70, 80, ..." in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 0, T_0=10))
    assert "restarts: 2, at steps 40, 70" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, num_cycles=3))
    assert "restarts: 1, at steps 20" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, T_0=10, num_cycles=2))
    assert "restarts: 89, at steps 11, 12, 13, 14, 15, 16, 17, 18, ..." in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, T_0=1))
    assert "restarts: 1, at steps 55" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, T_0=45))
    assert "restarts: 0" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10))
    assert "restarts: 0" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, num_cycles=2, total_iters=10))
    assert "restarts: 0" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, total_iters=60))
    assert "restarts: 3, at steps 20, 40, 80" in describe(LRSchedule("cosine_with_restarts", 1e-3, 100, 10, T_0=10, T_mult=2))


# Which parameters each kind takes.
USED = {
    "constant": (),
    "linear": ("min_lr", "total_iters"),
    "cosine": ("T_max", "min_lr", "total_iters"),
    "cosine_with_restarts": ("T_0", "T_mult", "num_cycles", "min_lr", "total_iters"),
    "wsd": ("decay_steps", "decay_pct", "min_lr", "total_iters"),
}
GIVEN = {"T_0": 5, "T_mult": 2, "num_cycles": 3, "T_max": 5, "decay_steps": 5, "decay_pct": 0.2, "min_lr": 1e-4, "total_iters": 60}


def warned(kind: str, **given: float) -> list[str]:
    """The warnings about a run of 100 steps with a warm-up of 10."""
    lines = describe(LRSchedule(kind, 1e-3, 100, 10, **given))
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_the_kind_does_not_take_is_told_and_no_other(kind: str) -> None:
    for name, value in GIVEN.items():
        idle = [line for line in warned(kind, **{name: value}) if "has no effect" in line]
        takers = ", ".join(taker for taker in KINDS if name in USED[taker])
        assert idle == ([] if name in USED[kind] else [f"{name} has no effect with {kind}; it belongs to {takers}"])


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("constant", {}, []),
        ("constant", {"total_iters": 60}, ["total_iters has no effect with constant; it belongs to linear, cosine, cosine_with_restarts, wsd"]),
        ("cosine", {"T_max": 90, "total_iters": 50}, ["total_iters has no effect: T_max is given and wins"]),
        ("cosine", {"T_max": 90}, []),
        ("cosine", {"T_max": 89}, ["the decay ends at step 99, before the run does at 100: 1 step trains at lr 0"]),
        ("linear", {"total_iters": 60}, ["the decay ends at step 60, before the run does at 100: 40 steps train at lr 0"]),
        (
            "cosine",
            {"T_max": 91},
            [
                "the decay is cut short at 99% of its length (it would end at step 101, the run ends at 100): the last step still trains at lr 1.19e-06, not 0;"
                " leave T_max and total_iters out to end with the run"
            ],
        ),
        ("cosine_with_restarts", {"T_0": 45, "total_iters": 50}, ["total_iters has no effect: T_0 is given and wins"]),
        ("cosine_with_restarts", {"T_0": 90}, []),
        ("cosine_with_restarts", {}, ["no restart falls inside the run, this is plain cosine; set num_cycles or T_0"]),
        ("cosine_with_restarts", {"num_cycles": 2}, []),
        # Half a step more than the run has is no cut.
        ("cosine_with_restarts", {"num_cycles": 2, "total_iters": 191}, []),
        (
            "cosine_with_restarts",
            {"T_0": 50},
            [
                "the last cycle is cut short at 80% of its length (it would end at step 110, the run ends at 100): the last step still trains at lr 0.000115,"
                " not 0; num_cycles makes whole cycles end with the run"
            ],
        ),
    ],
)
def test_what_is_said_of_the_end_of_a_curve(kind: str, given: dict[str, float], said: list[str]) -> None:
    assert warned(kind, **given) == said


@pytest.mark.parametrize(("wrong", "said"), [({"decay_pct": 0.0}, "decay_pct"), ({"decay_pct": 1.1}, "decay_pct"), ({"base_lr": math.inf}, "finite")])
def test_shares_and_rates_outside_of_their_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        LRSchedule(**({"kind": "wsd", "base_lr": BASE, "total_steps": 100} | wrong))


def test_a_step_before_the_start_has_no_rate() -> None:
    with pytest.raises(ValueError, match="before the start"):
        LRSchedule("linear", BASE, 100)(-1)


@pytest.mark.parametrize("name", ["total_steps", "total_iters", "T_0", "T_max", "T_mult", "num_cycles", "decay_steps"])
def test_a_length_is_a_whole_number_of_at_least_one(name: str) -> None:
    given = {"kind": "cosine", "base_lr": BASE, "total_steps": 100}
    for wrong in (0, -1, 1.5):
        with pytest.raises(SettingError, match=f"^{name}: {wrong} is not allowed"):
            LRSchedule(**(given | {name: wrong}))
    assert getattr(LRSchedule(**(given | {name: 1})), name) == 1


def test_a_warm_up_and_a_floor_stay_within_the_run_and_the_peak() -> None:
    for wrong in (-1, 0.5, 101):
        with pytest.raises(SettingError, match=f"^warmup_steps: {wrong} is not allowed"):
            LRSchedule("cosine", BASE, 100, wrong)
    with pytest.raises(SettingError, match="^eta_min"):
        LRSchedule("cosine", BASE, 100, min_lr=-1e-9)
    flat = LRSchedule("cosine", BASE, 100, 100, BASE)
    assert flat(100) == BASE
    with pytest.raises(SettingError, match="^lr_scheduler: 'none' is not known"):
        LRSchedule("none", BASE, 100)
