"""`holdfast verify resume`: proof on this machine that a job which is killed and resumed trains what it trains when it is not.

One run goes straight through. Others are killed with -9 again and again, at random steps and inside saves, and resumed, at the
same size and precision or at others. Weights and losses are then compared bit by bit, and the samples each step used by number.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.checkpoint import directory
from jobs.config.overrides import split_words
from jobs.config.resolver import load
from jobs.config.setting_names import AMP_WORDS, setting_name
from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.contract import Cause, Event, Exit
from jobs.core.errors import HoldfastError, SettingError
from jobs.run import event_log, metrics_log, sample_audit, store
from jobs.run.rundir import RunDir
from launcher import subprocesses
from launcher.local.executor import gpus_here, pids_of_ranks
from launcher.output import settings_table
from launcher.status import run_status
from launcher.submission.create_run import prepare, resolve_here
from launcher.submission.reconfigure import change

# Another order of summation differs in the last bits of each sum, and training spreads that; wider steps round more coarsely.
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-3, "bf16": 3e-2, "fp16": 3e-2, "fp8": 1e-1}
_STEPS = 60


@dataclass
class Case:
    """One comparison. `changes` are KEY=value words that take turns after each kill with what the job had."""

    name: str
    changes: tuple[str, ...] = ()
    kills: int = 3
    run: str = ""
    attempts: int = 0
    torn_saves: int = 0
    lost_steps: int = 0
    same_weights: bool = False
    loss_difference: float = float("nan")
    same_losses: bool = False
    samples: str = ""
    passed: bool = False
    causes: list[str] = field(default_factory=list)


def verify_resume(words: Sequence[str], cwd: Path, *, kills: int, changes: Sequence[str], seed: int, keep: bool, as_json: bool) -> int:
    """Runs all cases and prints the table. 0 when every one holds what it must, else 1."""
    cases = [Case("killed and resumed", (), kills)] + [Case(f"killed, resumed at {text}", tuple(text.replace(",", " ").split()), kills) for text in changes]
    folder, job, cases = run_cases(words, cwd, cases, seed, quiet=as_json)
    passed = all(case.passed for case in cases)
    if as_json:
        print(json.dumps({"passed": passed, "runs": str(folder), "cases": [asdict(case) for case in cases]}, indent=1))
    else:
        _table(job, cases)
        print(f"{'all of it holds' if passed else 'NOT the same: the runs are kept'}" + (f" in {run_status.near(folder)}/" if keep or not passed else ""))
    if passed and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return Exit.DONE if passed else Exit.FAILED


def run_cases(words: Sequence[str], cwd: Path, cases: Sequence[Case], seed: int, quiet: bool = False) -> tuple[Path, Job, list[Case]]:
    """The folder of the runs, the job as it was tried, and the cases with what came of them."""
    runs = cwd / _given(words, "runs_dir", "runs")
    folder = Path(os.path.abspath(runs)) / f"verify-{store.new_id()}"
    folder.mkdir(parents=True)
    try:
        straight = _prepare(words, cwd, folder, "straight")
        _check_changes(_prepare(words, cwd, folder, "tried"), cases)
        job = load(straight.job_yaml)
        _say(quiet, f"{settings_table.headline(job)}\n{job.max_steps} steps straight, then {', '.join(f'{case.kills} kills: {case.name}' for case in cases)}")
        with _started(straight) as attempt:
            code = attempt.wait()
        if code:
            raise _StraightError(f"the run that nobody killed ended with {code}; its logs are in {run_status.near(straight.logs)}/")
        for index, case in enumerate(cases):
            run = _prepare(words, cwd, folder, f"killed-{index + 1}")
            _torture(run, case, random.Random(seed + index))
            judge_case(case, job, straight, run)
            _say(quiet, f"  {case.name}: {'as it must be' if case.passed else 'DIFFERENT'}")
    except _StraightError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, job, list(cases)


class _StraightError(HoldfastError):
    """Its logs are the evidence: the runs are kept."""


def _check_changes(run: RunDir, cases: Sequence[Case]) -> None:
    """Makes every change of every case, and takes it back, on a run that nobody trains, and takes that run away: minutes of training
    come before the first change. Raises SettingError with all faults, and ImpossibleJobError."""
    before = load(run.job_yaml)
    faults = []
    for case in cases:
        back = _back(before, case.changes)
        try:
            change(run, case.changes, allow=False, executable=sys.executable)
            change(run, back, allow=False, executable=sys.executable)
        except SettingError as err:
            faults.append(f"--change {','.join(case.changes)}: {_without_advice(run, case.changes, back, err)}")
    shutil.rmtree(run.path)
    if faults:
        raise SettingError("\n".join(faults))


def _without_advice(run: RunDir, changes: Sequence[str], back: Sequence[str], fault: SettingError) -> str:
    """What is wrong with a change. --allow-change, which a resume would name, is no option here."""
    try:
        change(run, changes, allow=True, executable=sys.executable)
        change(run, back, allow=True, executable=sys.executable)
    except SettingError as err:
        return str(err)
    return "that is another training, which cannot come to the same; try what a resume takes without --allow-change: GPUS_PER_NODE, PRECISION, PARALLEL and the like"


def _back(before: Job, changes: Sequence[str]) -> list[str]:
    """The words that undo these; a word that is no setting is left out, and refused where the change is made."""
    names = [setting_name(word.partition("=")[0]) for word in changes]
    fields = ["precision" if name in AMP_WORDS else name for name in names if name]
    return [f"{name.upper()}={before.text(name)}" for name in fields]


def _prepare(words: Sequence[str], cwd: Path, folder: Path, name: str) -> RunDir:
    """A run for this machine, short where the words do not say how long, and with every loss and sample written down."""
    steps = int(_given(words, "max_steps", str(_STEPS)))
    short = {"max_steps": str(_STEPS), "checkpoint_every": str(max(steps // 6, 1)), "eval_every": str(max(steps // 2, 1)), "log_every": "1"}
    defaults = [f"{key.upper()}={value}" for key, value in short.items() if not _given(words, key, "")]
    fixed = {"runs_dir": str(folder), "job_name": name, "run_id": "0", "max_killed": 0, "max_no_progress": 10_000, "log_samples": True, "nodes": 1}
    if not _given(words, "gpus_per_node", "") and "GPUS_PER_NODE" not in os.environ:
        fixed["gpus_per_node"] = max(gpus_here(), 1)
    resolved = resolve_here([*words, *defaults], os.environ, cwd, allocation=fixed, allocation_origin="verify resume")
    return prepare(resolved, cwd, sys.executable)[0]


def _given(words: Sequence[str], name: str, otherwise: str) -> str:
    pairs, _, _ = split_words(words)
    return next((value for key, value in pairs if setting_name(key) == name), otherwise)


@contextmanager
def _started(run: RunDir) -> "Iterator[subprocess.Popen[bytes]]":
    """Attempts of this run. Where the block is left early, by Ctrl-C as well, nothing of them is left."""
    attempts = subprocess.Popen(subprocesses.command("launcher.local.executor", str(run.path)), stdout=subprocess.DEVNULL)
    try:
        yield attempts
    except BaseException:
        # The one that would start another attempt first.
        attempts.kill()
        attempts.wait()
        while ranks := pids_of_ranks(run):
            for pid in ranks:
                _kill(pid)
            time.sleep(0.01)
        raise


def _torture(run: RunDir, case: Case, rng: random.Random) -> None:
    """Attempts, each killed at another moment, until the kills are used up and one is left to finish."""
    before = load(run.job_yaml)
    back = _back(before, case.changes)
    save_s = 0.02
    for kill in range(case.kills):
        if kill and case.changes:
            change(run, case.changes if kill % 2 else back, allow=False, executable=sys.executable)
        job = load(run.job_yaml)
        number = kill + 1
        with _started(run) as attempt:
            if _until(attempt, lambda: _progress(run, number) is not None):  # noqa: B023 - called at once
                begun = _progress(run, number) or 0
                if kill % 2:
                    # Inside a save: as soon as its folder is there, and a little later.
                    _until(attempt, lambda: _staging(run))
                    time.sleep(rng.uniform(0, save_s))
                else:
                    target = begun + rng.randint(1, max((job.max_steps - begun) // max(case.kills - kill, 1), 2))
                    _until(attempt, lambda: (_progress(run, number) or 0) >= target)  # noqa: B023
                for pid in pids_of_ranks(run):
                    _kill(pid)
            attempt.wait()
        case.torn_saves += _staging(run)
        saves = [float(event["seconds"]) for event in event_log.read(run.ledger) if event["event"] == Event.CHECKPOINT]
        save_s = saves[-1] if saves else save_s
        if _finished(run):
            return
    if case.changes:
        change(run, case.changes if case.kills % 2 else back, allow=False, executable=sys.executable)
    if not _finished(run):
        with _started(run) as attempt:
            attempt.wait()


def judge_case(case: Case, job: Job, straight: RunDir, run: RunDir) -> None:
    attempts = event_log.attempts(event_log.read(run.ledger))
    case.run, case.attempts = str(run.path), len(attempts)
    case.causes = [str(attempt.cause) for attempt in attempts]
    case.lost_steps = sum(attempt.lost_steps for attempt in attempts)
    try:
        case.same_weights = _weights(run) == _weights(straight)
    except HoldfastError:
        return
    ours, theirs = _losses(run), _losses(straight)
    case.same_losses = ours == theirs
    if [step for step, _, _ in ours] == [step for step, _, _ in theirs]:
        case.loss_difference = max((abs(a - b) / max(abs(b), 1e-12) for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)), default=0.0)
    verdict = sample_audit.of_run(run)
    case.samples = "each once, same order" if not verdict.faults and order(run) == order(straight) else (verdict.faults or ("another order",))[0]
    exact = not case.changes
    right = case.same_weights and case.same_losses if exact else case.loss_difference <= _tolerance(job, case.changes)
    case.passed = _finished(run) and right and case.samples == "each once, same order"


def _tolerance(job: Job, changes: Sequence[str]) -> float:
    precisions = {str(job.precision), *(word.partition("=")[2] for word in changes if setting_name(word.partition("=")[0]) == "precision")}
    return max(TOLERANCE.get(name, 3e-2) for name in precisions)


def order(run: RunDir) -> dict[tuple[int, int], set[int]]:
    """(step, place in the batch) -> samples that were ever used there."""
    found: dict[tuple[int, int], set[int]] = {}
    for line in sample_audit.lines_of(run):
        for slot, sample in zip(line["slots"], line["ids"], strict=True):
            found.setdefault((int(line["step"]), int(slot)), set()).add(int(sample))
    return found


def _weights(run: RunDir) -> dict[str, str]:
    newest = next(iter(directory.complete(run.checkpoints)), None)
    if newest is None:
        raise HoldfastError("no checkpoint")
    manifest = directory.verify(newest)
    return {name: manifest.files[name].sha256 for name in manifest.files if name.startswith((directory.MODEL, directory.OPTIMIZER))} | {
        "step": str(manifest.step)
    }


def _losses(run: RunDir) -> list[tuple[int, float, float | None]]:
    return [(int(line["step"]), float(line["loss"]), line.get("val_loss")) for line in metrics_log.read(run.metrics)]


def _until(process: "subprocess.Popen[bytes]", condition: "object") -> bool:
    """Waits for a condition for as long as the attempt lives."""
    while process.poll() is None:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.001)
    return False


def _progress(run: RunDir, attempt: int) -> int | None:
    try:
        return safe_read.read_int(run.attempt(attempt).progress)
    except (OSError, ValueError):
        return None


def _staging(run: RunDir) -> bool:
    try:
        return any(name.startswith(directory.STAGING) for name in os.listdir(run.checkpoints))
    except OSError:
        return False


def _finished(run: RunDir) -> bool:
    attempts = event_log.attempts(event_log.read(run.ledger))
    return bool(attempts) and attempts[-1].cause is Cause.FINISHED


def _kill(pid: int) -> None:
    import signal

    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def cells(case: Case) -> tuple[str, ...]:
    """One row of the table, here and in docs/explanation/checkpoints.md."""
    losses = "identical" if case.same_losses else f"differ by {case.loss_difference:.1e}"
    return (
        case.name,
        f"{case.attempts - 1}",
        str(case.torn_saves),
        str(case.lost_steps),
        "identical" if case.same_weights else "differ",
        losses,
        case.samples,
        "yes" if case.passed else "NO",
    )


HEADINGS = ("case", "kills", "inside a save", "steps lost", "weights and moments", "losses", "samples", "holds")


def _table(job: Job, cases: Sequence[Case]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in HEADINGS:
        table.add_column(name)
    for case in cases:
        table.add_row(*(Text(cell) for cell in cells(case)))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=True).print(table)


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, flush=True)
