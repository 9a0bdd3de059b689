"""Hangs, judged from outside: no step was finished for too long, whatever the ranks themselves believe.

    python -m launcher.attempt.watchdog PID        beside srun, whose process is PID; ends when that one ends

A rank's own thread is no judge: it lives on while the main thread waits in a collective, and stands still while one C call
holds the interpreter's lock. So this process reads what rank 0 leaves in the attempt's folder and compares the silence with a
limit for what the run is doing: starting, its first step, steps, a validation, a save. Limits are learnt (five times the
longest that was seen) and kept in the run directory, so that the second attempt knows what the first one learnt.

At the limit, all ranks are asked for their Python stacks (SIGURG, answered by a handler in C, and ignored by processes that
have none). After a second limit without progress the suspect is named and the step is killed: the attempt ends as `hang`.
Only the standard library is imported: this runs beside training. A trial of a sweep has `launcher.sweeps.pruner` beside it too.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.contract import STACKS_SIGNAL, RankEnv
from jobs.run.claim import alive
from jobs.run.rundir import RunDir
from launcher.sweeps import pruner
from slurm.environment import clean_environment

# A limit is so many times the longest that was seen; the first steps of an attempt are not looked at, they are slower.
_FACTOR = 5.0
_IGNORED_STEPS = 5
# Before the ranks are in their loop nothing can be learnt: file caches and compilers make one start unlike the other.
_QUIET = frozenset({"start", "first_step"})
_ANSWER_S = 3.0
_KILL_WAIT_S = 30.0


@dataclass
class Pace:
    """The longest silence seen in each section of a run, in seconds. Pure; `key` tells whose it is."""

    key: str = ""
    longest_s: dict[str, float] = field(default_factory=dict)

    def learn(self, section: str, seconds: float) -> None:
        self.longest_s[section] = max(self.longest_s.get(section, 0.0), round(seconds, 2))

    def limit_s(self, section: str, least_s: float, quiet_s: float) -> float:
        """Silence that is taken for a hang. `quiet_s` is for sections of which nothing is known."""
        seen = self.longest_s.get(section)
        if section in _QUIET or seen is None:
            return max(quiet_s, _FACTOR * (seen or 0.0))
        return max(least_s, _FACTOR * seen)

    @classmethod
    def load(cls, path: Path, key: str) -> "Pace":
        """What was learnt before; nothing when the job is another one by now."""
        try:
            saved = safe_read.read_object(path, finite=True)
            if saved["key"] == key:
                return cls(key, {str(name): float(value) for name, value in saved["longest_s"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return cls(key)

    def save(self, path: Path) -> None:
        with suppress(OSError):
            replace_file(path, json.dumps({"key": self.key, "longest_s": self.longest_s}), flush=False)


class Silence:
    """How long nothing has moved. Pure: fed with what is on disk and the seconds since the last look."""

    def __init__(self, pace: Pace, least_s: float, quiet_s: float):
        self.pace, self._least_s, self._quiet_s = pace, least_s, quiet_s
        self.section, self.step, self.seconds = "start", -1, 0.0
        self._first: int | None = None

    def look(self, section: str, step: int, passed_s: float) -> bool:
        """Takes a look; True when something moved since the last one. A change of section is a movement too."""
        if (section, step) == (self.section, self.step):
            self.seconds += passed_s
            return False
        if section == self.section == "step":
            self._first = self.step if self._first is None else self._first
            # Several steps between two looks: one of them took their share. A validation that lay between the looks was shorter
            # than a look, and makes the limit a little longer at most.
            if self.step - self._first >= _IGNORED_STEPS and step > self.step:
                self.pace.learn("step", (self.seconds + passed_s) / (step - self.step))
        elif section != self.section:
            if self.section not in ("step", "start"):
                self.pace.learn(self.section, self.seconds + passed_s)
            if section == "step" and step - max(self.step, 0) > _IGNORED_STEPS:
                # Steps so quick that the first ones were over before anybody looked.
                self.pace.learn("step", (self.seconds + passed_s) / (step - max(self.step, 0)))
        self.section, self.step, self.seconds = section, step, 0.0
        return True

    @property
    def limit_s(self) -> float:
        return self.pace.limit_s(self.section, self._least_s, self._quiet_s)


def read_place(run: RunDir, attempt: int) -> tuple[str, int, str]:
    """Section, last finished step, and Slurm's step id, as rank 0 wrote them; ("start", -1, "") before it did."""
    folder = run.attempt(attempt)
    section, slurm_step, step = "start", "", -1
    with suppress(OSError, ValueError, IndexError):
        words = safe_read.read_text(folder.section).split()
        section, slurm_step = words[0], words[1] if len(words) > 1 else ""
    with suppress(OSError, ValueError):
        step = safe_read.read_int(folder.progress)
    return section, step, slurm_step


@dataclass(frozen=True)
class Suspects:
    """Ranks that keep the others waiting, and why they are thought to."""

    ranks: tuple[int, ...]
    why: str


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line \d+ in (?P<name>.+)$')
# Threads that are no part of training: the clock, the one that answers when asked, and the trackers with their own (train/metrics/tracking.py).
_ASIDE = re.compile(
    r"(?:^|/)(?:goodput_timer\.py:_beat$|flight_recorder\.py:_listen$|tracking\.py:_work$)|(?:site|dist)-packages/(?:tensorboard|tensorboardX|wandb|mlflow|comet_ml|aim|clearml|dvclive|swanlab|trackio)/"
)
# Where a thread rests that waits for others; the innermost frame says it.
_WAITING = re.compile(
    r"wait|get|acquire|select|poll|accept|recv|recv_into|join|_wait_for_tstate_lock|readline|_worker|watch|all_reduce|all_gather\w*|allreduce|broadcast\w*"
    r"|barrier|monitored_barrier|reduce|reduce_scatter\w*|gather\w*|scatter\w*|_engine_run_backward|synchronize|agree|maxima|total|ready"
)


def suspects(stacks: Mapping[int, str], world: int) -> Suspects:
    """Who hangs, from the newest dump of every rank ("" for one that did not answer).

    A rank that cannot even answer is stopped or not scheduled. Else it is the one with a thread that is busy while everybody
    else waits, else the one whose stacks look unlike the others'."""
    silent = tuple(rank for rank in range(world) if not stacks.get(rank, "").strip())
    if silent and len(silent) < world:
        return Suspects(silent, "did not answer when asked for its stacks (stopped, or not scheduled)")
    if silent:
        return Suspects((), "no rank answered when asked for its stacks")
    tops = {
        rank: [names[0] for names in _threads(text) if names and not any(_ASIDE.search(f"{file}:{name}") for file, name in names)]
        for rank, text in stacks.items()
    }
    busy = {rank: [f"{file}:{name}" for file, name in found if not _WAITING.fullmatch(name)] for rank, found in tops.items()}
    working = tuple(rank for rank in sorted(busy) if busy[rank])
    if working and len(working) < world:
        return Suspects(working, f"is in {_short(busy[working[0]][0])} while the others wait for it")
    shapes = {rank: tuple(sorted(tops[rank])) for rank in tops}
    count = Counter(shapes.values())
    rare = min(count.values())
    odd = tuple(rank for rank in sorted(shapes) if count[shapes[rank]] == rare)
    if len(count) > 1 and len(odd) * 2 < world:
        return Suspects(odd, "is somewhere else than the others")
    return Suspects((), "the stacks of all ranks look alike")


def _threads(text: str) -> list[list[tuple[str, str]]]:
    """(file, function) of every thread of the last dump in a stacks file, innermost first."""
    threads: list[list[tuple[str, str]]] = []
    ended = True
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            if ended:
                threads = []  # an older dump stands before this one
            ended = line.startswith("Current thread")
            threads.append([])
        elif threads and (found := _FRAME.match(line)):
            threads[-1].append((found["file"], found["name"]))
        elif threads and not line.strip():
            continue
    return threads


def _short(place: str) -> str:
    return "/".join(place.split("/")[-2:])


class Watchdog:
    """Watches one attempt. `tick` is called now and then with the seconds since the last call."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        *,
        world: int,
        nodes: list[str],
        per_node: int,
        pace_key: str,
        least_s: float,
        quiet_s: float,
        ask: Callable[[str], None],
        kill: Callable[[str], None],
        own: bool = False,
    ):
        self._own = own
        self._run, self._attempt, self._world, self._nodes, self._per_node = run, attempt, world, nodes, per_node
        self._ask, self._kill = ask, kill
        self.silence = Silence(Pace.load(run.pace, pace_key), least_s, quiet_s)
        self._asked = 0
        self._known: dict[str, float] = dict(self.silence.pace.longest_s)
        self.killed = False

    @property
    def poll_s(self) -> float:
        """Seconds to sleep until the next look."""
        return min(max(self.silence.limit_s / 20, 0.1), 2.0)

    def tick(self, passed_s: float) -> None:
        section, step, slurm_step = read_place(self._run, self._attempt)
        if self._own and section == "start":
            return  # a person's own script that says nothing about its steps: its silence means nothing
        if self.silence.look(section, step, passed_s):
            self._asked = 0
            self.keep(only_if_grown=True)
            return
        if self.killed:
            return
        limit = self.silence.limit_s
        if self.silence.seconds >= limit and self._asked == 0:
            self._asked = 1
            print(
                f"holdfast: no progress for {self.silence.seconds:.0f} s in section {section!r} after step {max(step, 0)} (limit {limit:.0f} s); asking the ranks for their stacks",
                flush=True,
            )
            self._ask(slurm_step)
        elif self.silence.seconds >= 2 * limit:
            self.killed = True
            self._ask(slurm_step)
            time.sleep(_ANSWER_S)
            self._tell(section, step)
            self._kill(slurm_step)

    def keep(self, only_if_grown: bool = False) -> None:
        """Writes down what was learnt; with `only_if_grown`, when something became a good deal longer."""
        longest = self.silence.pace.longest_s
        if only_if_grown and all(value < 1.2 * self._known.get(name, 0.0) for name, value in longest.items()):
            return
        if longest:
            self._known = dict(longest)
            self.silence.pace.save(self._run.pace)

    def _tell(self, section: str, step: int) -> None:
        attempt = self._run.attempt(self._attempt)
        stacks = {}
        for rank in range(self._world):
            with suppress(OSError, ValueError):
                path = attempt.stacks(rank)
                # An answer from before the silence is no answer.
                if time.time() - path.stat().st_mtime < self.silence.seconds + 60:
                    stacks[rank] = safe_read.read_bytes(path, 2**30).decode(errors="replace")[-200_000:]
        found = suspects(stacks, self._world)
        where = [self._nodes[rank // self._per_node] if rank // self._per_node < len(self._nodes) else "" for rank in found.ranks]
        who = ", ".join(f"rank {rank}{f' on {node}' if node else ''}" for rank, node in zip(found.ranks[:4], where, strict=False))
        evidence = f"no progress for {self.silence.seconds:.0f} s in section {section} after step {max(step, 0)}; " + (
            f"suspect: {who}, which {found.why}" if who else found.why
        )
        report = {
            "section": section,
            "step": step,
            "silent_s": round(self.silence.seconds, 1),
            "limit_s": round(self.silence.limit_s, 1),
            "ranks": list(found.ranks),
            "nodes": sorted(set(filter(None, where))),
            "evidence": evidence,
        }
        with suppress(OSError):
            replace_file(attempt.hang, json.dumps(report), flush=False)
        print(f"holdfast: hang: {evidence}. Stacks are in {attempt.path}/stacks.*.txt. The step is killed.", flush=True)


def of_attempt(run: RunDir, attempt: int, ask: Callable[[str], None], kill: Callable[[str], None]) -> Watchdog | None:
    """The watchdog that the beginning of the attempt described; None where HANG_AFTER_S is 0."""
    try:
        said = safe_read.read_object(run.attempt(attempt).watch)
    except (OSError, ValueError):
        return None
    if said["least_s"] <= 0:
        return None
    return Watchdog(run, attempt, ask=ask, kill=kill, **said)


def _scancel(*words: str) -> bool:
    try:
        return subprocess.run(["scancel", *words], timeout=20, stdin=subprocess.DEVNULL, capture_output=True, env=clean_environment(os.environ)).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def kill_step(job_id: str, slurm_step: str, step_pid: int) -> None:
    """Kills a step: by Slurm where its id is known, else through its srun."""
    if slurm_step and _scancel("-s", "KILL", f"{job_id}.{slurm_step}"):
        limit = time.monotonic() + _KILL_WAIT_S
        while alive(step_pid) and time.monotonic() < limit:
            time.sleep(0.2)
    # Ranks that never came so far, or a controller that does not answer: srun takes its tasks along.
    for name in (signal.SIGTERM, signal.SIGKILL):
        if alive(step_pid):
            with suppress(ProcessLookupError):
                os.kill(step_pid, name)
            time.sleep(5)


def main() -> int:
    step_pid = int(sys.argv[1])
    job_id = os.environ.get("SLURM_JOB_ID", "")
    number = signal.Signals(STACKS_SIGNAL).name.removeprefix("SIG")

    def ask(slurm_step: str) -> None:
        _scancel("-s", number, f"{job_id}.{slurm_step}" if slurm_step else job_id)

    def kill(slurm_step: str) -> None:
        kill_step(job_id, slurm_step, step_pid)

    run = RunDir(Path(os.environ[RankEnv.RUN_DIR]))
    pruner.beside(run, step_pid)
    dog = of_attempt(run, int(os.environ[RankEnv.ATTEMPT]), ask, kill)
    if dog is None:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(0)))
    last = time.monotonic()
    try:
        while alive(step_pid):
            time.sleep(dog.poll_s)
            now = time.monotonic()
            # A job that Slurm suspended stood still together with us: that time is nobody's silence.
            dog.tick(min(now - last, 3 * dog.poll_s + 1))
            last = now
    finally:
        dog.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
