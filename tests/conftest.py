"""A real Slurm for the tests that need one, and the few verbs that they have in common."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from jobs.core.gc_pause import without_collections
from jobs.run import event_log
from jobs.run.rundir import RunDir
from slurm.devcluster import lab

REPOSITORY = Path(__file__).resolve().parents[1]
# A shell gives what it starts in the background a Ctrl-C that is ignored, and so would every process of a test that presses it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Arithmetic of tests in their own process, and of what they start: threads of OpenMP wait by turning, and three processes of two threads on
# two cores do little else (297 seconds of the processor instead of 382 in the files that import torch). Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How often a property is tried is asked for here: EXAMPLES_TIMES=10 make test-fast tries each ten times as often.
_EXAMPLES_TIMES = int(os.environ.get("EXAMPLES_TIMES", "1"))
# How fast examples are made says something about the machine and its other users, nothing about the code.
settings.register_profile("holdfast", max_examples=100 * _EXAMPLES_TIMES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("holdfast")
# A run that takes a few seconds on two busy cores and still has steps, validations and checkpoints to interrupt.
SMALL = {
    "MODEL": "nano",
    "MODEL_OPTIONS": "n_layers=1,d_model=64,n_heads=2,d_ff=128",
    "SEQ_LEN": "64",
    "BATCH_SIZE": "16",
    "MAX_STEPS": "150",
    "EVAL_EVERY": "50",
    "EVAL_SAMPLES": "64",
    "CHECKPOINT_EVERY": "40",
    "LOG_EVERY": "10",
    "PRECISION": "fp32",
    "SEED": "7",
    # TensorBoard takes a second to import, in each of some hundred runs; test_trackers.py has it.
    "TRACKERS": "none",
}


# Limits of waiting are for idle cores; a machine with other users gets so many times as long before a test gives up.
PATIENCE = 3


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """What a test left ignored every later process of this one would ignore too: a shell cannot even set a trap for it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def pytest_report_header() -> str:
    missing = lab.missing_programs()
    return f"Slurm tests: left out, this machine lacks {', '.join(missing)}" if missing else "Slurm tests: on real private clusters"


# Mostly waits, for a time limit: begun first, it leaves the processors to the others.
_FIRST = "test_slurm_ends.py"
# Takes four minutes: begun among the files of ten tests, it ends with the others and not two minutes after them.
_AS_IF_OF = {"test_slurm_runs.py": 10}
# Files of a quarter of a minute and more, the longest first: the order among files of as many tests. Those of the most tests come first, which
# leaves the long runs on Slurm for the end, when they have the cores to themselves. In the order of their length throughout it was no
# faster (804 s against 656 to 771), and a run of four ranks was not at its step 25 after three minutes.
_LONGEST = (
    "commands", "survival", "resume", "checkpoint_faults", "training_kinds", "examples", "precision_command", "kernels", "lab",
    "hostile", "precision", "checkpoint_export", "autocast", "rerun", "sweep_slurm", "verdict", "goodput", "data_workers", "docs", "on_device", "checkpoint_commit",
    "sweep", "clean", "house", "trackers", "sites",
)  # fmt: skip

# What `make test-fast` leaves out: whole files that load one of these packages, and tests with one of these markers or fixtures.
_LONG_IMPORTS = re.compile(r"^(?:from|import) (?:torch|train|training)\b", re.M)
_LONG_MARKERS = ("slurm", "gpu", "slow", "trains")
_LONG_FIXTURES = {"cluster", "farm"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no Slurm and no training, and load no torch")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Files are read without garbage collections: looking for garbage among what torch makes while it is imported takes seconds, and finds none."""
    with without_collections():
        return (yield)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not even read: importing torch takes as long as a hundred tests of the others."""
    return True if config.getoption("--fast") and collection_path.suffix == ".py" and _LONG_IMPORTS.search(collection_path.read_text()) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order of files, for one process and for several (`--no-loadscope-reorder` lets it stand)."""
    longest = {f"test_{name}.py": place - len(_LONGEST) for place, name in enumerate(_LONGEST)}
    tests = {**Counter(item.path.name for item in items), **_AS_IF_OF}
    items.sort(key=lambda item: (item.path.name != _FIRST, -tests[item.path.name], longest.get(item.path.name, 0), item.path.name))
    if config.getoption("--fast"):
        long = [item for item in items if any(map(item.get_closest_marker, _LONG_MARKERS)) or _LONG_FIXTURES & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]) -> Any:
    """The first true answer of `condition`; fails after PATIENCE times so many seconds, and says what it waited for."""
    limit = time.monotonic() + PATIENCE * seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > limit:
            pytest.fail(f"waited {PATIENCE * seconds:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


def examples(count: int) -> settings:
    """How many examples of a property are tried, where 100 are too many or too few: `@examples(40)` below `@given`."""
    return settings(max_examples=count * _EXAMPLES_TIMES)


class Cluster:
    """A lab, and holdfast as a person uses it there."""

    def __init__(self, here: lab.Lab, runs: Path):
        self.lab, self.runs = here, runs
        # No slurmctld is killed here, so a batch script need not wait until its requeue is saved; tests/slurm/test_controller_crash.py has that.
        self.env = {**os.environ, **here.env(), "HOLDFAST_SITE": "lab", "RUNS_DIR": str(runs), "REQUEUE_CONFIRM_S": "0"}

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=True).stdout

    def holdfast(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli.app", *words], cwd=REPOSITORY, env={**self.env, **env}, capture_output=True, text=True, timeout=500
        )
        if check and done.returncode:
            pytest.fail(f"holdfast {' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def submit(self, *words: str, **settings: str) -> RunDir:
        pairs = [f"{key}={value}" for key, value in {**SMALL, **settings}.items()]
        return RunDir(Path(json.loads(self.holdfast("submit", "--json", *words, *pairs).stdout)["path"]))

    def job_id(self, run: RunDir) -> str:
        return str(until(lambda: [e["job_id"] for e in event_log.read(run.ledger) if e["event"] == "submitted"], 10, "the submission")[-1])

    def at_step(self, run: RunDir, step: int, attempt: int = 1, seconds: float = 60) -> None:
        def reached() -> bool:
            try:
                return int(run.attempt(attempt).progress.read_text()) >= step
            except (OSError, ValueError):
                return False

        until(reached, seconds, lambda: f"step {step} of attempt {attempt} of {run.id}; logs:\n{self.logs(run)}")

    def finished(self, run: RunDir, seconds: float = 120) -> list[event_log.Attempt]:
        """Waits for the end of a run and returns its attempts; shows the logs when it does not end well."""

        def over() -> bool:
            attempts = event_log.attempts(event_log.read(run.ledger))
            return bool(attempts) and attempts[-1].cause is not None and attempts[-1].cause.value == "finished"

        until(over, seconds, lambda: f"the end of {run.id}; logs:\n{self.logs(run)}")
        return event_log.attempts(event_log.read(run.ledger))

    def straight(self, **settings: str) -> RunDir:
        """A run from its first step to its last in one attempt: what the others must end with."""
        run = self.submit(**settings)
        assert len(self.finished(run)) == 1, self.logs(run)
        return run

    def logs(self, run: RunDir) -> str:
        """What there is to read of a run, and what Slurm says of its jobs, if it answers."""
        queue = subprocess.run(["squeue", "--all"], env=self.env, capture_output=True, text=True, timeout=60)
        files = [run.ledger, *sorted(run.logs.glob("*.batch.out")), *sorted(run.logs.glob("*.0.out"))]
        texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files if path.exists()]
        return "\n".join([*texts, f"--- squeue\n{queue.stdout}{queue.stderr}"])


def weights_sha(run: RunDir) -> str:
    """sha256 of the weights in the newest checkpoint, from its manifest; of every part where they are sharded."""
    newest = max(run.checkpoints.glob("step-*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return " ".join(str(files[name]["sha256"]) for name in sorted(files) if name.startswith("model"))


def losses(run: RunDir) -> list[tuple[int, float, float | None]]:
    """(step, loss, validation loss) of every line of metrics, bit for bit."""
    return [(line["step"], line["loss"], line.get("val_loss")) for line in map(json.loads, run.metrics.read_text().splitlines())]


def assert_same_result(run: RunDir, reference: RunDir) -> None:
    assert weights_sha(run) == weights_sha(reference)
    assert losses(run) == losses(reference)


@contextmanager
def booted(config: lab.LabConfig) -> Iterator[Cluster]:
    """A lab of its own, taken down whatever happens in it."""
    missing = lab.missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}. {lab.how_to_install()}")
    root = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    root.chmod(0o755)
    here = lab.start(root / "lab", config)
    try:
        (root / "runs").mkdir()
        yield Cluster(here, root / "runs")
    finally:
        here.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four virtual nodes with a preemptible partition, shared by the tests of one process."""
    with booted(lab.LabConfig()) as here:
        yield here


@pytest.fixture(scope="session")
def zygote() -> Iterator[Any]:
    """For `farm` of tests/support/training.py: importing torch and training takes three seconds of a processor, so the files of one process share it."""
    from training import Zygote

    process = Zygote()
    yield process
    process.close()
