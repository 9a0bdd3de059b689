"""What the batch script calls on the node: the beginning and the end of an attempt, and the way in without the launcher.

    python -m launcher.attempt begin                      prints the file to source
    python -m launcher.attempt end --code N --signals S   cause, ledger, verdict, requeue
    python -m launcher.attempt adopt                      makes the run of a job that was submitted by hand

Imports stay few: at a preemption without grace there are only seconds left when `end` starts.
"""

import argparse
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from jobs import ledger
from jobs.contract import Cause, Event, Exit, RankEnv
from jobs.errors import HoldfastError, RunOwnedError, SubmitError
from jobs.rundir import RunDir
from jobs.settings import Job, parse_minutes
from jobs.sources import load
from jobs.verdict import Budgets, Verdict, judge
from launcher.cause import Evidence, classify
from launcher.rendezvous import address_of, free_port
from slurm.client import JobInfo, Slurm, expand_nodelist
from slurm.states import ENDED, base, is_live

# Job ids of runs without Slurm: this word and the number of the process that watches over the ranks.
LOCAL = "local-"
# Where an attempt keeps the size that the batch log had when it began.
_LOG_OFFSET = "HOLDFAST_LOG_OFFSET"


def job_id_of(environ: Mapping[str, str]) -> str:
    """1234, or 1234_5 for a task of an array: the form that scontrol and squeue understand."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ.get("SLURM_JOB_ID", f"{LOCAL}{os.getpid()}")


def begin(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None) -> dict[str, str]:
    """Counts the attempt, closes the one before if nobody could, and returns the variables that the ranks need.

    They are also written to the attempt's folder as a file to source.

    Raises RunOwnedError when another job is training this run, HoldfastError when the run is over."""
    from slurm.render import pattern  # brings the template engine with it, which `end` has no time for

    job = load(run.job_yaml)
    job_id, restarts = job_id_of(environ), int(environ.get("SLURM_RESTART_COUNT", "0") or 0)
    events = ledger.read(run.ledger)
    known = ledger.attempts(events)
    if known and known[-1].cause is None:
        _close(run, job, known[-1], job_id, slurm)
        events = ledger.read(run.ledger)
    verdict = judge(events, budgets_of(job))
    # Slurm may bring a job back that is over (a requeue by somebody else). Another job is a person's own wish.
    if known and not verdict.again and known[-1].job_id == job_id:
        raise HoldfastError(f"run {run.id} is over: {verdict.reason}. `holdfast resume {run.id}` starts it again on purpose.")
    number = (known[-1].number if known else 0) + 1
    nodes = expand_nodelist(environ.get("SLURM_JOB_NODELIST", "")) or [socket.gethostname()]
    address = address_of(nodes[0], slurm) if slurm else "127.0.0.1"
    attempt = run.attempt(number)
    attempt.path.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir(exist_ok=True)
    batch_log = run.log(job_id, "batch")
    values = {
        RankEnv.ATTEMPT.value: str(number),
        RankEnv.MASTER_ADDR.value: address,
        RankEnv.MASTER_PORT.value: str(free_port(job_id, restarts)),
        "HOLDFAST_JOB_ID": job_id,
        "HOLDFAST_RANK_LOG": pattern(run.logs) + f"/{job_id}.%t.out",
        _LOG_OFFSET: str(batch_log.stat().st_size if batch_log.exists() else 0),
    }
    attempt.env.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))
    ledger.append(
        run.ledger,
        Event.START,
        attempt=number,
        job_id=job_id,
        nodes=nodes,
        world=job.world_size,
        restarts=restarts,
        host=socket.gethostname(),
    )
    return values


def end(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None, code: int, signals: list[str]) -> tuple[Verdict, Cause]:
    """Writes down why the attempt ended and whether the run goes on; asks Slurm to put it back into the queue if so."""
    job = load(run.job_yaml)
    job_id, number = job_id_of(environ), int(environ[RankEnv.ATTEMPT])
    info = _ask(slurm, job_id)
    log = run.log(job_id, "batch")
    seen = Evidence(
        code=code,
        signals=signals,
        markers=_markers(run, number, job.world_size),
        world=job.world_size,
        log=_tail(log, int(environ.get(_LOG_OFFSET, "0"))),
        job=info,
        seconds_to_limit=_seconds_to_limit(run, number, job) if slurm else None,
        lead_s=job.stop_lead_s,
        cancel_wished=_cancel_wished(run, number),
    )
    cause, evidence = classify(seen)
    _write_end(run, number, job_id, cause, evidence, code)
    verdict = judge(ledger.read(run.ledger), budgets_of(job))
    print(f"holdfast: attempt {number} ended: {cause.value} ({evidence}). {'Again: ' if verdict.again else 'Over: '}{verdict.reason}.", flush=True)
    if verdict.again and slurm is not None:
        try:
            way = slurm.requeue(job_id)
        except SubmitError as err:
            way = f"could not be requeued: {err}"
        ledger.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=way)
        print(f"holdfast: {way}", flush=True)
    return verdict, cause


def budgets_of(job: Job) -> Budgets:
    return Budgets(
        node_failure=job.max_node_failure,
        killed=job.max_killed,
        out_of_memory=job.max_out_of_memory,
        code_error=job.max_code_error,
        hang=job.max_hang,
        storage=job.max_storage,
        unknown=job.max_unknown,
        no_progress=job.max_no_progress,
    )


def _close(run: RunDir, job: Job, open_attempt: ledger.Attempt, job_id: str, slurm: Slurm | None) -> None:
    """Writes the end of an attempt whose batch script was killed before it could."""
    if open_attempt.job_id != job_id:
        other = _ask(slurm, open_attempt.job_id)
        if other is not None and is_live(other.state):
            raise RunOwnedError(f"job {open_attempt.job_id} is training run {run.id} (attempt {open_attempt.number}, {other.state}); this job leaves it alone.")
    markers = _markers(run, open_attempt.number, job.world_size)
    rows = slurm.accounting(open_attempt.job_id) if slurm else []
    log = run.log(open_attempt.job_id, "batch")
    seen = Evidence(
        code=Exit.REQUEUE if markers else 0,
        markers=markers,
        world=job.world_size,
        log=_tail(log, _offset_of(run, open_attempt.number)),
        accounting=[row.state for row in rows],
        cancel_wished=_cancel_wished(run, open_attempt.number),
    )
    cause, evidence = classify(seen)
    if cause in (Cause.UNKNOWN, Cause.REQUEUED) and rows:
        ended = [row for row in rows if row.job_id == open_attempt.job_id and base(row.state) in ENDED]
        if ended:
            cause, evidence = ENDED[base(ended[-1].state)], f"sacct: {ended[-1].state}"
    _write_end(run, open_attempt.number, open_attempt.job_id, cause, f"{evidence}; the batch script could not say", None)


def _write_end(run: RunDir, number: int, job_id: str, cause: Cause, evidence: str, code: int | None) -> None:
    """The `end` line: the step reached, the newest checkpoint, and what lies between them and is lost."""
    events = [event for event in ledger.read(run.ledger) if event.get("attempt") == number]
    started = next((event for event in events if event["event"] == Event.START), None)
    start_step = max((int(event["step"]) for event in events if event["event"] == Event.RESUMED), default=0)
    saved = max((int(event["step"]) for event in events if event["event"] == Event.CHECKPOINT), default=start_step)
    try:
        reached = int(run.attempt(number).progress.read_text())
    except (OSError, ValueError):
        reached = saved
    seconds = time.time() - float(started["time"]) if started else 0.0
    ledger.append(
        run.ledger,
        Event.END,
        attempt=number,
        job_id=job_id,
        cause=cause,
        evidence=evidence,
        exit_code=code,
        start_step=start_step,
        step=max(reached, saved),
        saved_step=saved,
        lost_steps=max(reached - saved, 0),
        seconds=round(seconds, 1),
        gpu_seconds=round(seconds * int(started["world"]), 1) if started else 0.0,
    )


def _markers(run: RunDir, number: int, world: int) -> dict[int, dict[str, object]]:
    found = {}
    for rank in range(world):
        try:
            found[rank] = json.loads(run.attempt(number).marker(rank).read_text())
        except (OSError, ValueError):
            continue
    return found


def _tail(log: Path, offset: int) -> str:
    """What was written to a log since `offset`; at most its last 64 kB."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset if offset <= size else 0, size - 65_536))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _offset_of(run: RunDir, number: int) -> int:
    try:
        for line in run.attempt(number).env.read_text().splitlines():
            if line.startswith(f"export {_LOG_OFFSET}="):
                return int(line.partition("=")[2])
    except (OSError, ValueError):
        pass
    return 0


def _seconds_to_limit(run: RunDir, number: int, job: Job) -> float | None:
    starts = [event for event in ledger.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number]
    return float(starts[-1]["time"]) + job.time_limit * 60 - time.time() if starts else None


def _cancel_wished(run: RunDir, number: int) -> bool:
    """Whether `holdfast cancel` was called after this attempt began (or while it waited)."""
    wished = False
    for event in ledger.read(run.ledger):
        if event["event"] == Event.CANCEL:
            wished = True
        elif event["event"] == Event.SUBMITTED:
            wished = False
    return wished


def _ask(slurm: Slurm | None, job_id: str) -> JobInfo | None:
    if slurm is None:
        return None
    try:
        return slurm.job(job_id)
    except SubmitError:
        return None


def adopt(environ: Mapping[str, str], cwd: Path) -> Path:
    """The script of the run that belongs to this Slurm job, which is made at its first attempt."""
    from launcher.prepare import prepare, resolve_here  # git and hashing: only a first attempt needs them

    job_id = job_id_of(environ).replace("_", ".")
    allocation: dict[str, object] = {"run_id": f"j{job_id}", "nodes": int(environ.get("SLURM_JOB_NUM_NODES", "1"))}
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    allocation["gpus_per_node"] = int(environ.get("SLURM_NTASKS_PER_NODE") or max(int(environ.get("SLURM_NTASKS", "1")) // nodes, 1))
    info = _ask(Slurm(environ), job_id_of(environ))
    if info is not None:
        try:
            allocation["time_limit"] = parse_minutes(info.time_limit)
        except ValueError:  # UNLIMITED
            allocation["time_limit"] = 365 * 1440
    resolved = resolve_here([], environ, cwd, allocation=allocation)
    run, made = prepare(resolved, cwd, sys.executable)
    if made:
        ledger.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id_of(environ), by="sbatch")
    return run.script


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.attempt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("begin")
    commands.add_parser("adopt")
    ending = commands.add_parser("end")
    ending.add_argument("--code", type=int, required=True)
    ending.add_argument("--signals", default="")
    args = parser.parse_args()
    started = datetime.now().isoformat(timespec="seconds")
    try:
        if args.command == "adopt":
            print(adopt(os.environ, Path.cwd()))
            return Exit.DONE
        run = RunDir(Path(os.environ[RankEnv.RUN_DIR]))
        slurm = Slurm() if "SLURM_JOB_ID" in os.environ else None
        if args.command == "begin":
            values = begin(run, os.environ, slurm)
            print(run.attempt(int(values[RankEnv.ATTEMPT])).env)
            return Exit.DONE
        verdict, cause = end(run, os.environ, slurm, args.code, [name for name in args.signals.split(",") if name])
    except HoldfastError as err:
        print(f"holdfast ({started}): {err}", file=sys.stderr, flush=True)
        return err.exit_code
    if cause is Cause.FINISHED:
        return Exit.DONE
    if verdict.again:
        return Exit.REQUEUE
    return args.code or Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
