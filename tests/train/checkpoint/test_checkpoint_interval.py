"""checkpoint_every=auto: Young's interval from what a save costs here and how often this run has failed."""

import math

import pytest
from training import Farm, events, farm, logs

from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import SettingError
from launcher.submission.create_run import resolve_here
from train.checkpoint.interval import LEAST_S, MOST_S, History, YoungInterval, choose, history_of, prior_hours

__all__ = ["farm"]


def end(cause: str, lost: int = 0, hours: float = 1.0) -> dict[str, object]:
    return {"event": "end", "attempt": 1, "cause": cause, "lost_steps": lost, "seconds": hours * 3600}


def test_only_stops_that_nobody_announced_count_as_failures() -> None:
    ledger = [
        end("preempted"),
        end("time_limit"),
        end("requeued"),
        end("finished"),
        end("killed", 3),
        end("node_failure", 9),
        end("preempted", lost=5),
        {"event": "start", "attempt": 9},
    ]
    assert history_of(ledger) == History(hours=7.0, failures=3)


def test_the_prior_is_worth_one_failure_and_the_run_s_own_history_takes_over() -> None:
    assert History(0, 0).mean_hours(1000) == 1000
    assert History(100, 9).mean_hours(1000) == 110
    assert prior_hours(250, nodes=10) == 600


def test_the_interval_is_young_s_and_its_reason_names_what_went_into_it() -> None:
    seconds, why = choose(1.0, 20.0, History(30.0, 4), prior_hours=20.0)
    assert seconds == pytest.approx(math.sqrt(2 * 1.0 * 10 * 3600))
    assert "1.00 s x 10.0 h" in why and "4 unannounced stops in 30.0 h" in why and "held" not in why


@pytest.mark.parametrize(
    ("cost", "write", "mean", "expected", "word"),
    [
        (0.001, 1.0, 0.5, LEAST_S, "the least"),
        (60.0, 60.0, 5000.0, MOST_S, "the most"),
        (30.0, 31.0, 0.01, 300.0, "ten times the cost"),
        (0.5, 400.0, 0.5, 400.0, "the time to write one"),
        (300.0, 301.0, 100.0, 3000.0, "ten times the cost"),
    ],
)
def test_the_interval_is_held_between_its_bounds_and_says_by_which(cost: float, write: float, mean: float, expected: float, word: str) -> None:
    seconds, why = choose(cost, write, History(0.0, 0), prior_hours=mean)
    assert seconds == pytest.approx(expected, rel=0.001) and word in why


def test_before_the_first_save_the_cost_is_not_known_and_one_comes_soon() -> None:
    assert choose(None, None, History(0, 0), 6000)[0] == LEAST_S


def test_the_rhythm_follows_a_measured_cost_by_a_clock_that_only_goes_forward() -> None:
    now, said = [0.0], []
    job = resolve_here(["CHECKPOINT_EVERY=auto"], {}, __import__("pathlib").Path(__file__).parents[3]).job
    saver = type("CheckpointManager", (), {"last_blocked": None, "last_seconds": None, "saved": 0})()
    rhythm = YoungInterval(job, [end("killed", 1, hours=8.0)] * 9, said.append, clock=lambda: now[0])
    assert not rhythm.due(5, saver)
    now[0] = LEAST_S
    assert rhythm.due(5, saver)
    rhythm.saved()
    saver.last_blocked, saver.last_seconds, saver.saved = 2.0, 10.0, 5
    assert not rhythm.due(5, saver)  # nothing new to save
    expected = choose(2.0, 10.0, History(72.0, 9), 250 * 24)[0]
    now[0] += expected - 1
    assert not rhythm.due(6, saver)
    now[0] += 1
    assert rhythm.due(6, saver)
    assert len(said) == 2 and said[1].startswith(f"  checkpoint every {expected:.0f} s: sqrt(2 x 2.00 s")


def test_auto_is_a_value_of_the_setting_and_other_words_are_refused(farm: Farm) -> None:
    run = farm.prepare(CHECKPOINT_EVERY="AUTO")
    assert load(run.job_yaml).checkpoint_every == "auto"
    for word in ("sometimes", "0", "-3", "true"):
        with pytest.raises(SettingError, match="CHECKPOINT_EVERY.*neither a number of steps"):
            farm.prepare(CHECKPOINT_EVERY=word)


def test_a_run_with_auto_says_its_interval_and_saves_at_its_end(farm: Farm) -> None:
    run = farm.finished(CHECKPOINT_EVERY="auto", MAX_STEPS="12")
    assert "checkpoint every 120 s: 120 s until the first save" in logs(run)
    assert [event["step"] for event in events(run, "checkpoint")] == [12]
    assert events(run, "end")[0]["cause"] == "finished" and Exit.DONE == 0
