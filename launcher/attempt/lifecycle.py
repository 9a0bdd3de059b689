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
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from jobs.config.resolver import load
from jobs.config.setting_names import PREFIX
from jobs.config.settings import Job
from jobs.config.types import parse_minutes
from jobs.core.contract import LEAD_SIGNAL, LOG_OFFSET, SETUP_SECONDS, STOP_SIGNALS, Cause, Event, Exit, RankEnv
from jobs.core.errors import HoldfastError, RunOwnedError, SubmitError
from jobs.rank.stop_flag import StopFlag
from jobs.run import event_log, permissions
from jobs.run.retry_policy import Verdict, budgets_of, judge
from jobs.run.rundir import RunDir
from launcher.attempt.claim import own
from launcher.attempt.classify_exit import classify
from launcher.attempt.evidence import (
    elapsed,
    evidence_of,
    log_sizes,
    seconds_to_limit,
    show_error,
    started_at,
)
from launcher.attempt.finalize import blame, is_ghost, write_end
from launcher.attempt.node_exclusion import checked
from launcher.attempt.rendezvous import address_of, free_port
from launcher.attempt.requeue import send_back
from slurm.allocation import job_id_of, local_time, restarts_of
from slurm.client import JobInfo, Slurm, expand_nodelist, unreachable

# Seconds to wait for a controller that is just being restarted, for a fact about a job.
_ASK_PATIENCE_S = 20.0


def begin(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None, stop: StopFlag | None = None) -> dict[str, str]:
    """Counts the attempt, closes the one before if nobody could, and returns the variables that the ranks need.

    They are also written to the attempt's folder as a file to source. Once `stop` is set the nodes are not judged any more: their
    checks are being killed.

    Raises RunOwnedError when another job is training this run or a node did not pass its checks, HoldfastError when the run
    is over."""
    permissions.check_run(run, "its attempt", trees=False)
    from slurm.script.render import pattern  # brings the template engine with it, which `end` has no time for

    if run.is_member and not run.job_yaml.exists():
        from launcher.sweeps.trial import take_up  # a sweep chooses the values of a trial when its first attempt begins

        take_up(run, job_id_of(environ))
    job = load(run.job_yaml)
    job_id, restarts = job_id_of(environ), restarts_of(environ)
    number = own(run, job, job_id, restarts, slurm)
    nodes = expand_nodelist(environ.get("SLURM_JOB_NODELIST", "")) or [socket.gethostname()]
    address = address_of(nodes[0], slurm, others=len(nodes) > 1) if slurm else "127.0.0.1"
    attempt = run.attempt(number)
    run.logs.mkdir(exist_ok=True)
    batch_log = run.log(job_id, "batch")
    link_batch_log(batch_log)
    if batch_log.exists() and not batch_log.is_symlink():
        # Slurm made it with the umask of whoever called sbatch.
        permissions.close_to_others(batch_log)
    values = {
        RankEnv.ATTEMPT.value: str(number),
        RankEnv.MASTER_ADDR.value: address,
        RankEnv.MASTER_PORT.value: str(free_port(run.path, job_id, restarts)),
        "HOLDFAST_JOB_ID": job_id,
        "HOLDFAST_RANK_LOG": pattern(run.logs) + f"/{job_id}.%t.out",
        LOG_OFFSET: str(_log_offset(environ, batch_log)),
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
    attempt.log_sizes.write_text(json.dumps(log_sizes(run, job_id)))
    event_log.append(
        run.ledger,
        Event.START,
        attempt=number,
        job_id=job_id,
        nodes=nodes,
        world=job.world_size,
        restarts=restarts,
        host=socket.gethostname(),
        setup_s=_setup_seconds(environ),
    )
    stop = stop or StopFlag()
    bad = {} if stop.code() else checked(run, job, number, nodes, {**environ, **values}, under_slurm=slurm is not None)
    if bad and not stop.code():
        _turn_away(run, job, number, job_id, restarts, bad, slurm, environ)
    return values


def _code_of_warning(job: Job, code: int, signals: list[str]) -> int:
    """The exit code as evidence: where the batch script heard the warning before it started ranks, that of ranks which the warning killed.

    Ranks that were there and stopped have said so, which goes before any code."""
    alone = code == Exit.REQUEUE and signals and "TERM" not in signals and job.entry is None
    return 128 + LEAD_SIGNAL if alone else code


def link_batch_log(batch_log: Path, stream: Path = Path("/proc/self/fd/2")) -> None:
    """Gives the log of a job that was submitted without --output (slurm-ID.out) its name among the logs of the run: what slurmstepd writes
    there about the end of the job is evidence."""
    with suppress(OSError):
        actual = Path(os.readlink(stream))
        if "SLURM_JOB_ID" in os.environ and actual.is_file() and not batch_log.exists():
            batch_log.unlink(missing_ok=True)
            batch_log.symlink_to(actual)


def _log_offset(environ: Mapping[str, str], batch_log: Path) -> int:
    """Where the batch script's words begin: as it saw it itself, since Slurm may have said something while it was being set up."""
    size = batch_log.stat().st_size if batch_log.exists() else 0
    said = environ.get(LOG_OFFSET, "")
    return min(int(said), size) if said.isdecimal() else size


def _setup_seconds(environ: Mapping[str, str]) -> int:
    """What the batch script did before the attempt began."""
    said = environ.get(SETUP_SECONDS, "")
    return int(said) if said.isdecimal() else 0


def end(run: RunDir, environ: Mapping[str, str], slurm: Slurm | None, code: int, signals: list[str]) -> tuple[Verdict, Cause]:
    """Writes down why the attempt ended and whether the run goes on; asks Slurm to put it back into the queue if so.

    Does neither when a later attempt has begun: then this one is a ghost, of a node that Slurm took for dead."""
    job = load(run.job_yaml)
    job_id, number = job_id_of(environ), int(environ[RankEnv.ATTEMPT])
    if is_ghost(run, number):
        print(f"holdfast: attempt {number} was closed by a later one; nothing is written and nothing requeued", flush=True)
        return Verdict(True, "a later attempt has taken over"), Cause.UNKNOWN
    info, unanswered = _ask(slurm, job_id, _ASK_PATIENCE_S)
    setup_s = next((int(event.get("setup_s", 0)) for event in event_log.read(run.ledger) if event["event"] == Event.START and event["attempt"] == number), 0)
    left_s = seconds_to_limit(run, number, job, info, environ) if slurm else None
    if info is not None and info.preempted_at and local_time(info.preempted_at) < started_at(run, number) - setup_s - 1:
        info = replace(info, preempted_at=None)  # of an earlier attempt
    seen = replace(
        evidence_of(run, job, number, job_id, slurm),
        code=_code_of_warning(job, code, signals),
        signals=signals,
        job=info,
        put_back=info is not None and info.restarts > restarts_of(environ),
        unanswered=unanswered,
        seconds_to_limit=None if left_s is None else left_s - setup_s,
        lead_s=job.stop_lead_s,
        own_script=job.entry is not None,
    )
    if slurm is None and job.entry is not None and signals:
        seen = replace(seen, stop_sent=signals[0])  # forwarded to every rank
    cause, evidence = classify(seen)
    if is_ghost(run, number):
        return Verdict(True, "a later attempt has taken over"), cause
    write_end(run, number, job_id, cause, evidence, code, elapsed(run, number, environ))
    blame(run, number, job_id, cause, evidence, seen)
    events = event_log.read(run.ledger)
    verdict = judge(events, budgets_of(job))
    print(f"holdfast: attempt {number} ended: {cause.value} ({evidence}). {'Again: ' if verdict.again else 'Over: '}{verdict.reason}.", flush=True)
    if not verdict.again:
        show_error(run, number, job.world_size)
        if run.is_member and run.array.sweep.exists():
            from launcher.sweeps.trial import tell_sweep

            tell_sweep(run)
        _notify(run, job, verdict, cause, evidence, environ)
    if verdict.again and slurm is not None:
        if not send_back(run, job, number, job_id, restarts_of(environ), slurm, cause):
            verdict = judge(event_log.read(run.ledger), budgets_of(job))
    return verdict, cause


def _turn_away(run: RunDir, job: Job, number: int, job_id: str, restarts: int, bad: Mapping[str, str], slurm: Slurm | None, environ: Mapping[str, str]) -> None:
    """Ends an attempt whose nodes did not pass their checks. Raises RunOwnedError (go on later) or HoldfastError (over)."""
    faults = "; ".join(f"{node}: {fault}" if node else fault for node, fault in bad.items())
    is_disk = "" in bad
    cause = Cause.STORAGE if is_disk else Cause.NODE_FAILURE
    for node, fault in bad.items():
        if node:
            event_log.append(run.ledger, Event.BAD_NODE, attempt=number, job_id=job_id, node=node, reason=fault)
    write_end(run, number, job_id, cause, f"before the start: {faults}", None, elapsed(run, number, environ))
    verdict = judge(event_log.read(run.ledger), budgets_of(job))
    if not verdict.again:
        _notify(run, job, verdict, cause, faults, environ)
        raise HoldfastError(f"run {run.id}: {faults}. Over: {verdict.reason}.")
    later = f"holdfast resume {run.id} tries again"
    if slurm is not None and send_back(run, job, number, job_id, restarts, slurm):
        later = "It goes back into the queue"
    elif not (verdict := judge(event_log.read(run.ledger), budgets_of(job))).again:
        raise HoldfastError(f"run {run.id} does not start here: {faults}. Not requeued: {verdict.reason}. {later}.")
    raise RunOwnedError(f"run {run.id} does not start here: {faults}. {later} ({verdict.reason}).")


def _notify(run: RunDir, job: Job, verdict: Verdict, cause: Cause, evidence: str, environ: Mapping[str, str]) -> None:
    """Of a run that is over only, so that nobody's requeue waits for it."""
    from launcher.attempt.notify import tell

    tell(run, job, verdict, cause, evidence, environ)


def _ask(slurm: Slurm | None, job_id: str, patience_s: float = 0.0) -> tuple[JobInfo | None, bool]:
    """What slurmctld knows of a job, and whether it did not answer or knows no such job. A node without scontrol cannot ask
    at all: there the other evidence must do."""
    if slurm is None:
        return None, False
    try:
        info = slurm.patiently(lambda: slurm.job(job_id), patience_s)
    except SubmitError as err:
        return None, unreachable(err)
    return info, info is None


def adopt(environ: Mapping[str, str], cwd: Path) -> Path:
    """The script of the run that belongs to this Slurm job, which is made at its first attempt.

    Later attempts look for it first: whatever became of job file and working tree meanwhile, the run is the same. The script is executed by
    the caller: raises SettingError if another user controls the run."""
    known = _made_before(environ, cwd / (environ.get(f"{PREFIX}RUNS_DIR") or environ.get("RUNS_DIR") or Job.model_fields["runs_dir"].default))
    if known is not None:
        return permissions.script_to_submit(known)
    from launcher.submission.create_run import prepare, resolve_here  # git and hashing: only a first attempt needs them

    allocation: dict[str, object] = {"run_id": f"j{_word_of(environ)}", "nodes": int(environ.get("SLURM_JOB_NUM_NODES", "1"))}
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    allocation["gpus_per_node"] = int(environ.get("SLURM_NTASKS_PER_NODE") or max(int(environ.get("SLURM_NTASKS", "1")) // nodes, 1))
    info, _ = _ask(Slurm(environ), job_id_of(environ))
    if info is not None:
        try:
            allocation["time_limit"] = parse_minutes(info.time_limit)
        except ValueError:  # UNLIMITED
            allocation["time_limit"] = 365 * 1440
    resolved = resolve_here([], environ, cwd, allocation=allocation)
    # Where the job file or the site says RUNS_DIR; its name may be another one by now.
    known = _made_before(environ, cwd / resolved.job.runs_dir)
    if known is not None:
        return permissions.script_to_submit(known)
    run, made = prepare(resolved, cwd, sys.executable)
    if made:
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id_of(environ), by="sbatch", cluster=environ.get("SLURM_CLUSTER_NAME", ""))
    return permissions.script_to_submit(run)


def _word_of(environ: Mapping[str, str]) -> str:
    return job_id_of(environ).replace("_", ".")


def _made_before(environ: Mapping[str, str], runs_dir: Path) -> RunDir | None:
    """The run that an earlier attempt of this very job made in a folder. Ids come again, in other clusters and after years: the newest.

    What another user put there under such a name is none, and is reported."""
    if not restarts_of(environ):
        return None
    found = []
    for run in (RunDir(path.absolute()) for path in runs_dir.glob(f"*-j{_word_of(environ)}") if (path / "job.yaml").exists()):
        if not permissions.is_owned(run.path):
            print(f"holdfast: {run.path} is a link or belongs to another user, and is not the run of this job", file=sys.stderr, flush=True)
            continue
        clusters = {event.get("cluster") for event in event_log.read(run.ledger) if event.get("event") == Event.SUBMITTED} - {None, ""}
        if not clusters or environ.get("SLURM_CLUSTER_NAME", "") in {"", *clusters}:
            found.append(run)
    return max(found, key=lambda run: run.job_yaml.stat().st_mtime, default=None)


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
    permissions.keep_to_oneself()
    started = datetime.now().isoformat(timespec="seconds")
    try:
        if args.command == "adopt":
            print(adopt(os.environ, Path.cwd()))
            return Exit.DONE
        run = RunDir(Path(os.environ[RankEnv.RUN_DIR]))
        slurm = Slurm() if "SLURM_JOB_ID" in os.environ else None
        if args.command == "begin":
            values = begin(run, os.environ, slurm, StopFlag.install(STOP_SIGNALS))
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
