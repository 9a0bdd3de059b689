"""Samples read by processes: the same ones as without, whatever happens to the processes.

Run: pytest tests/train/data/test_data_workers.py"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, until
from training import Farm, at_step, events, farm, logs, result

from jobs.config.settings import Job
from jobs.core.contract import STOP_SIGNALS, Exit, RankEnv
from jobs.core.errors import DataWorkerError, SettingError
from jobs.run.rundir import RunDir
from launcher.local.executor import pids_of_ranks
from train import perf_flags
from train.data import workers
from train.data.loader import TrainLoader, ValidationLoader
from train.data.synthetic import AffineTokens, Digits
from train.data.windows import TokenWindows
from train.models.convnet import ConvNet

__all__ = ["farm"]


class Rt:
    """What a feed needs of a runtime."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world_size, self.attempt, self.device = rank, world, 1, torch.device("cpu")


class Augmented:
    """Samples with noise from every global generator. `fault` is done at the sample of that number."""

    name, vocab_size, unit = "augmented", 2, "sample"

    def __init__(self, fault: tuple[int, str] | None = None):
        self.fault = fault

    def __len__(self) -> int:
        return 50

    def batch(self, ids: Any) -> dict[str, torch.Tensor]:
        if self.fault and self.fault[0] in ids.tolist():
            if self.fault[1] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SettingError("token 7 does not fit") if self.fault[1] == "refuse" else KeyError("no such image")
        noise = torch.rand(len(ids), 2) + random.random() + torch.from_numpy(np.random.rand(len(ids), 2))
        return {"ids": torch.from_numpy(ids), "noise": noise, "process": torch.full((len(ids),), os.getpid())}


def job_of(**settings: Any) -> Job:
    return Job(**{"job_name": "t", "batch_size": 8, "micro_batch_size": 2, "grad_accum_steps": 4, "max_steps": 12, "precision": "fp32", **settings})


def read(feed: TrainLoader, steps: range) -> list[tuple[list[int], list[float]]]:
    """(ids, noise) of each forward pass."""
    return [(batch["ids"].tolist(), batch["noise"].flatten().tolist()) for step in steps for batch in feed.take(step)]


@pytest.fixture
def feeds() -> Any:
    """Makes feeds, and ends their processes."""
    made: list[Any] = []

    def make(kind: Any, *arguments: Any) -> Any:
        made.append(kind(*arguments))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


def test_workers_give_the_samples_of_the_thread_in_its_order(feeds: Any) -> None:
    data = Augmented()
    plain = read(feeds(TrainLoader, job_of(), Rt(), data), range(12))
    for settings in ({"num_workers": 1}, {"num_workers": 2, "prefetch_factor": 4}):
        feed = feeds(TrainLoader, job_of(**settings), Rt(), data)
        assert [ids for ids, _ in read(feed, range(12))] == [ids for ids, _ in plain]
        assert {process for batch in feed.take(11) for process in batch["process"].tolist()} - {os.getpid()}


def test_a_feed_that_begins_in_the_middle_draws_what_the_straight_one_drew_whoever_reads(feeds: Any) -> None:
    straight = read(feeds(TrainLoader, job_of(num_workers=2), Rt(), Augmented()), range(12))
    resumed = feeds(TrainLoader, job_of(num_workers=1, prefetch_factor=1), Rt(), Augmented())
    resumed.peek(7)
    assert read(resumed, range(7, 12)) == straight[7 * 4 :]
    # At another number of ranks a forward pass of the same size has the same place in the batch.
    half = [feeds(TrainLoader, job_of(num_workers=1, grad_accum_steps=2), Rt(rank, 2), Augmented()) for rank in range(2)]
    both = [read(feed, range(2)) for feed in half]
    assert [both[index % 2][index // 2] for index in range(8)] == straight[:8]


def test_a_feed_whose_steps_are_all_done_still_has_a_batch_to_warm_up_with(feeds: Any) -> None:
    """An attempt that only finishes the last validation, or its last words."""
    ids = [feeds(TrainLoader, job_of(num_workers=workers), Rt(), Augmented()).peek(12)["ids"].tolist() for workers in (0, 1, 2)]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 2


def test_a_step_that_is_tried_again_gets_the_same_samples_and_starts_no_process_anew(feeds: Any) -> None:
    feed = feeds(TrainLoader, job_of(num_workers=1, precision="fp16"), Rt(), Augmented())
    first, again = read(feed, range(3, 4)), read(feed, range(3, 4))
    assert first == again
    processes = {process for step in (4, 5) for batch in feed.take(step) for process in batch["process"].tolist()}
    assert len(processes) == 1


def test_a_worker_that_dies_is_an_error_that_says_so_and_not_a_hang(feeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch looks every five seconds.
    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    feed = feeds(TrainLoader, job_of(num_workers=2), Rt(), Augmented((20, "die")))
    with pytest.raises(DataWorkerError, match=r"process \d+\) was killed by SIGKILL.*out of memory.*NUM_WORKERS"):
        read(feed, range(12))


@pytest.mark.parametrize(("fault", "error", "said"), [("refuse", SettingError, r"^token 7 does not fit$"), ("break", KeyError, "no such image")])
def test_what_reading_raises_in_a_worker_is_raised_here(feeds: Any, fault: str, error: type[Exception], said: str) -> None:
    feed = feeds(TrainLoader, job_of(num_workers=1), Rt(), Augmented((20, fault)))
    with pytest.raises(error, match=said):
        read(feed, range(12))


def batches(feed: ValidationLoader, portions: list[Any]) -> list[dict[str, torch.Tensor]]:
    feed.begin(portions)
    found = [feed.next() for _ in portions]
    feed.end()
    return found


def processes_of(feed: ValidationLoader, portions: list[Any]) -> set[int]:
    return {process for batch in batches(feed, portions) for process in batch["process"].tolist()}


def test_persistent_workers_outlive_a_validation_and_others_do_not(feeds: Any) -> None:
    portions = list(np.arange(12).reshape(4, 3))
    kept = feeds(ValidationLoader, job_of(num_workers=1), Augmented())
    assert processes_of(kept, portions) == processes_of(kept, portions)
    plain = [batch["ids"].tolist() for batch in batches(kept, portions)]
    assert plain == [ids.tolist() for ids in portions]
    anew = feeds(ValidationLoader, job_of(num_workers=1, persistent_workers=False), Augmented())
    first = processes_of(anew, portions)
    until(lambda: not any(alive(pid) for pid in first), 20, "the end of the reading processes")
    assert processes_of(anew, portions).isdisjoint(first)
    # One that is left in the middle, as by a stop, does not disturb the next.
    kept.begin(portions)
    kept.next()
    assert kept.ready(20), "one is on its way"
    assert [batch["ids"].tolist() for batch in batches(kept, portions)] == plain
    assert kept.ready(0), "none is to come"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WORKERS = {
    "MODEL": "own_models:regression",
    "MODEL_OPTIONS": "{}",
    "DATA": "own_models:numbers",
    "NUM_WORKERS": "2",
    "PRECISION": "fp32",
    "MAX_STEPS": "24",
    "EVAL_EVERY": "12",
    "CHECKPOINT_EVERY": "6",
    "GPUS_PER_NODE": "1",
}


def test_a_killed_run_with_workers_ends_with_the_bits_of_one_without(farm: Farm) -> None:
    straight = farm.finished(**{**WORKERS, "NUM_WORKERS": "0"})
    run = farm.prepare(**WORKERS)
    left: list[int] = []

    def kill(farm: Farm, run: RunDir) -> None:
        if at_step(run, 9):
            (rank,) = farm.ranks
            left.extend(children(rank.pid))
            farm.kill_all()

    assert farm.train(run, kill) == Exit.DONE, logs(run)
    assert len(events(run, "end")) == 2, logs(run)
    assert result(run) == result(straight), logs(run)
    assert left
    until(lambda: not any(alive(pid) for pid in left), 20, "the readers of the killed rank to be gone")


def test_a_reader_whose_rank_is_dead_before_it_reads_is_gone() -> None:
    """Forked, and not yet a worker when the rank is killed: no signal comes then, and its parent does not change any more."""
    program = """
import os, sys, time
from train.data.workers import _become_worker
rank = os.getpid()
if os.fork() == 0:
    while os.getppid() == rank:
        time.sleep(0.01)
    _become_worker(rank, 0)
    print("reads", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_a_stop_that_reaches_the_workers_too_is_as_polite_as_without(farm: Farm) -> None:
    """Slurm sends TERM to every process of a step."""
    run = farm.prepare(**WORKERS, MAX_KILLED="0")
    told: list[int] = []

    def stop(farm: Farm, run: RunDir) -> None:
        if at_step(run, 9):
            (rank,) = farm.ranks
            told.extend(children(rank.pid))
            for pid in (*told, rank.pid):
                os.kill(pid, signal.SIGTERM)

    farm.train(run, stop)
    assert told
    stops = events(run, "stop")
    assert stops and stops[0]["signal"] == "TERM" and stops[0]["step"] >= 9, logs(run)
    assert not list(run.path.glob("attempts/*/error.*")), logs(run)


def test_a_stop_that_reaches_a_worker_before_it_is_one_does_not_end_it(feeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the moment after its fork in which torch's own handler for TERM is in place, of which a worker dies."""
    become = workers._become_worker

    def stopped_first(rank: int, number: int) -> None:
        for name in STOP_SIGNALS:
            os.kill(os.getpid(), name)
        become(rank, number)

    monkeypatch.setattr(workers, "_become_worker", stopped_first)
    feed = feeds(TrainLoader, job_of(num_workers=2), Rt(), Augmented())
    assert len(read(feed, range(3))) == 12
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def test_the_readers_of_a_rank_are_not_taken_for_ranks(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    program = "import os, sys, time; child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)"
    env = {**os.environ, RankEnv.RUN_DIR: str(tmp_path), RankEnv.RANK: "0"}
    rank = subprocess.Popen([sys.executable, "-c", program, "train"], env=env, stdout=subprocess.PIPE, text=True)
    assert rank.stdout
    reader = int(rank.stdout.readline())
    try:
        assert pids_of_ranks(run) == pids_of_ranks(run, 0) == [rank.pid]
    finally:
        os.kill(reader, signal.SIGKILL)
        rank.kill()
        rank.wait()


class Shapes(Augmented):
    fixed_shapes = True


def test_cudnn_benchmark_is_on_only_where_it_can_help_and_else_says_why() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert perf_flags.no_cudnn_benchmark(ConvNet(), Shapes(), gpu) is None
    assert "no GPU" in str(perf_flags.no_cudnn_benchmark(ConvNet(), Shapes(), cpu))
    assert "no convolution" in str(perf_flags.no_cudnn_benchmark(torch.nn.Linear(2, 2), Shapes(), gpu))
    assert "fixed_shapes" in str(perf_flags.no_cudnn_benchmark(ConvNet(), Augmented(), gpu))
    before = torch.backends.cudnn.benchmark
    try:
        assert perf_flags.apply(job_of(cudnn_benchmark=True), ConvNet(), Shapes(), gpu) == [
            "cudnn_benchmark: convolutions are timed in the first step, the fastest way is kept"
        ]
        assert torch.backends.cudnn.benchmark
        (line,) = perf_flags.apply(job_of(cudnn_benchmark=True), ConvNet(), Augmented(), gpu)
        assert line.startswith("warning: CUDNN_BENCHMARK has no effect") and not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before


def test_settings_of_workers_without_workers_are_named_as_without_effect() -> None:
    lines = perf_flags.apply(job_of(prefetch_factor=4, persistent_workers=False), ConvNet(), Shapes(), torch.device("cpu"))
    assert [line.split()[1] for line in lines] == ["PREFETCH_FACTOR", "PERSISTENT_WORKERS"]
    assert not perf_flags.apply(job_of(prefetch_factor=4, persistent_workers=False, num_workers=1), ConvNet(), Shapes(), torch.device("cpu"))


def test_built_in_data_say_that_their_shapes_are_fixed() -> None:
    assert Digits.fixed_shapes and TokenWindows.fixed_shapes and AffineTokens.fixed_shapes
