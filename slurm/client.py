"""Slurm's own commands, text in and typed values out. The parsers are pure; `Slurm` runs the programs.

A failed query is an error and never an empty answer: a controller that does not reply must not look like a job that is gone.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import SubmitError

# Seconds for one client call. slurmctld answers in milliseconds; a client that cannot reach it gives up after about 8 s by itself.
CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class JobInfo:
    """What slurmctld says about one job."""

    job_id: str
    state: str
    reason: str
    restarts: int
    nodes: str
    name: str
    comment: str
    exit_code: str
    preempted_at: str | None
    end_time: str
    time_limit: str


@dataclass(frozen=True)
class AccountingRow:
    """One row of sacct: one run of a job, or one of its steps."""

    job_id: str
    state: str
    exit_code: str
    start: str
    end: str


def parse_scontrol(text: str) -> list[dict[str, str]]:
    """Records of `scontrol -o show ...`: one line each, words of the form Key=value."""
    records = []
    for line in text.splitlines():
        # A value may hold spaces; the next key begins at a word of letters followed by '='.
        pairs = re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w/:]*=|$)", line)
        if pairs:
            records.append({key: value.strip() for key, value in pairs})
    return records


def job_info(record: Mapping[str, str]) -> JobInfo:
    """A `JobInfo` from one record of `scontrol -o show job`."""
    task = record.get("ArrayTaskId", "")
    array = f"{record['ArrayJobId']}_{task}" if "ArrayJobId" in record and task.isdigit() else ""
    preempted = record.get("PreemptTime", "None")
    return JobInfo(
        job_id=array or record["JobId"],
        state=record.get("JobState", ""),
        reason=record.get("Reason", ""),
        restarts=int(record.get("Restarts", "0") or 0),
        nodes=record.get("NodeList", "").replace("(null)", ""),
        name=record.get("JobName", ""),
        comment=record.get("Comment", "").replace("(null)", ""),
        exit_code=record.get("ExitCode", ""),
        preempted_at=None if preempted in ("None", "Unknown", "") else preempted,
        end_time=record.get("EndTime", ""),
        time_limit=record.get("TimeLimit", ""),
    )


def parse_squeue(text: str) -> dict[str, tuple[str, str, str]]:
    """Job id -> (state, reason, nodes) from `squeue -h -r -o '%i|%T|%r|%N'`."""
    answer = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 3)
        if len(fields) == 4:
            answer[fields[0]] = (fields[1], fields[2], fields[3])
    return answer


def parse_sacct(text: str) -> list[AccountingRow]:
    """Rows of `sacct -n -P -o JobID,State,ExitCode,Start,End`."""
    rows = []
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 5:
            rows.append(AccountingRow(*fields))
    return rows


def expand_nodelist(text: str) -> list[str]:
    """node[1-3,07],gpu5 -> node1 node2 node3 node07 gpu5, without asking slurmctld."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        bracket = re.match(r"([^\[]*)\[([^\]]*)\](.*)$", part)
        if not bracket:
            names.append(part)
            continue
        head, ranges, tail = bracket.groups()
        for item in ranges.split(","):
            low, _, high = item.partition("-")
            for number in range(int(low), int(high or low) + 1):
                names += expand_nodelist(f"{head}{number:0{len(low)}d}{tail}")
    return names


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what an outer job left in it: a nested sbatch would inherit its node and GPU counts."""
    outer = re.compile(r"^(SLURM_(?!CONF$)|SBATCH_|SRUN_|PMI|PMIX|MASTER_ADDR$|MASTER_PORT$|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$|HOLDFAST_ATTEMPT$|HOLDFAST_RUN_DIR$)")
    return {name: value for name, value in environ.items() if not outer.match(name)}


class Slurm:
    """The Slurm clients of this machine. Every call raises SubmitError with Slurm's own words when it fails."""

    def __init__(self, environ: Mapping[str, str] | None = None):
        self.environ = clean_environment(os.environ if environ is None else environ)

    @staticmethod
    def available() -> bool:
        return shutil.which("sbatch") is not None and shutil.which("srun") is not None

    def run(self, *command: str, stdin: str | None = None, cwd: Path | None = None) -> str:
        """Standard output of one client call. Raises SubmitError."""
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, env=self.environ, cwd=cwd, errors="replace")
        except FileNotFoundError:
            raise SubmitError(f"{command[0]} is not on this machine; is this a login node of the cluster?") from None
        except subprocess.TimeoutExpired:
            raise SubmitError(f"{command[0]} did not answer within {CALL_TIMEOUT_S:.0f} s; is slurmctld running? (scontrol ping)") from None
        if done.returncode:
            said = " ".join(done.stderr.split()) or " ".join(done.stdout.split()) or f"exit code {done.returncode}"
            raise SubmitError(explain(command[0], said))
        return done.stdout

    def test_only(self, script: str) -> str:
        """Slurm's estimate of when and where a script would start (it queues nothing)."""
        # sbatch says it on standard error, whether it is good or bad news.
        try:
            done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, env=self.environ)
        except FileNotFoundError:
            raise SubmitError("sbatch is not on this machine; is this a login node of the cluster? `holdfast submit --local` needs no Slurm") from None
        except subprocess.TimeoutExpired:
            raise SubmitError(f"sbatch did not answer within {CALL_TIMEOUT_S:.0f} s; is slurmctld running? (scontrol ping)") from None
        said = " ".join(done.stderr.split())
        if done.returncode:
            raise SubmitError(explain("sbatch", said))
        return said

    def job(self, job_id: str) -> JobInfo | None:
        """A job that slurmctld still knows; None when it says that there is no such job."""
        try:
            records = parse_scontrol(self.run("scontrol", "-o", "show", "job", job_id))
        except SubmitError as err:
            if "Invalid job id" in str(err):
                return None
            raise
        return job_info(records[0]) if records else None

    def queue(self, job_ids: Sequence[str] = ()) -> dict[str, tuple[str, str, str]]:
        """Jobs of this user that wait or run: id -> (state, reason, nodes). One call, however many runs there are."""
        if not job_ids:
            return parse_squeue(self.run("squeue", "-h", "-r", "--me", "-o", "%i|%T|%r|%N"))
        try:
            return parse_squeue(self.run("squeue", "-h", "-r", "-o", "%i|%T|%r|%N", "-j", ",".join(job_ids)))
        except SubmitError as err:
            if "Invalid job id" in str(err):
                return {}
            raise

    def accounting(self, job_id: str) -> list[AccountingRow]:
        """All runs of a job and their steps, requeued ones included; [] where the site keeps no accounting."""
        try:
            return parse_sacct(self.run("sacct", "-n", "-P", "-D", "-j", job_id, "-o", "JobID,State,ExitCode,Start,End"))
        except SubmitError:
            return []

    def requeue(self, job_id: str) -> str:
        """Puts a running job back into the queue. Returns what happened; raises SubmitError when it did not.

        "Job is pending execution" is success: Slurm had requeued it already."""
        try:
            self.run("scontrol", "requeue", job_id)
        except SubmitError as err:
            if "pending" in str(err).lower():
                return "Slurm had requeued it already"
            raise
        return "requeued by holdfast"

    def cancel(self, job_id: str) -> None:
        self.run("scancel", job_id)


def explain(program: str, said: str) -> str:
    """Slurm's own words, and what to do where they are known to be puzzling."""
    if "Unable to contact slurm controller" in said or "Connection refused" in said or "Unable to establish" in said:
        return f"{program}: {said}. slurmctld cannot be reached; `scontrol ping` shows whether it runs."
    return f"{program}: {said}"
