"""What a training script of your own may import, so that an interruption costs it nothing. Needs no torch.

    import holdfast

    step, found = 0, holdfast.latest_checkpoint()
    if found:
        step = load(found)                            # however your script loads: torch.load, accelerator.load_state, ...
    while step < 1000:
        train_one_step(step)
        step += 1
        holdfast.progress(step)
        holdfast.log(step=step, loss=loss)
        stop = holdfast.stop_agreed()
        if stop or step % 100 == 0:
            folder = holdfast.new_checkpoint(step)    # the same folder on every rank; write there what you need
            save(folder)
            holdfast.commit(folder)                   # on every rank, after they have all written
        if stop:
            holdfast.exit_requeue()

Started by holdfast, all of it concerns the run directory. Started by hand or by torchrun, the same script works the same way
in the folder ./holdfast-run. docs/howto/bring_your_own_script.md says more.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.checkpoint import directory, user_checkpoint
from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.contract import STACKS_SIGNAL, STOP_SIGNALS, Event, Exit, RankEnv
from jobs.core.errors import CheckpointError
from jobs.rank.stop_flag import OWN_WISH, StopFlag, leave_marker, name_of
from jobs.run import claim, event_log, metrics_log
from jobs.run.progress import Progress
from jobs.run.rundir import ALONE, RunDir

if TYPE_CHECKING:
    run_dir: Path
    checkpoint_dir: Path
    attempt: int
    rank: int
    world_size: int
    inside: bool

__all__ = [
    "attempt", "checkpoint_dir", "commit", "exit_requeue", "finish", "inside", "latest_checkpoint", "log", "new_checkpoint", "progress",
    "rank", "run_dir", "setting", "step_of", "stop_agreed", "stop_requested", "world_size",
]  # fmt: skip

# Seconds that a rank waits for rank 0 to be done, before it leaves or goes on.
_RANK_0_S = 600.0
_LOOK_S = 0.05
# How job.yaml writes what is not ASCII; an escaped backslash before a U is something else.
_ESCAPED = re.compile(r"\\\\|\\U([0-9a-f]{8})")


class _Here:
    """Which process of which run this is, from the environment, and what it keeps open."""

    def __init__(self) -> None:
        given = os.environ.get(RankEnv.RUN_DIR)
        self.inside = bool(given)
        self.run = RunDir(Path(given or ALONE).absolute())
        self.attempt = int(os.environ.get(RankEnv.ATTEMPT, "0")) if self.inside else 0
        self.rank = int(os.environ.get(RankEnv.RANK, "0"))
        self.world = int(os.environ.get(RankEnv.WORLD_SIZE, "1"))
        self.job_id = os.environ.get("HOLDFAST_JOB_ID", "")
        self.step: int | None = None
        self.flag: StopFlag | None = None
        self.registered: str | None = None
        self._progress: Progress | None = None
        self.metrics: _Metrics | None = None
        self.group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def progress(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(self.run.attempt(self.attempt), self.inside and self.is_main)
        return self._progress

    def note(self, event: Event, **fields: Any) -> None:
        """A line of the ledger, by rank 0. No word is worth the training, so a full disk is no error here."""
        if self.inside and self.is_main:
            with suppress(OSError):
                event_log.append(self.run.ledger, event, attempt=self.attempt, job_id=self.job_id, **fields)

    def own(self) -> None:
        """Ends this process when a later attempt has begun: it is a ghost, and must not write any more."""
        if self.inside and claim.superseded(self.run, self.attempt):
            print(f"holdfast: a later attempt has taken over this run; attempt {self.attempt} writes no more", flush=True)
            exit_requeue()


class _Metrics:
    """metrics.jsonl, one line per step. A line of step n replaces all lines from n on: they are of steps that are trained again.
    What a full disk refuses is kept, and written before the next line; it is said once, and ends nobody's training."""

    def __init__(self, path: Path):
        self._path, self._fd, self._said = path, -1, False
        self._values: dict[str, Any] = {}
        self._waiting: list[tuple[int, bytes]] = []
        self._start = self._end = 0  # of the last line in the file
        self._again: int | None = None  # the step from which on lines are to be taken out of it first

    def write(self, step: int, values: dict[str, Any]) -> None:
        last = self._values.get("step")
        values = {**self._values, **values} if last == step else values
        line = (json.dumps(values) + "\n").encode()
        if last is None or step < last:
            self._again = step if self._again is None else min(step, self._again)
        elif last == step and not self._waiting:
            self._end = self._start
        self._values, self._waiting = values, [*(one for one in self._waiting if one[0] < step), (step, line)]
        self.sync(to_disk=False)

    def sync(self, to_disk: bool = True) -> None:
        try:
            self._flush()
            if to_disk:
                os.fsync(self._fd)
        except OSError as err:
            if not self._said:
                print(f"holdfast: {self._path} cannot be written: {err.strerror}. Its lines are kept until they can be.", file=sys.stderr, flush=True)
            self._said = True

    def _flush(self) -> None:
        if self._again is not None:
            metrics_log.cut_back(self._path, self._again - 1)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._again, self._end = fd, None, os.fstat(fd).st_size
        while self._waiting:
            if os.fstat(self._fd).st_size > self._end:
                os.ftruncate(self._fd, self._end)  # half a line, which would spoil the next one, or one that is written anew
            rest = line = self._waiting[0][1]
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self._start, self._end = self._end, self._end + len(line)
            self._waiting.pop(0)


@cache
def _here() -> _Here:
    return _Here()


def __getattr__(name: str) -> Any:
    """run_dir, checkpoint_dir, attempt (1 for the first; 0 without holdfast), rank, world_size, and inside: whether holdfast started this."""
    here = _here()
    values: dict[str, Callable[[], Any]] = {
        "run_dir": lambda: here.run.path,
        "checkpoint_dir": lambda: here.run.checkpoints,
        "attempt": lambda: here.attempt,
        "rank": lambda: here.rank,
        "world_size": lambda: here.world,
        "inside": lambda: here.inside,
    }
    if name not in values:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return values[name]()


def setting(name: str, default: Any = None) -> Any:
    """A setting of the job as it was frozen at submit, such as setting("lr"); `default` where holdfast did not start this."""
    here = _here()
    if not here.inside:
        return default
    # One line per setting in JSON, which is what jobs.config.yaml_io.dump_yaml writes: a container needs no YAML package for it.
    for line in safe_read.read_text(here.run.job_yaml).splitlines():
        key, colon, value = line.partition(": ")
        if colon and key == name.lower():
            return json.loads(_ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[0], value))
    raise KeyError(f"{name!r} is not a setting of a job; `holdfast explain` lists them")


# -- stopping ----------------------------------------------------------------------------------------------------------


def stop_requested() -> bool:
    """Whether this process was asked to stop: by a signal (preemption, time limit, Ctrl-C under holdfast), by the stop file, or
    because a later attempt has taken over. Cheap enough for every step. Ranks may hear of it at different steps: stop_agreed."""
    return _heard() != 0


def stop_agreed() -> bool:
    """Whether any rank was asked to stop: the same answer on all ranks, which must call it at the same step.

    Uses torch.distributed where the script has initialised it (a small all-reduce over gloo, on the host); else stop_requested."""
    heard = _heard()
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return heard != 0
    here, torch = _here(), sys.modules["torch"]
    if here.group is None:
        # Of its own and on the host, so that asking does not wait for the GPU.
        here.group = dist.new_group(backend="gloo")
    said = torch.tensor([heard])
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=here.group)
    code = int(said)
    flag = _flag()
    if code and flag.signal is None:
        flag.signal = code
    return code != 0


def exit_requeue() -> NoReturn:
    """Ends this process with the exit code that means: saved, start me again. Other ranks wait until rank 0 gets here, since the
    first rank that leaves would otherwise end the step while rank 0 still writes."""
    here = _here()
    if here.inside:
        number = here.flag.signal if here.flag else None
        folder = here.run.attempt(here.attempt)
        leave_marker(folder, here.rank, reason="stopped", step=here.step, signal=name_of(number) if number else OWN_WISH)
        _wait_for(folder.marker(0).exists)
    if here.is_main:
        print(f"holdfast: stopped at step {here.step or 0:,}", flush=True)
    sys.exit(Exit.REQUEUE)


def finish() -> None:
    """Declares the run finished: everything is saved, and no further attempt is wanted, also when a stop arrives from now on.

    Call it on every rank after the last save; rank 0 decides. A script that ends with 0 and was not asked to stop needs no call."""
    here = _here()
    if here.inside:
        leave_marker(here.run.attempt(here.attempt), here.rank, reason="finished", step=here.step)


def _heard() -> int:
    here, flag = _here(), _flag()
    # From now on the script asks by itself; until then a stop ends it wherever it is.
    flag.busy()
    code = flag.code(here.run.stop_file)
    if code:
        _register(name_of(code))
    return code


def _register(signal: str | None = None) -> None:
    """Record that this rank handles the stop signal, and later that the script was told to stop."""
    here = _here()
    if here.inside and here.registered != (signal or ""):
        here.registered = signal or ""
        with suppress(OSError):
            replace_file(here.run.attempt(here.attempt).helper(here.rank), json.dumps({"signal": signal} if signal else {}), flush=False)


def _flag() -> StopFlag:
    here = _here()
    if here.flag is None:
        # Ctrl-C of a script that was started by hand stays what it is.
        here.flag = StopFlag.install(STOP_SIGNALS) if not here.inside else StopFlag.install()
        if here.inside:
            here.flag.successor = here.run.attempt(here.attempt + 1).path
    return here.flag


# -- checkpoints -------------------------------------------------------------------------------------------------------


def latest_checkpoint() -> Path | None:
    """The newest checkpoint that is whole, every byte of it read and compared; None when there is none. Call it on every rank."""
    here = _here()
    if here.is_main:
        directory.clear_leftovers(here.run.checkpoints, keep_attempt=here.attempt)
    path, damaged = user_checkpoint.newest(here.run.checkpoints, here.attempt, may_change=here.is_main)
    for name, reason in damaged:
        here.note(Event.DAMAGED, name=name, reason=reason)
        print(f"holdfast: checkpoint {reason}; it is kept as checkpoints/{name} and the one before is used", flush=True)
    here.step = step_of(path) if path else 0
    here.note(Event.RESUMED, step=here.step)
    if path and here.is_main:
        print(f"holdfast: goes on from {path.name}", flush=True)
    return path


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    step = directory.step_of(Path(path))
    if step is None:
        raise CheckpointError(f"{path} does not have the name of a checkpoint")
    return step


def new_checkpoint(step: int) -> Path:
    """An empty folder to write the checkpoint of this step into, the same one for every rank. It counts after `commit` only."""
    here = _here()
    here.own()
    return user_checkpoint.staging(here.run.checkpoints, step, here.attempt)


def commit(folder: Path, step: int | None = None, keep_last: int | None = None) -> Path:
    """Makes a checkpoint of what was written into `folder`: flushed, with a sum of every file, under its final name by one
    rename. Then removes all but the newest `keep_last` (KEEP_LAST of the job, else 2). Returns where it is.

    Call it on every rank when all have written (accelerator.wait_for_everyone(), torch.distributed.barrier()): rank 0 works,
    the others wait for it. `folder` comes from new_checkpoint, or is one that another library filled on the same file system;
    then give its step."""
    here, source = _here(), Path(folder)
    at = step if step is not None else user_checkpoint.step_of_staging(source)
    if at is None:
        raise CheckpointError(f"{source} is no folder of holdfast.new_checkpoint; say which step it is of: commit(folder, step=...)")
    final = directory.path_of(here.run.checkpoints, at)
    if not here.is_main:
        # By the list of names and not by the name: a network file system remembers for a while that it was not there.
        _wait_for(lambda: final in directory.complete(here.run.checkpoints) and not source.exists())
        return final
    here.own()
    before = here.progress.enter("save")
    begun = time.monotonic()
    if here.metrics is not None:
        here.metrics.sync()  # a checkpoint must not be newer than the metrics that lead up to it
    keep = keep_last or int(setting("keep_last", 2))
    final, size = user_checkpoint.commit(source, here.run.checkpoints, at, here.attempt, keep, warn=_warn_about_old_checkpoint)
    here.note(Event.CHECKPOINT, step=at, seconds=round(time.monotonic() - begun, 3), bytes=size)
    if before:
        here.progress.enter(before)
    return final


def _warn_about_old_checkpoint(problem: str) -> None:
    print(f"holdfast: WARNING: old checkpoint {problem}", file=sys.stderr, flush=True)


def _wait_for(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + _RANK_0_S
    while not done() and time.monotonic() < limit:
        time.sleep(_LOOK_S)


# -- telling -----------------------------------------------------------------------------------------------------------


def progress(step: int, section: str = "step") -> None:
    """Says that this optimizer step of the whole run is done: for `holdfast status`, the count of lost steps, and the watchdog.

    From the first call on, silence is taken for a hang as the settings HANG_AFTER_S and HANG_QUIET_S say. What takes much longer
    than a step has a name of its own and limits of its own: progress(step, "evaluation")."""
    here = _here()
    here.step = step
    if here.inside and here.is_main:
        here.progress.set(step)
        here.progress.enter(section)


def log(*, step: int, **values: Any) -> None:
    """Adds values to the line of a step in metrics.jsonl, by rank 0: loss, val_loss, lr, tokens_per_s and whatever you like, as
    numbers or one-element tensors. Lines of later steps, left by an earlier attempt, are replaced: no step is there twice."""
    here = _here()
    if not here.is_main:
        return
    if here.metrics is None:
        here.metrics = _Metrics(here.run.metrics)
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    for name in metrics_log.NUMBERS & plain.keys():
        if plain[name] is not None and type(plain[name]) not in (int, float):
            raise TypeError(f"holdfast.log: {name} is {plain[name]!r}; allowed: a number, a one-element tensor, or None")
    here.metrics.write(int(step), {"step": int(step), **plain, "attempt": here.attempt, "time": round(time.time(), 3)})


# -- being started -----------------------------------------------------------------------------------------------------


def _begin() -> None:
    """In a rank that holdfast started, and not in its data workers: signals set the flag from here on, stacks are answered,
    and an exception is written down."""
    here = _here()
    if not here.inside or multiprocessing.parent_process() is not None or threading.current_thread() is not threading.main_thread():
        return
    folder = here.run.attempt(here.attempt)
    folder.path.mkdir(parents=True, exist_ok=True)
    faulthandler.register(STACKS_SIGNAL, file=open(folder.stacks(here.rank), "ab", buffering=0), all_threads=True)
    _flag().leave_unless_busy(_leave)
    _register()
    before = sys.excepthook

    def tell(kind: type[BaseException], err: BaseException, where: TracebackType | None) -> None:
        with suppress(OSError):
            folder.error(here.rank).write_text("".join(traceback.format_exception(kind, err, where)))
            leave_marker(folder, here.rank, reason="error", kind=kind.__name__, message=str(err)[-2000:], errno=getattr(err, "errno", None))
        before(kind, err, where)

    sys.excepthook = tell


def _leave(number: int) -> None:
    """Ends the process in the midst of something, because it never asked whether it should stop."""
    here = _here()
    print(f"holdfast: stopped by {name_of(number)} before the script first asked holdfast.stop_requested()", flush=True)
    leave_marker(here.run.attempt(here.attempt), here.rank, reason="stopped", step=None, signal=name_of(number))
    os._exit(Exit.REQUEUE)


_begin()
