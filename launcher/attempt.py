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
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs import access, goodput, lease, ledger
from jobs.contract import Cause, Event, Exit, RankEnv
from jobs.errors import HoldfastError, RunOwnedError, SubmitError
from jobs.rundir import RunDir
from jobs.settings import Job, parse_minutes
from jobs.sources import load
from jobs.verdict import Budgets, Verdict, judge
from launcher.cause import Evidence, classify
from launcher.nodes import avoided, checked
from launcher.rendezvous import address_of, free_port
from slurm.client import AccountingRow, JobInfo, Slurm, expand_nodelist

# Job ids of runs without Slurm: this word and the number of the process that watches over the ranks.
LOCAL = "local-"
# Where an attempt keeps the size that the batch log had when it began.
_LOG_OFFSET = "HOLDFAST_LOG_OFFSET"
# Seconds to wait for a controller that is just being restarted: for a fact about a job, and before a job gives way.
_ASK_PATIENCE_S = 20.0
_OWNER_PATIENCE_S = 60.0
# Two jobs that begin at once see each other within this many tries.
_CLAIMS = 20
# What a person may want to read of a traceback without opening a file.
_SHOWN_LINES = 40


def job_id_of(environ: Mapping[str, str]) -> str:
    """1234, or 1234_5 for a task of an array: the form that scontrol and squeue understand."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ.get("SLURM_JOB_ID", f"{LOCAL}{os.getpid()}")


def begin(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None) -> dict[str, str]:
    """Counts the attempt, closes the one before if nobody could, and returns the variables that the ranks need.

    They are also written to the attempt's folder as a file to source.

    Raises RunOwnedError when another job is training this run or a node did not pass its checks, HoldfastError when the run
    is over."""
    from slurm.render import pattern  # brings the template engine with it, which `end` has no time for

    if run.is_member and not run.job_yaml.exists():
        from launcher.trial import take_up  # a sweep chooses the values of a trial when its first attempt begins

        take_up(run, job_id_of(environ))
    job = load(run.job_yaml)
    job_id, restarts = job_id_of(environ), _restarts(environ)
    number, events = _own(run, job, job_id, restarts, slurm)
    nodes = expand_nodelist(environ.get("SLURM_JOB_NODELIST", "")) or [socket.gethostname()]
    address = address_of(nodes[0], slurm, others=len(nodes) > 1) if slurm else "127.0.0.1"
    attempt = run.attempt(number)
    run.logs.mkdir(exist_ok=True)
    batch_log = run.log(job_id, "batch")
    if batch_log.exists():
        # Slurm made it with the umask of whoever called sbatch.
        access.close_to_others(batch_log)
    values = {
        RankEnv.ATTEMPT.value: str(number),
        RankEnv.MASTER_ADDR.value: address,
        RankEnv.MASTER_PORT.value: str(free_port(job_id, restarts)),
        "HOLDFAST_JOB_ID": job_id,
        "HOLDFAST_RANK_LOG": pattern(run.logs) + f"/{job_id}.%t.out",
        _LOG_OFFSET: str(batch_log.stat().st_size if batch_log.exists() else 0),
        RankEnv.STARTED.value: f"{time.monotonic():.3f}",
        # The last collectives of every rank are kept and written down when one of them times out.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{attempt.path}/nccl_trace_rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{attempt.path}/nccl_trace_rank_",
    }
    attempt.env.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))
    pace_key = f"{job.nodes}x{job.gpus_per_node} {job.model} {json.dumps(job.model_options, sort_keys=True)} {job.batch_size} {job.seq_len} {job.precision} {job.device}"
    watch = {
        "world": job.world_size, "nodes": nodes, "per_node": job.gpus_per_node, "pace_key": pace_key,
        "least_s": job.hang_after_s, "quiet_s": job.hang_quiet_s, "own": job.entry is not None,
    }  # fmt: skip
    attempt.watch.write_text(json.dumps(watch))
    attempt.log_sizes.write_text(json.dumps(_log_sizes(run, job_id)))
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
    bad = checked(run, job, number, nodes, {**environ, **values}, under_slurm=slurm is not None)
    if bad:
        _turn_away(run, job, number, job_id, restarts, bad, slurm, environ)
    return values


def _log_sizes(run: RunDir, job_id: str) -> dict[str, int]:
    """`0`, `1`, `batch` -> bytes that the job's earlier attempts have written to that log."""
    begin = len(job_id) + 1
    return {
        path.name.removesuffix(".out")[begin:]: path.stat().st_size
        for path in run.logs.iterdir()
        if path.name.startswith(f"{job_id}.") and path.name.endswith(".out")
    }


def _own(run: RunDir, job: Job, job_id: str, restarts: int, slurm: Slurm | None) -> tuple[int, list[dict[str, Any]]]:
    """The number of an attempt that is now ours, and the ledger without an open attempt in it.

    Raises RunOwnedError when another job holds the run, HoldfastError when the run is over."""
    owner = {"job_id": job_id, "restarts": restarts, "host": socket.gethostname(), "pid": os.getpid() if slurm is None else 0}
    if slurm is None:
        owner["stamp"] = lease.process_stamp(os.getpid())
    for _ in range(_CLAIMS):
        events = ledger.read(run.ledger)
        for open_attempt in [attempt for attempt in ledger.attempts(events) if attempt.cause is None]:
            _give_way(run, open_attempt.number, open_attempt.job_id, job_id, events, slurm)
            _close(run, job, open_attempt, job_id, slurm)
        events = ledger.read(run.ledger)
        known = ledger.attempts(events)
        verdict = judge(events, budgets_of(job))
        if not verdict.again:
            # Slurm may bring a job back that is over, and a successor may find that its job came back by itself. Any other
            # job is a person's own wish, and begins with new budgets.
            begun = [attempt.job_id for attempt in known] or [event["job_id"] for event in events if event["event"] == Event.SUBMITTED]
            if begun[-1:] == [job_id] or any(event["event"] == Event.REQUEUE and event.get("successor") == job_id for event in events):
                raise HoldfastError(f"run {run.id} is over: {verdict.reason}. `holdfast resume {run.id}` starts it again on purpose.")
            ledger.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id, by="sbatch" if slurm else "run")
        number = max(known[-1].number if known else 0, lease.newest(run)) + 1
        claimed = lease.newest(run)
        if claimed > (known[-1].number if known else 0):
            # Somebody has the number and has not written the start yet, or died before.
            _give_way(run, claimed, str(lease.owner_of(run, claimed).get("job_id", "")), job_id, events, slurm)
        if lease.claim(run, number, owner):
            return number, ledger.read(run.ledger)
        time.sleep(0.05)
    raise RunOwnedError(f"other jobs keep beginning attempts of run {run.id}; this job leaves it alone.")


def _give_way(run: RunDir, number: int, other: str, job_id: str, events: Sequence[Mapping[str, Any]], slurm: Slurm | None) -> None:
    """Raises RunOwnedError when the job that holds attempt `number` lives; when that cannot be found out, too."""
    if not other or (other == job_id and not other.startswith(LOCAL)):
        return
    # A successor starts when the job before it is over: Slurm itself saw to that.
    if any(event["event"] == Event.REQUEUE and event.get("successor") == job_id and event["job_id"] == other for event in events):
        return
    said = f"job {other} is training run {run.id} (attempt {number}); this job leaves it alone."
    if other.startswith(LOCAL):
        owner = lease.owner_of(run, number)
        host, stamp = owner.get("host"), owner.get("stamp")
        if host == socket.gethostname():
            if stamp and lease.process_stamp(int(owner.get("pid", 0))) == stamp and int(owner["pid"]) != os.getpid():
                raise RunOwnedError(said)
        elif host:
            raise RunOwnedError(
                f"run {run.id} was begun on {host} without Slurm, and from here nobody can see whether it still runs. If it does not, delete {run.attempt(number).owner}."
            )
        return
    if slurm is None:
        if not Slurm.available():
            return
        slurm = Slurm()
    try:
        if slurm.patiently(lambda: slurm.is_live(other), _OWNER_PATIENCE_S):
            raise RunOwnedError(said)
    except SubmitError as err:
        raise RunOwnedError(f"attempt {number} of run {run.id} belongs to job {other}, and Slurm does not say whether it lives: {err}") from err


def end(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None, code: int, signals: list[str]) -> tuple[Verdict, Cause]:
    """Writes down why the attempt ended and whether the run goes on; asks Slurm to put it back into the queue if so.

    Does neither when a later attempt has begun: then this one is a ghost, of a node that Slurm took for dead."""
    job = load(run.job_yaml)
    job_id, number = job_id_of(environ), int(environ[RankEnv.ATTEMPT])
    if _is_ghost(run, number):
        print(f"holdfast: attempt {number} was closed by a later one; nothing is written and nothing requeued", flush=True)
        return Verdict(True, "a later attempt has taken over"), Cause.UNKNOWN
    info = _ask(slurm, job_id, _ASK_PATIENCE_S)
    if info is not None and info.preempted_at and _local_time(info.preempted_at) < _started_at(run, number) - 1:
        info = replace(info, preempted_at=None)  # of an earlier attempt
    log = run.log(job_id, "batch")
    markers = _markers(run, number, job.world_size)
    missing = sorted(set(range(job.world_size)) - set(markers))
    nodes = _nodes_of(run, number)
    seen = Evidence(
        code=code,
        signals=signals,
        markers=markers,
        world=job.world_size,
        log=_tail(log, int(environ.get(_LOG_OFFSET, "0"))),
        rank_logs=_rank_logs(run, job, job_id, number, missing),
        job=info,
        seconds_to_limit=_seconds_to_limit(run, number, job, info, environ) if slurm else None,
        lead_s=job.stop_lead_s,
        cancel_wished=_cancel_wished(run),
        hang=_hang(run, number),
        lost_nodes=_lost(slurm, nodes, job, missing),
        stop_file=_stop_words(run),
        own_script=job.entry is not None,
    )
    cause, evidence = classify(seen)
    if _is_ghost(run, number):
        return Verdict(True, "a later attempt has taken over"), cause
    _write_end(run, number, job_id, cause, evidence, code, _elapsed(run, number, environ))
    _blame(run, number, job_id, cause, evidence, seen, nodes)
    events = ledger.read(run.ledger)
    verdict = judge(events, budgets_of(job))
    print(f"holdfast: attempt {number} ended: {cause.value} ({evidence}). {'Again: ' if verdict.again else 'Over: '}{verdict.reason}.", flush=True)
    if not verdict.again:
        _show_error(run, number, job.world_size)
        if run.is_member and run.array.sweep.exists():
            from launcher.trial import tell_sweep

            tell_sweep(run)
        _notify(run, job, verdict, cause, evidence, environ)
    if verdict.again and slurm is not None:
        _send_back(run, job, number, job_id, _restarts(environ), slurm)
    return verdict, cause


def _send_back(run: RunDir, job: Job, number: int, job_id: str, restarts: int, slurm: Slurm) -> None:
    """Back into the queue: by `scontrol requeue`, else by a job of its own that waits for the end of this one."""
    fields: dict[str, Any] = {}
    with suppress(ValueError):  # not the main thread: then nobody signals us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        way = slurm.requeue(job_id, restarts)
    except SubmitError as refused:
        try:
            successor, new = slurm.successor(run.script, job_id, run.script.parent.name, run.path.name if run.is_member else None)
            way = f"job {successor} {'was submitted to go' if new else 'is queued already and goes'} on when this one is over; requeue was not possible: {refused}"
            fields["successor"] = successor
        except SubmitError as err:
            way = f"could not be requeued: {refused}; and no successor could be submitted: {err}"
    bad = avoided(ledger.read(run.ledger), job.avoid_node_h, time.time())
    # What follows may be cut short: Slurm ends this script when its job is requeued. TERM is ignored here, KILL is not.
    ledger.append(run.ledger, Event.REQUEUE, attempt=number, job_id=job_id, way=way, **fields)
    print(f"holdfast: {way}", flush=True)
    if bad:
        try:
            waiting = fields.get("successor", job_id)
            if slurm.partition_nodes(waiting) - len(bad) >= job.nodes:
                slurm.exclude(waiting, sorted({*bad, *job.exclude}))
                print(f"holdfast: the next attempt stays away from {', '.join(bad)}", flush=True)
        except (SubmitError, IndexError, ValueError) as err:
            print(f"holdfast: the next attempt cannot be kept away from {', '.join(bad)}: {err}", flush=True)


def _turn_away(run: RunDir, job: Job, number: int, job_id: str, restarts: int, bad: Mapping[str, str], slurm: Slurm | None, environ: Mapping[str, str]) -> None:
    """Ends an attempt whose nodes did not pass their checks. Raises RunOwnedError (go on later) or HoldfastError (over)."""
    said = "; ".join(f"{node}: {fault}" for node, fault in bad.items())
    is_disk = "" in bad
    cause = Cause.STORAGE if is_disk else Cause.NODE_FAILURE
    for node, fault in bad.items():
        if node:
            ledger.append(run.ledger, Event.BAD_NODE, attempt=number, job_id=job_id, node=node, reason=fault)
    _write_end(run, number, job_id, cause, f"before the start: {said.removeprefix(': ')}", None, _elapsed(run, number, environ))
    verdict = judge(ledger.read(run.ledger), budgets_of(job))
    if not verdict.again:
        _notify(run, job, verdict, cause, said.removeprefix(": "), environ)
        raise HoldfastError(f"run {run.id}: {said}. Over: {verdict.reason}.")
    if slurm is not None:
        _send_back(run, job, number, job_id, restarts, slurm)
    later = "It goes back into the queue" if slurm is not None else f"holdfast resume {run.id} tries again"
    raise RunOwnedError(f"run {run.id} does not start here: {said.removeprefix(': ')}. {later} ({verdict.reason}).")


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
    number, other = open_attempt.number, open_attempt.job_id
    markers = _markers(run, number, job.world_size)
    finished = len(markers) == job.world_size and all(marker.get("reason") == "finished" for marker in markers.values())
    missing = sorted(set(range(job.world_size)) - set(markers))
    rows = _rows_of(slurm.accounting(other) if slurm else [], open_attempt)
    seen = Evidence(
        code=0 if finished else Exit.REQUEUE if markers else 1,
        markers=markers,
        world=job.world_size,
        log=_tail(run.log(other, "batch"), _offset_of(run, number)),
        rank_logs=_rank_logs(run, job, other, number, missing),
        accounting=[row.state for row in rows],
        cancel_wished=_cancel_wished(run),
        hang=_hang(run, number),
        lost_nodes=_lost(slurm, list(open_attempt.nodes), job, missing),
        brought_back=slurm is not None and other == job_id,
        gone=slurm is not None and other != job_id and not other.startswith(LOCAL),
        stop_file=_stop_words(run),
    )
    cause, evidence = classify(seen)
    # A local run has nobody above it: when its process is gone with the ranks, it was killed.
    if cause is Cause.UNKNOWN and other.startswith(LOCAL):
        cause, evidence = Cause.KILLED, "the process that watched over the ranks is gone"
    _write_end(run, number, other, cause, f"{evidence}; the batch script could not say", None, _lived(run, open_attempt, rows))
    _blame(run, number, other, cause, evidence, seen, list(open_attempt.nodes))


def _rows_of(rows: Sequence[AccountingRow], attempt: ledger.Attempt) -> list[AccountingRow]:
    """Those of sacct's rows that belong to one attempt: the job's own first. The accounting lags, and what it shows may still
    be the attempt before, so a row counts only when it was running as this attempt began."""
    mine = []
    for row in rows:
        start, finish = _local_time(row.start), _local_time(row.end)
        if start <= attempt.started + 5 and finish > attempt.started - 5:
            mine.append(row)
    return sorted(mine, key=lambda row: "." in row.job_id)


def _local_time(text: str) -> float:
    """Unix seconds of `2026-11-21T23:42:33` in the zone of this machine; infinity for Unknown."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return float("inf")


def _is_ghost(run: RunDir, number: int) -> bool:
    return lease.superseded(run, number) or any(event["event"] == Event.END and event["attempt"] == number for event in ledger.read(run.ledger))


def _write_end(run: RunDir, number: int, job_id: str, cause: Cause, evidence: str, code: int | None, seconds: float) -> None:
    """The `end` line: the step reached, the newest checkpoint, what lies between them and is lost, and where the time went."""
    events = [event for event in ledger.read(run.ledger) if event.get("attempt") == number]
    started = next((event for event in events if event["event"] == Event.START), None)
    start_step = max((int(event["step"]) for event in events if event["event"] == Event.RESUMED), default=0)
    saved = max((int(event["step"]) for event in events if event["event"] == Event.CHECKPOINT), default=start_step)
    try:
        reached = int(run.attempt(number).progress.read_text())
    except (OSError, ValueError):
        reached = saved
    own_script = load(run.job_yaml).entry is not None
    record = clock_record(run, number)
    # A person's own script saves where and when it likes: whether it got forward is not known.
    known = not own_script or any(event["event"] in (Event.RESUMED, Event.CHECKPOINT) for event in events)
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
        saved_step=saved if known else None,
        lost_steps=max(reached - saved, 0),
        seconds=round(seconds, 3),
        gpu_seconds=round(seconds * int(started["world"]), 1) if started else 0.0,
        parts=goodput.parts_of(record, seconds, cause, own_script=own_script, worked=reached > start_step),
        marks=record.get("marks", []) if record else [],
    )


def clock_record(run: RunDir, number: int) -> dict[str, Any] | None:
    """The last record of rank 0's clock in an attempt; None where there is none, empty where it cannot be read."""
    try:
        record = json.loads(run.attempt(number).clock.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _lived(run: RunDir, attempt: ledger.Attempt, rows: Sequence[AccountingRow]) -> float:
    """Seconds of an attempt whose end nobody saw: to the end that the accounting knows, else to its last sign of life."""
    until_now = max(time.time() - attempt.started, 0.0)
    for row in rows:
        if "." not in row.job_id and attempt.started <= (finish := _local_time(row.end)) < float("inf"):
            return min(finish - attempt.started, until_now)
    signs = [float((clock_record(run, attempt.number) or {}).get("passed", 0.0))]
    for path in (run.attempt(attempt.number).progress, run.log(attempt.job_id, "batch"), *run.attempt(attempt.number).path.glob("exit.*.json")):
        with suppress(OSError):
            signs.append(path.stat().st_mtime - attempt.started)
    return min(max(signs), until_now)


def _blame(run: RunDir, number: int, job_id: str, cause: Cause, evidence: str, seen: Evidence, nodes: list[str]) -> None:
    """Writes down which node failed, so that the next attempt stays away from it. A hang may be the code's own fault: its
    node counts from the second time on (`launcher.nodes.avoided`)."""
    if cause is Cause.NODE_FAILURE:
        named = [node for node in nodes if node in seen.lost_nodes or f"Node failure on {node}" in seen.log]
    elif cause is Cause.HANG and seen.hang:
        named = [str(node) for node in seen.hang.get("nodes", [])]
    else:
        named = []
    # On a run of one node there is no other to tell it from; Slurm itself keeps it away while it is down.
    for node in named:
        ledger.append(run.ledger, Event.BAD_NODE, attempt=number, job_id=job_id, node=node, reason=evidence, hang=cause is Cause.HANG)


def _notify(run: RunDir, job: Job, verdict: Verdict, cause: Cause, evidence: str, environ: Mapping[str, str]) -> None:
    """Of a run that is over only, so that nobody's requeue waits for it."""
    from launcher.notify import tell

    tell(run, job, verdict, cause, evidence, environ)


def _show_error(run: RunDir, number: int, world: int) -> None:
    """The traceback of the first rank that failed by itself, on standard output."""
    markers = [marker for marker in _markers(run, number, world).values() if marker.get("reason") == "error"]
    for marker in sorted(markers, key=lambda marker: str(marker.get("time")))[:1]:
        try:
            lines = run.attempt(number).error(int(str(marker["rank"]))).read_text().splitlines()
        except (OSError, ValueError, KeyError):
            continue
        print(f"holdfast: rank {marker['rank']} said:\n" + "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:]), flush=True)


def _markers(run: RunDir, number: int, world: int) -> dict[int, dict[str, object]]:
    found = {}
    for rank in range(world):
        try:
            marker = json.loads(run.attempt(number).marker(rank).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(marker, dict):
            found[rank] = marker
    return found


def _hang(run: RunDir, number: int) -> dict[str, Any] | None:
    try:
        said = json.loads(run.attempt(number).hang.read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _stop_words(run: RunDir) -> str:
    try:
        return " ".join(run.stop_file.read_text(errors="replace").split())[:200]
    except OSError:
        return ""


def _tail(log: Path, offset: int, most: int = 65_536) -> str:
    """What was written to a log since `offset`; at most its last `most` bytes."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset if offset <= size else 0, size - most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _rank_logs(run: RunDir, job: Job, job_id: str, number: int, missing: Sequence[int]) -> str:
    """The last words of ranks that left no marker: slurmstepd writes there why it killed them."""
    begun = _started_at(run, number)
    texts = []
    # By accelerate launch, all ranks of a node write to one log.
    writers = missing if job.launch == "srun" else sorted({rank // job.gpus_per_node for rank in missing})
    for writer in writers[:16]:
        log = run.log(job_id, writer)
        try:
            if log.stat().st_mtime >= begun - 1:
                texts.append(_tail(log, 0, most=2048))
        except OSError:
            continue
    return "\n".join(texts)


def _offset_of(run: RunDir, number: int) -> int:
    return int(float(_exported(run, number).get(_LOG_OFFSET, "0")))


def _exported(run: RunDir, number: int) -> dict[str, str]:
    """The variables of an attempt, as its file says them; numbers only."""
    found = {}
    try:
        for line in run.attempt(number).env.read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            if name in (_LOG_OFFSET, RankEnv.STARTED) and value.replace(".", "", 1).isdigit():
                found[name] = value
    except OSError:
        pass
    return found


def _started_at(run: RunDir, number: int) -> float:
    starts = [event for event in ledger.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number]
    return float(starts[-1]["time"]) if starts else 0.0


def _elapsed(run: RunDir, number: int, environ: Mapping[str, str]) -> float:
    """Seconds since the attempt began: by the clock that nobody sets where this is the same machine, else by the wall's."""
    try:
        passed = time.monotonic() - float(environ[RankEnv.STARTED])
        if passed >= 0:
            return passed
    except (KeyError, ValueError):
        pass
    begun = _started_at(run, number)
    return max(time.time() - begun, 0.0) if begun else 0.0


def _seconds_to_limit(run: RunDir, number: int, job: Job, info: JobInfo | None, environ: Mapping[str, str]) -> float | None:
    """Until the time limit: Slurm's own, which somebody may have changed, else the one that was asked for."""
    minutes: float = job.time_limit
    if info is not None:
        try:
            minutes = parse_minutes(info.time_limit)
        except ValueError:  # UNLIMITED
            return None
    return minutes * 60 - _elapsed(run, number, environ) if _started_at(run, number) else None


def _nodes_of(run: RunDir, number: int) -> list[str]:
    starts = [event for event in ledger.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number]
    return [str(node) for node in starts[-1].get("nodes", [])] if starts else []


def _lost(slurm: Slurm | None, nodes: list[str], job: Job, missing: Sequence[int]) -> list[str]:
    """Nodes of ranks without a marker that slurmctld no longer reaches."""
    wanted = sorted({nodes[rank // job.gpus_per_node] for rank in missing if rank // job.gpus_per_node < len(nodes)})
    if slurm is None or not wanted:
        return []
    try:
        states = slurm.node_states(wanted)
    except SubmitError:
        return []
    return [node for node in wanted if any(word in states.get(node, "") for word in ("DOWN", "NOT_RESPONDING", "FAIL", "*"))]


def _cancel_wished(run: RunDir) -> bool:
    """Whether `holdfast cancel` was called after the run was last submitted."""
    wished = False
    for event in ledger.read(run.ledger):
        if event["event"] == Event.CANCEL:
            wished = True
        elif event["event"] == Event.SUBMITTED:
            wished = False
    return wished


def _ask(slurm: Slurm | None, job_id: str, patience_s: float = 0.0) -> JobInfo | None:
    """What slurmctld knows; None when it knows nothing, or could not be asked: for evidence that is the same."""
    if slurm is None:
        return None
    try:
        return slurm.patiently(lambda: slurm.job(job_id), patience_s)
    except SubmitError:
        return None


def _restarts(environ: Mapping[str, str]) -> int:
    try:
        return int(environ.get("SLURM_RESTART_COUNT", "0") or 0)
    except ValueError:
        return 0


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


def run_folder() -> str:
    return os.environ.get(RankEnv.RUN_DIR, "the run directory")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.attempt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("begin")
    commands.add_parser("adopt")
    ending = commands.add_parser("end")
    ending.add_argument("--code", type=int, required=True)
    ending.add_argument("--signals", default="")
    args = parser.parse_args()
    access.keep_to_oneself()
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
    except OSError as err:
        # A full or broken disk: the attempt cannot even be written down. One line, and a code that asks for nothing.
        print(f"holdfast ({started}): {err.strerror or err}: {err.filename or run_folder()}", file=sys.stderr, flush=True)
        return Exit.FAILED
    if cause in (Cause.FINISHED, Cause.PRUNED):
        return Exit.DONE
    if verdict.again:
        return Exit.REQUEUE
    return args.code or Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
