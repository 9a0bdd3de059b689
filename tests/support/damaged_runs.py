"""Corpus of damaged and hostile run directories, and a process that runs commands on them within limits of time and memory."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from written_runs import written_run

from jobs.checkpoint import directory
from jobs.run.rundir import RunDir
from launcher.cli import completion
from launcher.cli.app import run_app
from launcher.commands import checkpoints, clean, diff, logs, rerun, submit, sweep, watch
from launcher.output import settings_table
from launcher.report import render
from launcher.verify import data as verify_data

# What follows from a case: the run is shown as damaged; only its checkpoint is; or the file is not needed and the run is shown as usual.
DAMAGED, CHECKPOINT, TOLERATED = "damaged", "checkpoint", "tolerated"
# Seconds of wall time for one command. A hang is one that never ends.
LIMIT_S = 30
# Peak resident memory of a process that runs all commands on one case.
LIMIT_MB = 100
_ADDRESS_SPACE = 3 * 2**30
# Loaded once here, and not again in each forked process.
COMMAND_MODULES = (checkpoints, clean, submit, diff, completion, logs, render, rerun, settings_table, sweep, verify_data, watch)


@dataclass(frozen=True)
class Case:
    name: str
    outcome: str
    damage: Callable[[RunDir], None]
    path: Callable[[RunDir], Path]
    needs_root: bool = False


def make_runs(folder: Path) -> None:
    """Two intact runs, one whose attempt has no end, and one that is over; with code, logs and a checkpoint each."""
    for name, causes in {"good-aaaa": ("preempted", "finished"), "open-bbbb": ("preempted", "running"), "over-cccc": ("preempted", "finished"), "good-dddd": ("preempted", "running")}.items():  # fmt: skip
        run = written_run(folder, name, steps=40, every=10, causes=causes, diff="+x\n")
        run.code.mkdir()
        (run.code / "train.py").write_text("print(1)\n")
        run.code_sums.write_text("{}\n")
        run.script.write_text("#!/bin/bash\n")
        for number in (1, 2):
            attempt = run.attempt(number)
            attempt.path.mkdir(parents=True)
            attempt.owner.write_text(json.dumps({"job_id": "81237", "host": "node1", "pid": 0}))
            attempt.progress.write_text(f"{20 * number:<12d}")
            attempt.clock.write_text(json.dumps({"seconds": {}, "part": "useful", "since": 0.0, "passed": 1.0, "unfinished": 0.0, "steps": 1}))
            attempt.log_sizes.write_text(json.dumps({"0": 0, "batch": 0}))
            attempt.samples(0).write_text(json.dumps({"step": 0, "attempt": number, "slots": [0], "ids": [0], "samples": 1, "batch": 1}) + "\n")
        run.log("81237", 0).write_text("step 1\n")
        run.log("81237", "batch").write_text("begins\n")
        checkpoint(run)
        then = time.time() - 4000
        for path in (run.job_yaml, run.ledger, run.metrics, run.attempt(2).progress):
            os.utime(path, (then, then))


def checkpoint(run: RunDir, **state: Any) -> None:
    path = directory.path_of(run.checkpoints, 20)
    path.mkdir(parents=True, exist_ok=True)
    names = ["model.safetensors", "optimizer.safetensors"]
    for name in names:
        (path / name).write_bytes(b"x" * 100)
    sums = directory.hash_files(path, names)
    files = {name: directory.FileEntry(100, sums[name]) for name in names}
    plain = {"tokens": 5, "val_loss": 1.5, "precision": "bf16", "world": 1, "versions": {"torch": "2"}}
    (path / directory.MANIFEST).write_text(directory.Manifest(20, 1, files, {**plain, **state}).text())


# -- what is done to a file --------------------------------------------------------------------------------------------


def _clear(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _fifo(path: Path) -> None:
    os.mkfifo(_clear(path))


def _zero(path: Path) -> None:
    _clear(path).symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    _clear(path).symlink_to(path.name)


def _folder(path: Path) -> None:
    _clear(path).mkdir()


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(_clear(path).parent)  # the name of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _link(path: Path) -> None:
    """To a copy of the file, outside of the run."""
    outside = path.parents[1] / f".outside-{path.parent.name}-{path.name}"
    outside.write_bytes(path.read_bytes())
    _clear(path).symlink_to(outside)


def _zero_device(path: Path) -> None:
    os.mknod(_clear(path), 0o20666, os.makedev(1, 5))


def _sparse(path: Path) -> None:
    """50 GB that take no space on the disk."""
    _clear(path).touch()
    os.truncate(path, 50 * 10**9)


def _cut(path: Path) -> None:
    """The first half, as a full disk leaves it."""
    data = path.read_bytes()
    _clear(path).write_bytes(data[: len(data) // 2])


def _content(data: str | bytes) -> Callable[[Path], None]:
    return lambda path: [_clear(path).write_bytes(data if isinstance(data, bytes) else data.encode()), None][1]  # type: ignore[func-returns-value]


def _append(data: str | bytes) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(data if isinstance(data, bytes) else data.encode())

    return add


_DEEP = "[" * 200_000
# Deeper than anything that is written here, and not too deep for Python's parser.
_NESTED = "[" * 300 + "]" * 300


def event(kind: str = "checkpoint", **fields: Any) -> str:
    """A line of a ledger; a field given as str that begins with ! stands as it is."""
    values = {"event": kind, "attempt": 2, "job_id": "81237", "time": 1_795_000_900.0, "step": 30} | fields
    return "{" + ", ".join(f'"{name}": {value[1:] if isinstance(value, str) and value[:1] == "!" else json.dumps(value)}' for name, value in values.items()) + "}\n"  # fmt: skip


def _set_yaml(**values: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        lines = [line for line in path.read_text().splitlines() if line.partition(":")[0] not in values]
        path.write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in values.items())]) + "\n")

    return edit


_BOMB = "\n".join([f'a0: &a0 ["{"x" * 10}"]', *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)), "data: *a8"]) + "\n"
# Where each file lies; and what its damage means to a run.
_FILES: dict[str, tuple[Callable[[RunDir], Path], str]] = {
    "job.yaml": (lambda run: run.job_yaml, DAMAGED),
    "ledger": (lambda run: run.ledger, DAMAGED),
    "metrics": (lambda run: run.metrics, DAMAGED),
    "progress": (lambda run: run.attempt(2).progress, DAMAGED),
    "origins": (lambda run: run.origins, TOLERATED),
    "snapshot": (lambda run: run.snapshot, TOLERATED),
    "code.diff": (lambda run: run.diff, TOLERATED),
    "code.json": (lambda run: run.code_sums, TOLERATED),
    "clock": (lambda run: run.attempt(2).clock, TOLERATED),
    "owner": (lambda run: run.attempt(2).owner, TOLERATED),
    "log_sizes": (lambda run: run.attempt(2).log_sizes, TOLERATED),
    "log": (lambda run: run.log("81237", 0), TOLERATED),
    "batch log": (lambda run: run.log("81237", "batch"), TOLERATED),
    "script": (lambda run: run.script, TOLERATED),
    "samples": (lambda run: run.attempt(2).samples(0), TOLERATED),
    "code file": (lambda run: run.code / "train.py", TOLERATED),
    "stop": (lambda run: run.stop_file, TOLERATED),
    "attempts": (lambda run: run.path / "attempts", TOLERATED),
    "logs": (lambda run: run.logs, TOLERATED),
    "checkpoints": (lambda run: run.checkpoints, TOLERATED),
    "manifest": (lambda run: run.checkpoints / "step-00000020" / "manifest.json", CHECKPOINT),
    "model": (lambda run: run.checkpoints / "step-00000020" / "model.safetensors", CHECKPOINT),
}
_CORE = ("job.yaml", "ledger", "metrics", "progress", "manifest", "model")


def _case(name: str, file: str, damage: Callable[[Path], None], outcome: str | None = None, root: bool = False) -> Case:
    where, usual = _FILES[file]
    return Case(f"{file}: {name}", outcome or usual, lambda run: damage(where(run)), where, root)


def _manifest(**changes: Any) -> Callable[[Path], None]:
    """Other values in a manifest, under a sum that fits them."""

    def edit(path: Path) -> None:
        body = json.loads(path.read_text())
        body.pop("sum")
        for name, value in changes.items():
            body[name] = value(body[name]) if callable(value) else value
        path.write_text(json.dumps({**body, "sum": directory._sum_of(body)}))

    return edit


def _empty_device(path: Path) -> None:
    """A device for a tensor file, of which the manifest says that it has no byte."""
    manifest = path.with_name("manifest.json")
    _manifest(files=lambda files: {**files, path.name: {"bytes": 0, "sha256": files[path.name]["sha256"]}})(manifest)
    _zero(path)


def _wrong_fields() -> list[Case]:
    ledger = {
        "step is text": event(step="x"), "step is null": event(step=None), "step is infinite": event(step="!Infinity"), "step is true": event(step=True),
        "step has 4000 digits": event(step="!" + "9" * 4000), "step is negative": event(step=-3), "time is NaN": event(time="!NaN"), "time overflows": event(time="!1e400"),
        "time is far away": event(time=1e18), "nodes is a number": event("start", attempt=3, nodes=5), "nodes holds numbers": event("start", attempt=3, nodes=[1]),
        "world is text": event("start", attempt=3, world="x"), "attempt has 30 digits": event("start", attempt=10**30), "attempt is negative": event("start", attempt=-1),
        "parts is a list": event("end", cause="killed", parts=[1]), "parts holds text": event("end", cause="killed", parts={"useful": "x"}),
        "parts has an unknown name": event("end", cause="killed", parts={"useful": None}), "marks is text": event("end", cause="killed", marks="abc"), "marks holds text": event("end", cause="killed", marks=[["a", "b"]]),
        "seconds is text": event("end", cause="killed", seconds="x"), "lost_steps is a list": event("end", cause="killed", lost_steps=[]), "evidence is a number": event("end", cause="failed", evidence=5),
        "cause is a mapping": event("end", cause={}), "job_id leads outside": event("submitted", attempt=0, job_id="../../x"), "job_id has a line break": event("submitted", attempt=0, job_id="1\n2"),
        "evidence is half a character": event("end", cause="killed", evidence="!\"\\ud800\""), "nested 300 deep": event(x="!" + _NESTED), "200,000 deep": event(x="!" + _DEEP), "successor is a list": event("requeue", successor=[1]), 
    }  # fmt: skip
    metrics = {
        "step is text": '{"step":"x"}\n', "step is null": '{"step":null}\n', "step is infinite": '{"step":Infinity}\n', "step has 4000 digits": '{"step":' + "9" * 4000 + "}\n",
        "loss is text": '{"step":40,"loss":"x"}\n', "loss is a list": '{"step":40,"loss":[1]}\n', "tokens_per_s is text": '{"step":40,"tokens_per_s":"x"}\n', "peak_pct is a mapping": '{"step":40,"peak_pct":{}}\n',
        "time is text": '{"step":40,"time":"x","attempt":2}\n{"step":41,"time":"y","attempt":2}\n', "time is infinite": '{"step":40,"time":1e999}\n', "attempt is a list": '{"step":40,"attempt":[]}\n', "200,000 deep": _DEEP + "\n", "a line of 3 MB": '{"step":40,"x":"' + "x" * 3_000_000 + '"}\n',
    }  # fmt: skip
    return [_case(name, "ledger", _append(line), DAMAGED) for name, line in ledger.items()] + [
        _case(name, "metrics", _append(line), DAMAGED) for name, line in metrics.items()
    ]


def _tolerated_lines() -> list[Case]:
    """What a torn write, a kill or a later version leaves, and training may log: none of it is damage."""
    ledger = {
        "half a line": '{"event": "sta',
        "no text": b"\0" * 512,
        "null": "null\n",
        "no event": "[1, 2]\n",
        "attempt is text": event("end", attempt="x", cause="killed"),
        "no attempt": '{"event": "end", "job_id": "81237", "time": 1795000900.0}\n',
        "not UTF-8": b"\xff\xfe\n",
        "unknown event": event("later", x={"y": [1]}),
    }
    metrics = {
        "half a line": '{"step": 4',
        "null": "null\n",
        "not UTF-8": b"\xff\xfe\n",
        "loss is NaN": '{"step":40,"loss":NaN,"time":1795000900.0,"attempt":2}\n',
        "loss is null": '{"step":40,"loss":null}\n',
    }
    return [_case(name, "ledger", _append(line), TOLERATED) for name, line in ledger.items()] + [
        _case(name, "metrics", _append(line), TOLERATED) for name, line in metrics.items()
    ]


def _other_files() -> list[Case]:
    return [
        _case("not YAML", "job.yaml", _content("a: [")), _case("null", "job.yaml", _content("null\n")), _case("one setting", "job.yaml", _content("nodes: 5\n")), _case("last line has no end", "job.yaml", lambda path: _content(path.read_bytes()[:-1])(path)), _case("a list", "job.yaml", _content("- 1\n")),
        _case("200,000 deep", "job.yaml", _content(_DEEP)), _case("not UTF-8", "job.yaml", _content(b"\xff\xfe\x00")), _case("aliases that multiply", "job.yaml", _content(_BOMB)),
        _case("400 MB", "job.yaml", _sparse), _case("max_steps has 4000 digits", "job.yaml", _set_yaml(max_steps="9" * 4000)), _case("nodes is text", "job.yaml", _set_yaml(nodes="x")),
        _case("unknown setting", "job.yaml", _set_yaml(no_such="1")), _case("note holds a control character", "job.yaml", _set_yaml(note='"\\x00"')),
        _case("text", "progress", _content("x")), _case("4000 digits", "progress", _content("9" * 5000)), _case("negative", "progress", _content("-5")), _case("empty", "progress", _content(""), TOLERATED), _case("superscript two", "progress", _content("²")),
        _case("a number", "origins", _content("5")), _case("wrong values", "origins", _content('{"lr": [1]}')), _case("200,000 deep", "origins", _content(_DEEP)), _case("not UTF-8", "origins", _content(b"\xff")),
        _case("wrong values", "snapshot", _content('{"versions": 5, "commit": [1], "from": {}}')), _case("200,000 deep", "snapshot", _content(_DEEP)), _case("null", "snapshot", _content("null")),
        _case("200,000 deep", "code.json", _content(_DEEP)), _case("wrong values", "code.json", _content('{"train.py": 5, "../x": "y"}')),
        _case("wrong values", "clock", _content('{"seconds": {"useful": "x"}, "part": 5}')), _case("infinite", "clock", _content('{"seconds": {"useful": Infinity}, "part": "useful", "since": 1e999, "passed": NaN, "unfinished": 0, "steps": 1}')),
        _case("200,000 deep", "clock", _content(_DEEP)), _case("wrong values", "owner", _content('{"job_id": 5, "host": [], "pid": "x", "stamp": {}}')), _case("200,000 deep", "owner", _content(_DEEP)),
        _case("wrong values", "log_sizes", _content('{"0": [], "batch": "x"}')), _case("a number", "log_sizes", _content("5")), _case("200,000 deep", "log_sizes", _content(_DEEP)),
        _case("wrong values", "samples", _content('{"step": "x"}\n')), _case("null", "samples", _content("null\n")), _case("huge step", "samples", _append('{"step": 1000000000000, "attempt": 2, "slots": [0], "ids": [0], "samples": 1, "batch": 1}\n')), _case("huge batch", "samples", _content('{"step": 0, "attempt": 2, "slots": [0], "ids": [0], "samples": 1000000000000, "batch": 1000000000000}\n')), _case("200,000 deep", "samples", _content(_DEEP + "\n")),
        _case("superscript two", "attempts", lambda path: (path / "²").mkdir()), _case("twenty digits", "attempts", lambda path: (path / ("9" * 20)).mkdir()),
        _case("a file", "attempts", _content("x"), DAMAGED), _case("a file", "logs", _content("x")), _case("a file", "checkpoints", _content("x")),
        _case("null", "manifest", _content("null")), _case("200,000 deep", "manifest", _content(_DEEP)), _case("files is a list", "manifest", _manifest(files=[1])), _case("bytes is text", "manifest", _manifest(files=lambda files: {name: {**entry, "bytes": "x"} for name, entry in files.items()})),
        _case("bytes is infinite", "manifest", _manifest(files=lambda files: {name: {**entry, "bytes": float("inf")} for name, entry in files.items()})), _case("name with a null character", "manifest", _manifest(files=lambda files: {"model.a\0b": {"bytes": 1, "sha256": ""}, "optimizer.x": {"bytes": 1, "sha256": ""}})),
        _case("tokens is text", "manifest", _manifest(state=lambda state: {**state, "tokens": "x"})), _case("val_loss is a list", "manifest", _manifest(state=lambda state: {**state, "val_loss": [1]})), _case("versions is a number", "manifest", _manifest(state=lambda state: {**state, "versions": 5})),
        _case("step is infinite", "manifest", _manifest(step=float("inf"))), _case("device of no bytes", "model", _empty_device),
    ]  # fmt: skip


# The files of a run, and what each of them is replaced by.
_MATRIX_FILES = ("job.yaml", "ledger", "metrics", "progress", "origins", "snapshot", "code.diff", "code.json", "clock", "owner", "log_sizes")
_MATRIX: dict[str, Callable[[Path], None]] = {
    "a folder": _folder, "empty": _content(""), "cut": _cut, "brackets 200,000 deep": _content(_DEEP), "step x": _content('{"step":"x"}'), "Infinity": _content("Infinity"),
    "null alone": _content("null"), "nodes 5": _content('{"nodes":5}\n'), "binary": _content(bytes(range(256)) * 20),
}  # fmt: skip
# Replacements of files that `status` reads and that are no damage: a kill leaves them.
_LEFT_BY_A_KILL = {("ledger", "cut"), ("metrics", "empty"), ("metrics", "cut"), ("progress", "empty"), ("progress", "cut")}


def _matrix() -> list[Case]:
    return [_case(kind, file, damage, TOLERATED if (file, kind) in _LEFT_BY_A_KILL else None) for file in _MATRIX_FILES for kind, damage in _MATRIX.items()]


def cases() -> list[Case]:
    kinds: dict[str, Callable[[Path], None]] = {"FIFO": _fifo, "link to /dev/zero": _zero}
    rare: dict[str, Callable[[Path], None]] = {"link to itself": _loop, "folder": _folder, "socket": _socket, "link": _link, "50 GB of zeros": _sparse}
    found = [_case(kind, file, damage) for file in _FILES if file not in ("attempts", "logs", "checkpoints") for kind, damage in kinds.items()]
    found += [_case(kind, file, damage) for file in _CORE for kind, damage in rare.items()]
    found += [_case("device", file, _zero_device, root=True) for file in _CORE]
    return found + _matrix() + _wrong_fields() + _tolerated_lines() + _other_files()


# -- commands within limits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    code: int | None  # None: a traceback, or the limit of time or memory was met
    out: str
    err: str
    seconds: float


class _TooLong(BaseException):
    pass


def answers(work: Path, commands: Sequence[Sequence[str]], limit_s: float = LIMIT_S) -> tuple[list[Answer], float]:
    """Each command in one forked process without Slurm, and how far its peak of memory lies above that at the start, in MB. Commands of which none was run are missing."""
    kept = work / "answers.json"
    kept.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            _child(work, commands, kept, limit_s)
        finally:
            os._exit(0)
    limit = time.monotonic() + limit_s * (len(commands) + 1)
    while time.monotonic() < limit and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not kept.exists():
        return [], float("inf")
    content = json.loads(kept.read_text())
    return [Answer(*one) for one in content["answers"]], content["mb"]


def _child(work: Path, commands: Sequence[Sequence[str]], kept: Path, limit_s: float) -> None:
    os.chdir(work)
    os.environ["PATH"] = "/nowhere"
    for name in [name for name in os.environ if name.startswith(("SLURM_", "HOLDFAST_"))]:
        del os.environ[name]
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    done: list[tuple[int | None, str, str, float]] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for words in commands:
        paths = (work / "out", work / "err")
        begun = time.monotonic()
        with open(paths[0], "w", errors="strict", encoding="utf-8") as out, open(paths[1], "w", encoding="utf-8") as err:
            sys.stdout, sys.stderr = out, err
            signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
            code: int | None = None
            try:
                code = int(run_app(list(words)))
            except BaseException:
                signal.setitimer(signal.ITIMER_REAL, 0)
                err.write(traceback.format_exc()[-2000:].encode(errors="replace").decode())
            signal.setitimer(signal.ITIMER_REAL, 0)
            with contextlib.suppress(UnicodeError):
                out.flush()
        done.append((code, *(path.read_text(errors="replace")[:2_000_000] for path in paths), time.monotonic() - begun))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    kept.with_suffix(".part").write_text(json.dumps({"answers": done, "mb": peak}))
    os.rename(kept.with_suffix(".part"), kept)
