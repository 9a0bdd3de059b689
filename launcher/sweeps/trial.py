"""A trial of a sweep, as its own array task sees it: it gets its values when its first attempt begins, and says how it ended.

A trial is an ordinary run from then on: its job.yaml is frozen, and every later attempt resumes it without asking anybody.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.config.resolver import load
from jobs.config.yaml_io import dump_yaml
from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.contract import Event
from jobs.core.errors import HoldfastError, ImpossibleJobError, NotFoundError
from jobs.run import event_log, rundir
from jobs.run.rundir import RunDir
from jobs.sweep import search_space
from launcher.sweeps.trial_values import values_of

# Seconds to wait for the others that ask. A lock service that does not answer must not stop a sweep: then it goes without,
# and the study's own lock still keeps its record whole.
_LOCK_WAIT_S = 60.0


def take_up(run: RunDir, job_id: str) -> None:
    """Gives a trial its values, if it has none yet, and freezes its job. Killed anywhere in it, it is simply done again.

    Raises NotFoundError when the run is no trial of a sweep, ImpossibleJobError when its values cannot be run."""
    sweep_dir = run.array
    if not sweep_dir.sweep.exists() or safe_read.index_of(run.path.name) is None:
        raise NotFoundError(f"run {run.id} has no job.yaml; its directory was not made by holdfast, or is damaged.")
    sweep = search_space.load(sweep_dir.sweep)
    number = int(run.path.name)
    if sweep.has_study:
        from launcher.sweeps import study

        study.need_optuna()  # loaded before the others are kept waiting
    with _one_at_a_time(sweep_dir):
        if run.job_yaml.exists():
            return
        values, problem = values_of(run)
        if problem:
            raise ImpossibleJobError(problem)
        # Values that were written down stay: of a killed attempt, or of a journal that was lost since.
        values = values or _choose(sweep_dir, sweep, number)
        base, origins = load(sweep_dir.job_yaml), rundir.origins(sweep_dir)
        words = search_space.words_of(sweep, base, values)
        run.logs.mkdir(parents=True, exist_ok=True)
        try:
            resolved = search_space.trial_of(base, origins, words, f"trial {number} of the sweep")
        except HoldfastError as err:
            said = f"trial {number} ({' '.join(words)}) cannot be run: {' '.join(str(err).split())}"
            replace_file(run.trial, json.dumps({"number": number, "values": values, "problem": said}) + "\n")
            if sweep.has_study:
                study.refuse(sweep_dir, sweep, number)
            raise ImpossibleJobError(said) from err
        replace_file(run.trial, json.dumps({"number": number, "values": values}) + "\n")
        replace_file(run.origins, json.dumps(resolved.origins, indent=1) + "\n")
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="sweep")
        # Last: a run is one that has this file.
        replace_file(run.job_yaml, dump_yaml(resolved.job.model_dump(mode="json")))


def tell_sweep(run: RunDir) -> None:
    """Brings the study up to date when a trial is over. What goes wrong is said and no more: whoever asks next does it again."""
    try:
        sweep = search_space.load(run.array.sweep)
        if not sweep.has_study:
            return
        from launcher.sweeps import study

        study.need_optuna()
        with _one_at_a_time(run.array):
            study.update(study.opened(run.array, sweep), run.array, sweep)
    except Exception as err:  # the run itself is over and well
        print(f"holdfast: the study of {run.array.id} was not told: {type(err).__name__}: {err}", file=sys.stderr, flush=True)


def _choose(sweep_dir: RunDir, sweep: search_space.Sweep, number: int) -> dict[str, Any]:
    if not sweep.has_study:
        return sweep.point(number)
    from launcher.sweeps import study

    return study.ask(sweep_dir, sweep, number)


@contextmanager
def _one_at_a_time(sweep_dir: RunDir) -> Iterator[None]:
    """Between two that ask at once; free again when its holder dies."""
    fd = os.open(_lock_file(sweep_dir), os.O_RDWR | os.O_CREAT, 0o644)
    limit = time.monotonic() + _LOCK_WAIT_S
    try:
        while time.monotonic() < limit:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _lock_file(sweep_dir: RunDir) -> Path:
    return sweep_dir.sweep.with_name(".sweep.lock")
