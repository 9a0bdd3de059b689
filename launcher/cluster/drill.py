"""`holdfast drill`: a tiny job is interrupted for real on this cluster, and must come back with nothing lost.

It is preempted by a job of a higher partition where that hurts nobody else, else requeued by `scontrol requeue`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.core import safe_read
from jobs.core.contract import Cause, Event, Exit
from jobs.core.errors import SubmitError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.attempt.preflight import read_reports
from launcher.cluster.doctor import node_facts, policy_of, read_site
from launcher.status import run_status
from launcher.submission.create_run import prepare, resolve_here
from slurm.client import Slurm

# Small enough for a login node's patience, and steps enough to be interrupted among them.
_TINY = {
    "JOB_NAME": "drill", "MODEL": "nano", "MODEL_OPTIONS": "n_layers=1,d_model=64,n_heads=2,d_ff=128", "DATA": "stdlib", "SEQ_LEN": "64",
    "BATCH_SIZE": "16", "EVAL_EVERY": "0", "EVAL_SAMPLES": "16", "LOG_EVERY": "50", "TIME_LIMIT": "10",
}  # fmt: skip
# Without a GPU a step takes some 10 ms, with one a few: the job must still run when the interruption comes.
_STEPS = {"cpu": 400, "gpu": 5000}
_QUEUE_S, _PREEMPT_S, _BACK_S, _FINISH_S = 600.0, 60.0, 600.0, 300.0
_POLL_S = 0.2


def drill(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> int:
    """The command. Returns 0 when the run came back, finished, and lost no step; else 1."""
    from launcher.submission.submitit_executor import to_slurm

    if not Slurm.available():
        raise SubmitError("sbatch and srun are not on this machine; is this a login node of the cluster? A private one for trying: holdfast lab start")
    given = {word.partition("=")[0].lstrip("-").upper().replace("-", "_") for word in words if "=" in word}
    site_job = resolve_here(words, environ, cwd).job
    steps = _STEPS["cpu" if site_job.device == "cpu" or site_job.gpu_request == "none" else "gpu"]
    tiny = {**_TINY, "MAX_STEPS": str(steps), "CHECKPOINT_EVERY": str(steps), "PRECISION": "fp32" if steps == _STEPS["cpu"] else "bf16"}
    # What describes the job is ours; where and how large it runs is the person's.
    resolved = resolve_here([*words, *(f"{name}={value}" for name, value in tiny.items() if name not in given)], environ, cwd)
    job, slurm = resolved.job, Slurm(environ)
    run, made = prepare(resolved, cwd, sys.executable)
    if not made:
        raise SubmitError(f"run {run.id} exists already; leave RUN_ID out")
    job_id = to_slurm(run, job, environ)
    tell = _Teller()
    tell(f"submitted job {job_id} ({job.nodes} node{'s' if job.nodes > 1 else ''}, {job.world_size} rank{'s' if job.world_size > 1 else ''})")
    try:
        return _interrupt(run, job, slurm, tell)
    except BaseException:
        _cancel(slurm, job_id)
        raise


def _interrupt(run: RunDir, job: Job, slurm: Slurm, tell: "_Teller") -> int:
    first = _wait(lambda: _attempt(run, 1), _QUEUE_S)
    if first is None:
        return _failed(tell, run, slurm, f"it did not start within {_QUEUE_S:.0f} s: {_why_waiting(slurm, run)}")
    job_id, nodes = first.job_id, list(first.nodes)
    step = _wait(lambda: (_step(run, 1) or 0) >= 5 and _step(run, 1), _QUEUE_S, lambda: _cause(run, 1) is not None)
    if not step:
        return _failed(tell, run, slurm, f"it ended before it could be interrupted: {_evidence(run, 1)}")
    for node, report in list(read_reports(run, 1, nodes).items())[:1]:
        tell(f"{node}: {node_facts({'facts': report.facts})}")
    tell(f"running at step {step}")
    began = time.time()
    how = _preempt(slurm, job, job_id, nodes, run)
    if how is None:
        slurm.run("scontrol", "requeue", job_id)
        how = "requeued it (scontrol requeue)"
    tell(how)
    end = _wait(lambda: _ended(run, 1), _BACK_S)
    if end is None:
        return _failed(tell, run, slurm, f"attempt 1 did not end within {_BACK_S:.0f} s")
    saves = [event for event in event_log.read(run.ledger) if event["event"] == Event.CHECKPOINT and event["attempt"] == 1]
    tell(f"saved step {saves[-1]['step']} in {float(saves[-1].get('seconds', 0)):.1f} s" if saves else "no rank could save")
    tell(f"ended as {end['cause']}")
    resumed = _wait(lambda: next((e for e in event_log.read(run.ledger) if e["event"] == Event.RESUMED and e["attempt"] == 2), None), _BACK_S)
    if resumed is None:
        return _failed(tell, run, slurm, f"it did not come back within {_BACK_S:.0f} s: {_why_waiting(slurm, run)}")
    again = _attempt(run, 2)
    tell(f"resumed at step {resumed['step']} on {', '.join(again.nodes) if again else '?'}")
    _wait(lambda: (_step(run, 2) or 0) > int(resumed["step"]), _FINISH_S)
    seconds = time.time() - began
    last = _wait(lambda: (done := event_log.attempts(event_log.read(run.ledger))[-1]).cause is not None and done, _FINISH_S)
    if not last or last.cause is not Cause.FINISHED:
        return _failed(tell, run, slurm, f"it did not finish: {_evidence(run, 2)}")
    lost = sum(attempt.lost_steps for attempt in event_log.attempts(event_log.read(run.ledger)))
    tell("finished", last=True)
    if lost or int(resumed["step"]) != int(end["step"]):
        print(
            f"not ok: {max(lost, int(end['step']) - int(resumed['step']))} steps lost ({end['cause']}: {end['evidence']}). holdfast doctor says how much warning this cluster gives. {run_status.near(run.path)}/"
        )
        return Exit.FAILED
    print(
        f"ok: 0 steps lost, {seconds:.1f} s from the interruption to the next step  ({run_status.near(run.path)}/)\nholdfast verify resume proves that the weights are those of an undisturbed run."
    )
    return Exit.DONE


def _preempt(slurm: Slurm, job: Job, job_id: str, nodes: list[str], run: RunDir) -> str | None:
    """Preempts the job by one of a higher partition, and says so; None where that cannot be done, or would hurt others."""
    try:
        site = read_site(slurm, job)
        if policy_of(site).mode not in ("REQUEUE", "CANCEL") or "partition" not in site.config.get("PreemptType", ""):
            return None
        own = int(site.partition.get("PriorityTier", "1"))
        higher = [p["PartitionName"] for p in slurm.partitions() if int(p.get("PriorityTier", "1")) > own and p.get("State") == "UP"]
        there = {line.strip() for line in slurm.run("squeue", "-h", "-w", ",".join(nodes), "-t", "RUNNING,COMPLETING", "-o", "%A").splitlines()}
        # Whoever else runs on these nodes would be thrown out as well.
        if not higher or there - {job_id.partition("_")[0]}:
            return None
        taker = slurm.run(
            "sbatch", "--parsable", f"--partition={higher[0]}", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--time=1", "--job-name=holdfast-drill",
            "--output=/dev/null", "--wrap=sleep 1",
        ).strip()  # fmt: skip
    except (SubmitError, ValueError):
        return None
    try:
        if _wait(lambda: _ended(run, 1) or any(event["event"] == Event.STOP for event in event_log.read(run.ledger)), _PREEMPT_S):
            return f"preempted it (job {taker} in partition {higher[0]})"
    finally:
        if _ended(run, 1) is None and not any(event["event"] == Event.STOP for event in event_log.read(run.ledger)):
            _cancel(slurm, taker)
    return None


class _Teller:
    """One line on a terminal that grows, one line per event in a pipe."""

    def __init__(self) -> None:
        self._alive = sys.stdout.isatty()

    def __call__(self, text: str, last: bool = False) -> None:
        if self._alive:
            print(text + ("\n" if last else " ... "), end="", flush=True)
        else:
            print(text, flush=True)


def _failed(tell: _Teller, run: RunDir, slurm: Slurm, why: str) -> int:
    tell("stopped", last=True)
    attempts = event_log.attempts(event_log.read(run.ledger))
    submitted = [event["job_id"] for event in event_log.read(run.ledger) if event["event"] == Event.SUBMITTED]
    for job_id in {attempt.job_id for attempt in attempts} | set(submitted):
        _cancel(slurm, job_id)
    print(f"not ok: {why}\nlogs: holdfast logs {run.id}    and with --rank batch those of the script")
    return Exit.FAILED


def _cancel(slurm: Slurm, job_id: str) -> None:
    try:
        slurm.cancel(job_id)
    except SubmitError:
        return


def _wait(condition: Callable[[], Any], seconds: float, give_up: Callable[[], bool] = lambda: False) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        answer = condition()
        if answer:
            return answer
        if give_up():
            return None
        time.sleep(_POLL_S)
    return None


def _attempt(run: RunDir, number: int) -> event_log.Attempt | None:
    return next((attempt for attempt in event_log.attempts(event_log.read(run.ledger)) if attempt.number == number), None)


def _ended(run: RunDir, number: int) -> dict[str, Any] | None:
    return next((event for event in event_log.read(run.ledger) if event["event"] == Event.END and event["attempt"] == number), None)


def _cause(run: RunDir, number: int) -> str | None:
    end = _ended(run, number)
    return None if end is None else str(end["cause"])


def _evidence(run: RunDir, number: int) -> str:
    end = _ended(run, number)
    return "no end was recorded" if end is None else f"{end['cause']}: {end['evidence']}"


def _step(run: RunDir, number: int) -> int | None:
    try:
        return safe_read.read_int(run.attempt(number).progress)
    except (OSError, ValueError):
        return None


def _why_waiting(slurm: Slurm, run: RunDir) -> str:
    try:
        said = slurm.run("squeue", "-h", "-n", run.id, "-o", "%T %r").strip()
    except SubmitError as err:
        return str(err)
    return f"Slurm says {said}" if said else "it is not in the queue"
