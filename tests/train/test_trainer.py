"""The training loop, method by method. Model, data, optimizer, metrics file and timer are real; the other ranks are not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from on_device import job_of
from torch import nn

from jobs.config.validation import schedule_of
from jobs.rank.stop_flag import StopFlag
from jobs.run import event_log
from jobs.run.goodput import Part
from jobs.run.progress import Progress
from jobs.run.rundir import RunDir
from train import build, optim
from train.checkpoint.state_dict import TrainStateRecord
from train.data.loader import TrainLoader, ValidationLoader
from train.data.sources import open_data
from train.distributed.stop_agreement import StopAgreement
from train.metrics.flops import flops_per_sample
from train.metrics.goodput_timer import GoodputTimer
from train.metrics.logger import MetricsFile, MetricsLogger
from train.metrics.step_totals import StepTotals
from train.metrics.throughput import Throughput
from train.precision.numerics import GradientOverflow, GradScaler, OverflowPolicy
from train.train_state import TrainState
from train.train_step import TrainStep
from train.trainer import Outcome, Trainer
from train.validation import Validator

TERM = 15


class FakeDistributed:
    """A fake: not a process group. It is rank 0 of one process, and plays what a second rank would add to each all-reduce of flags."""

    rank, world_size, attempt, job_id, is_main, device = 0, 1, 1, "test", True, torch.device("cpu")

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.other_rank: list[tuple[int, ...]] = []  # its (stop code, flag, ...) of the next all-reduces; zeros afterwards

    def all_reduce_max(self, *codes: int) -> tuple[int, ...]:
        self.calls.append(("sync", codes))
        other = self.other_rank.pop(0) if self.other_rank else (0,) * len(codes)
        return tuple(map(max, codes, other))

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        self.calls.append("reduce")
        return values

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        self.calls.append("barrier")


class FakeCheckpoints:
    """A fake CheckpointManager: it records what it is asked to save, and writes nothing."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls, self.records = calls, []
        self.saved: int | None = None
        self.due: list[bool] = []

    def is_due(self, step: int) -> bool:
        return self.due.pop(0) if self.due else False

    def save(self, record: TrainStateRecord, model: Any, optimizer: Any, *, blocking: bool) -> None:
        self.calls.append(("save", record.step, blocking))
        self.records.append(record)
        self.saved = record.step

    def amend_val_loss(self, step: int, val_loss: float | None) -> None:
        self.calls.append(("amend", step, val_loss))

    def restart_interval(self) -> None:
        self.calls.append("restart interval")

    def join(self) -> None:
        self.calls.append("join")

    def poll(self) -> None: ...
    def preallocate(self, model: Any, optimizer: Any) -> None: ...


Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A Trainer on the CPU; `trainer.calls` has the collectives and saves in their order."""
    made: list[Trainer] = []

    def trainer_of(state: TrainState | None = None, scale: GradScaler | None = None, **settings: Any) -> Trainer:
        job = job_of("fp32", "cpu", **{"max_steps": 6, "eval_every": 0, "eval_samples": 8, "checkpoint_every": 100, "log_every": 2, **settings})
        run, calls = RunDir(tmp_path / f"run{len(made)}"), []
        run.attempt(1).path.mkdir(parents=True)
        dist, flag, state = FakeDistributed(calls), StopFlag(), state or TrainState()
        timer, progress = GoodputTimer(), Progress(run.attempt(1), True)
        data, val_data = (open_data("synthetic", seq_len=job.seq_len, split=split, vocab_size=256) for split in ("train", "val"))
        torch.manual_seed(0)
        model, context = build.build(job, data, dist, calls.append)
        step = TrainStep(job, dist, model, model, optim.build(job, model), context, scale)
        agreement = StopAgreement(dist, flag, None)
        loader = TrainLoader(job, dist, data)
        throughput = Throughput(job, dist, flops_per_sample(model, loader.peek(state.step)), timer)
        metrics = MetricsLogger(job, dist, MetricsFile(run.metrics, state.step, again=state.pending_metrics is not None), None, throughput, calls.append)
        trainer = Trainer(
            job=job, run=run, dist=dist, flag=flag, agreement=agreement, timer=timer, progress=progress, say=calls.append,
            schedule=schedule_of(job), data=data, loader=loader, step=step, overflow_policy=OverflowPolicy(job, scale),
            totals=StepTotals(dist, job, model),
            validator=Validator(job, model, val_data, ValidationLoader(job, val_data), dist, agreement, timer, progress),
            checkpoints=FakeCheckpoints(calls), metrics=metrics,
            profiler=SimpleNamespace(before=lambda step: None, after=lambda step: None, close=lambda: calls.append("close profiler")),
            compile_cache=SimpleNamespace(keep=lambda *, validated: None), state=state,
        )  # fmt: skip
        trainer.calls = calls
        made.append(trainer)
        return trainer

    yield trainer_of
    for trainer in made:
        trainer.loader.close()
        trainer.validator.close()


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]


def actions(trainer: Trainer) -> list[Any]:
    """What was done, without flags that were synced and without text."""
    return [call for call in trainer.calls if not isinstance(call, str) or call in ("barrier", "join", "reduce", "close profiler") if call[0] != "sync"]


def saves(trainer: Trainer) -> list[tuple[int, bool]]:
    return [call[1:] for call in trainer.calls if call[0] == "save"]


# -- next_batches ------------------------------------------------------------------------------------------------------


def test_next_batches_returns_the_batches_of_the_step(make: Make) -> None:
    trainer = make(micro_batch_size=2, grad_accum_steps=2)
    batches = trainer.next_batches()
    assert batches is not None and [batch["tokens"].shape[0] for batch in batches] == [2, 2]
    assert not saves(trainer)


def test_next_batches_ends_when_another_rank_was_asked_to_stop(make: Make) -> None:
    trainer = make()
    trainer.dist.other_rank = [(TERM, 0, 1)]
    assert trainer.next_batches() is None
    assert trainer.agreement.stopped_by == "TERM"
    # Also when that rank asked for a save: the stop saves.
    assert not saves(trainer)


def test_next_batches_waits_for_the_slowest_rank_and_counts_it_as_data_wait(make: Make) -> None:
    trainer = make()
    counted: list[Part] = []
    trainer.timer.count = lambda part, since: counted.append(part)
    trainer.dist.other_rank = [(0, 1, 0), (0, 1, 0), (0, 0, 0)]
    assert trainer.next_batches() is not None
    assert len([call for call in trainer.calls if call[0] == "sync"]) == 3 and counted == [Part.DATA_WAIT] * 2


def test_a_save_that_is_due_is_made_once_while_the_ranks_wait(make: Make) -> None:
    trainer = make()
    trainer.checkpoints.due = [True]
    trainer.dist.other_rank = [(0, 1, 0), (0, 0, 0)]
    assert trainer.next_batches() is not None
    assert saves(trainer) == [(0, False)]


# -- train_step --------------------------------------------------------------------------------------------------------


def test_a_step_counts_and_writes_its_line(make: Make) -> None:
    trainer = make()
    assert trainer.train_step(trainer.next_batches())
    assert (trainer.state.step, trainer.state.tokens) == (1, 4 * 64)
    (line,) = lines(trainer)
    assert line["step"] == 1 and line["lr"] == trainer.schedule(0) and line["tokens"] == 256
    assert trainer.run.attempt(1).progress.read_text().strip() == "1"


def test_an_overflow_repeats_the_step_with_the_same_batches_and_lr(make: Make) -> None:
    # No fp16 on a CPU: a scale that fp32 cannot hold makes every gradient infinite, and the one after it is an ordinary one.
    trainer = make(scale=GradScaler(scale=1e42, backoff=1e-40))
    trainer.loader._may_repeat = True
    seen: list[torch.Tensor] = []
    forward = trainer.step.inner.forward
    trainer.step.inner.forward = lambda tokens, targets: (seen.append(tokens), forward(tokens, targets))[1]
    assert trainer.train_step(trainer.next_batches())
    assert trainer.state.step == 0 and not lines(trainer) and trainer.step.scale.scale == pytest.approx(100)
    assert [event["event"] for event in event_log.read(trainer.run.ledger)] == ["overflow"]
    assert trainer.train_step(trainer.next_batches()) and trainer.state.step == 1
    assert len(seen) == 2 and torch.equal(*seen) and lines(trainer)[0]["lr"] == trainer.schedule(0)


def test_an_overflow_without_a_loss_scale_ends_training_before_the_line(make: Make) -> None:
    trainer = make()
    with torch.no_grad():
        next(iter(trainer.step.inner.parameters())).fill_(float("nan"))
    with pytest.raises(GradientOverflow, match="at step 1 "):
        trainer.train_step(trainer.next_batches())
    assert not lines(trainer) and not saves(trainer)


def test_a_stop_during_validation_saves_the_line_for_the_next_attempt(make: Make) -> None:
    trainer = make(eval_every=1)
    batches = trainer.next_batches()
    trainer.dist.other_rank = [(TERM, 0)]
    assert not trainer.train_step(batches)
    assert saves(trainer) == [(1, True)] and not lines(trainer)
    (record,) = trainer.checkpoints.records
    assert record.pending["step"] == 1 and "val_loss" not in record.pending and record.val_loss is None
    assert trainer.shut_down() == Outcome(1, "TERM")
    assert saves(trainer) == [(1, True)]


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"checkpoint_every": 2}, [2, 4, 6]),
        ({"checkpoint_every": 4, "keep_every": 3}, [3, 4, 6]),
        ({"checkpoint_every": "auto"}, [6]),
        ({"eval_every": 3, "keep_best": 1}, [3, 6]),
    ],
    ids=str,
)
def test_steps_that_are_saved(make: Make, settings: dict[str, Any], saved: list[int]) -> None:
    trainer = make(**settings)
    assert trainer.train() == Outcome(6, None)
    assert saves(trainer) == [(step, step == 6) for step in saved]


@pytest.mark.parametrize(
    ("settings", "logged"), [({}, [1, 2, 4, 6]), ({"log_every": 4, "eval_every": 3}, [1, 3, 4, 6]), ({"debug": True}, [1, 2, 3, 4, 5, 6])], ids=str
)
def test_steps_that_are_logged(make: Make, settings: dict[str, Any], logged: list[int]) -> None:
    trainer = make(**settings)
    trainer.train()
    torch.autograd.set_detect_anomaly(False)
    assert [line["step"] for line in lines(trainer)] == logged
    assert [line["step"] for line in lines(trainer) if "val_loss" in line] == [step for step in logged if step == 6 or (step == 3 and "eval_every" in settings)]


# -- validate ----------------------------------------------------------------------------------------------------------


def test_validate_returns_the_mean_loss_over_the_samples(make: Make) -> None:
    trainer = make(eval_samples=10)
    data = open_data("synthetic", seq_len=64, split="val", vocab_size=256)
    batch = data.batch(np.linspace(0, len(data) - 1, 10).round().astype(np.int64))
    with torch.no_grad():
        logits = trainer.step.inner.logits(batch["tokens"])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch["targets"].flatten())
    assert trainer.validate() == {"val_loss": pytest.approx(float(expected), rel=1e-5)}
    assert trainer.step.inner.training


def test_validate_returns_none_at_a_stop_and_the_time_is_lost(make: Make) -> None:
    trainer = make(eval_samples=64)
    trainer.dist.other_rank = [(0, 0), (0, 0), (TERM, 0)]
    trainer.step.inner.train()
    assert trainer.validate() is None
    assert trainer.step.inner.training and trainer.timer.record()["seconds"].get(Part.LOST, 0) >= 0
    assert trainer.progress.enter("step") != "evaluation"


def test_a_pending_validation_is_finished_before_the_first_step(make: Make) -> None:
    state = TrainState(step=2, tokens=512, best_val_loss=1.0, pending_metrics={"step": 2, "loss": 5.0, "lr": 0.1, "tokens_per_s": 1.0})
    trainer = make(state)
    trainer.train()
    first = lines(trainer)[0]
    assert first["step"] == 2 and first["loss"] == 5.0 and first["val_loss"] > 1.0
    assert actions(trainer)[1] == ("amend", 2, first["val_loss"])
    assert trainer.state.best_val_loss == 1.0 and trainer.state.pending_metrics is None
    assert [record.pending for record in trainer.checkpoints.records] == [None]


def test_a_second_stop_during_a_pending_validation_keeps_it_pending(make: Make) -> None:
    trainer = make(TrainState(step=2, pending_metrics={"step": 2}))
    trainer.checkpoints.saved = 2
    trainer.dist.other_rank = [(TERM, 0)]
    assert trainer.train() == Outcome(2, "TERM")
    assert not saves(trainer) and trainer.state.pending_metrics == {"step": 2}


# -- save and shut_down ------------------------------------------------------------------------------------------------


def test_a_save_holds_the_state_and_follows_the_metrics(make: Make) -> None:
    trainer = make(eval_every=2)
    for _ in range(2):
        trainer.train_step(trainer.next_batches())
    trainer.metrics.sync = lambda: trainer.calls.append("sync metrics") or True
    del trainer.calls[:]
    trainer.save()
    assert trainer.calls == ["sync metrics", "reduce", ("save", 2, False), "restart interval"]
    (record,) = trainer.checkpoints.records
    assert (record.step, record.tokens, record.world, record.seed) == (2, 512, 1, trainer.job.seed)
    assert record.val_loss == lines(trainer)[-1]["val_loss"] == trainer.state.best_val_loss


def test_the_section_after_a_save_is_the_one_before_it(make: Make) -> None:
    trainer = make()
    trainer.progress.enter("evaluation")
    trainer.save()
    assert trainer.progress.enter("step") == "evaluation"


@pytest.mark.parametrize(("saved", "expected"), [(None, [(3, True)]), (2, [(3, True)]), (3, [])])
def test_a_stop_saves_unless_this_step_is_saved(make: Make, saved: int | None, expected: list[tuple[int, bool]]) -> None:
    trainer = make(TrainState(step=3))
    trainer.checkpoints.saved = saved
    trainer.agreement.stop_code = TERM
    assert trainer.shut_down() == Outcome(3, "TERM")
    assert saves(trainer) == expected
    (stop,) = event_log.read(trainer.run.ledger)
    assert (stop["event"], stop["step"], stop["signal"]) == ("stop", 3, "TERM")


def test_no_rank_leaves_before_the_save_in_flight_is_done(make: Make) -> None:
    trainer = make(TrainState(step=6))
    assert trainer.shut_down() == Outcome(6, None)
    done = actions(trainer)
    assert done.index("join") < done.index("close profiler") < done.index("barrier") and not saves(trainer)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_agreed_stop_code_is_kept(make: Make) -> None:
    trainer = make()
    trainer.dist.other_rank = [(0, 1), (TERM, 0)]
    assert trainer.agreement.sync(False) == (True,) and trainer.agreement.stopped_by is None
    assert trainer.agreement.sync(True) == (True,) and trainer.agreement.stop_code == TERM
    trainer.agreement.sync(False)
    assert trainer.calls[-1] == ("sync", (TERM, 0))


def test_the_best_validation_loss_is_finite_and_smaller() -> None:
    state = TrainState()
    assert [state.record_validation(loss) for loss in (float("nan"), 3.0, float("inf"), 2.0, 2.0, 2.5)] == [False, True, False, True, False, False]
    assert state.best_val_loss == 2.0 and state.val_loss == 2.5
    state.advance()
    assert state.val_loss is None and state.step == 1


def test_the_record_of_a_checkpoint_gives_the_state_back(make: Make) -> None:
    trainer = make(TrainState(step=4, tokens=99, pending_metrics={"step": 4}))
    record = trainer.state.to_record(trainer.job, trainer.data, 2, None)
    assert TrainState.from_record(record, 1.5) == TrainState(4, 99, best_val_loss=1.5, pending_metrics={"step": 4})
    assert TrainState.from_record(None, None) == TrainState()
