"""Slurm's own commands, text in and typed values out. The parsers are pure; `Slurm` runs the programs.

A failed query is an error and never an empty answer: a controller that does not reply must not look like a job that is gone.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from jobs.core.errors import SubmitError
from slurm.environment import clean_environment
from slurm.job_number import job_number
from slurm.job_queue import Queue
from slurm.states import is_live

# Errors of clients that could not reach slurmctld, or lost it before it answered (it may have acted on the request): ask again later.
# The connection errors of src/common/slurm_errno.c; "Unexpected message received" is what a slurmctld that is killed while it answers leaves.
_UNREACHABLE = re.compile(
    r"Unable to contact slurm|Connection refused|Unable to establish|did not answer within|Zero Bytes were transmitted|Socket timed out"
    r"|Communication (?:connection|shutdown) failure|Message (?:send|receive) failure|Unexpected message received|in standby mode|no cluster is configured",
    re.I,
)
_RETRY_S = 2.0

# Seconds for one client call. slurmctld answers in milliseconds; a client that cannot reach it gives up after about 8 s by itself.
CALL_TIMEOUT_S = 30.0

Answer = TypeVar("Answer")


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
    # The state behind COMPLETING, where this version of Slurm says it: CANCELLED, PREEMPTED, PENDING, ...
    ended_as: str = ""


@dataclass(frozen=True)
class AccountingRow:
    """One row of sacct: one run of a job, or one of its steps. Times as sacct prints them, local and without zone."""

    job_id: str
    state: str
    exit_code: str
    start: str
    end: str


# A value may hold spaces; the next key begins at a word of letters followed by '='.
_PAIR = re.compile(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w/:]*=|$)")
# The line of a job: its name, the fields that slurmctld writes, and from Command= on text of the person who submitted it.
_JOB_LINE = re.compile(r"(JobId=.*?) JobName=(.*?)(?= UserId=\S*\(\d+\) GroupId=)(.*?)(?:\s(Command=.*))?$")
# What follows the command and its arguments, in this order; a word of theirs may look the same, so the last one counts.
_JOB_TEXT = ("WorkDir", "AdminComment", "SystemComment", "Comment", "StdErr", "StdIn", "StdOut")


def parse_scontrol(text: str) -> list[dict[str, str]]:
    """Records of `scontrol -o show ...`: one line each, words of the form Key=value. Free text never stands for a field."""
    records = []
    for line in text.splitlines():
        parts = _JOB_LINE.match(line)
        if parts:
            head, name, fields, free = parts.groups()
            records.append({**_pairs(head), "JobName": name.strip(), **_pairs(fields), **_free_text(free or "")})
        elif found := _pairs(line):
            records.append(found)
    return records


def _pairs(text: str) -> dict[str, str]:
    """Of two with the same key the first: the text of a reason or a comment stands behind the fields."""
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(text):
        found.setdefault(key, value.strip())
    return found


def _free_text(text: str) -> dict[str, str]:
    found = {}
    for key in _JOB_TEXT:
        at = list(re.finditer(rf"(?:^|\s){key}=", text))
        if at:
            following = _PAIR.match(text, at[-1].end() - len(key) - 1)
            found[key] = following[2].strip() if following else ""
    return found


def parse_json_state(text: str, number: str) -> str:
    """The state behind COMPLETING of the job with this JobId, from `scontrol --json show job`; "" where it does not say.

    It is one word or, in newer versions, a list. Asked for one task of an array, scontrol answers with all of them."""
    try:
        state = next(job["job_state"] for job in json.loads(text)["jobs"] if str(job["job_id"]) == number)
    except (ValueError, LookupError, TypeError, StopIteration):
        return ""
    words = [str(word) for word in (state if isinstance(state, list) else [state])]
    return next((word for word in words if word != "COMPLETING"), "")


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


def _lies_in(text: str, folder: Path) -> bool:
    """Whether the path that a text begins with lies in a folder, by whatever links. Where it ends need not be known: names may hold ` a=`."""
    real = os.path.realpath(folder)
    return any(os.path.realpath(text[: slash.start()]) == real for slash in re.finditer("/", text) if slash.start())


class Slurm:
    """The Slurm clients of this machine. Every call raises SubmitError with Slurm's error message when it fails."""

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
            message = " ".join(done.stderr.split()) or " ".join(done.stdout.split()) or f"exit code {done.returncode}"
            raise SubmitError(explain(command[0], message))
        return done.stdout

    def test_only(self, script: str) -> str:
        """Slurm's estimate of when and where a script would start (it queues nothing). sbatch says it, good or bad, on standard error."""
        try:
            done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, env=self.environ)
        except FileNotFoundError:
            raise SubmitError("sbatch is not on this machine; is this a login node of the cluster? `holdfast submit --local` needs no Slurm") from None
        except subprocess.TimeoutExpired:
            raise SubmitError(f"sbatch did not answer within {CALL_TIMEOUT_S:.0f} s; is slurmctld running? (scontrol ping)") from None
        message = " ".join(done.stderr.split())
        if done.returncode:
            raise SubmitError(explain("sbatch", message))
        return message

    def job(self, job_id: str) -> JobInfo | None:
        """A job that slurmctld still knows; None when it says that there is no such job."""
        try:
            records = parse_scontrol(self.run("scontrol", "-o", "show", "job", job_id))
        except SubmitError as err:
            if "Invalid job id" in str(err):
                return None
            raise
        info = job_info(records[0]) if records else None
        if info is not None and info.state == "COMPLETING":
            # The text has one word for it, whatever becomes of the job.
            with suppress(SubmitError):
                return replace(info, ended_as=parse_json_state(self.run("scontrol", "--json", "show", "job", job_id), records[0]["JobId"]))
        return info

    def queue(self, job_ids: Sequence[str] = ()) -> dict[str, tuple[str, str, str]]:
        """Jobs of this user that wait or run: id -> (state, reason, nodes). One call, however many runs there are.

        Without `job_ids` a `Queue`, which also has the jobs that are over and not yet purged."""
        if not job_ids:
            return Queue.of(parse_squeue(self.run("squeue", "-h", "-r", "--me", "-t", "all", "-o", "%i|%T|%r|%N")))
        try:
            return parse_squeue(self.run("squeue", "-h", "-r", "-o", "%i|%T|%r|%N", "-j", ",".join(job_ids)))
        except SubmitError as err:
            if "Invalid job id" in str(err):
                return {}
            raise

    def named(self, name: str, comment: str, folder: Path) -> list[tuple[str, str]]:
        """(id, state) of this user's jobs that carry this name or comment and write their log below `folder`, in any state that
        squeue shows. A site may change one of the two; two runs in different folders may have the same name. Raises SubmitError."""
        found, ours = [], {}
        for line in self.run("squeue", "-h", "-r", "--me", "-o", "%i|%T|%j|%k").splitlines():
            job_id, state, *words = [*line.strip().split("|"), ""]
            if name not in words and comment not in words:
                continue
            # Tasks of an array, a thousand perhaps, write below one folder.
            if (array := job_id.partition("_")[0]) not in ours:
                try:
                    log = re.search(r".*\sStdOut=(\S.*)", self.run("scontrol", "-o", "show", "job", job_id))
                    ours[array] = log is None or _lies_in(log[1], folder)
                except SubmitError as err:
                    if "Invalid job id" in str(err):
                        continue
                    ours[array] = True  # no scontrol here: the name must do
            if ours[array]:
                found.append((job_id, state))
        return found

    @staticmethod
    def unsure(err: SubmitError) -> bool:
        """Whether a command that changes something may have done so although it failed."""
        return unreachable(err)

    def accounting(self, job_id: str) -> list[AccountingRow]:
        """All runs of a job and their steps, requeued ones included; [] where the site keeps no accounting."""
        try:
            return parse_sacct(self.run("sacct", "-n", "-P", "-D", "-j", job_id, "-o", "JobID,State,ExitCode,Start,End"))
        except SubmitError:
            return []

    def patiently(self, ask: Callable[[], Answer], patience_s: float) -> Answer:
        """`ask()`, again and again for so many seconds while slurmctld cannot be reached. Raises SubmitError after that, or
        at once when it answered and refused."""
        limit = time.monotonic() + patience_s
        while True:
            try:
                return ask()
            except SubmitError as err:
                if not unreachable(err) or time.monotonic() + _RETRY_S > limit:
                    raise
            time.sleep(_RETRY_S)

    def is_live(self, job_id: str) -> bool:
        """Whether a job waits, runs or ends just now, by scontrol, or by squeue where a node has no scontrol.

        Raises SubmitError when neither can say: that is not the same as a job that is gone."""
        try:
            info = self.job(job_id)
            return info is not None and is_live(info.state)
        except SubmitError as err:
            if unreachable(err):
                raise
            return any(is_live(state) for state, _, _ in self.queue([job_id]).values())

    def requeue(self, job_id: str, restarts: int | None = None, patience_s: float = 600.0) -> str:
        """Puts a running job back into the queue, and says what happened; raises SubmitError when it did not.

        "Job is pending execution" is success: Slurm had requeued it already. So it has when the job was restarted more often
        than this attempt knows of: it may run again by now, and must not be thrown out by a ghost. A slurmctld that is being
        restarted is waited for, `patience_s` seconds at most."""

        def once() -> str:
            if restarts is not None:
                info = self.job(job_id)
                if info is not None and info.restarts > restarts:
                    return "Slurm had requeued it already"
            try:
                self.run("scontrol", "requeue", job_id)
            except SubmitError as err:
                if "pending" in str(err).lower():
                    return "Slurm had requeued it already"
                raise
            return "requeued by holdfast"

        return self.patiently(once, patience_s)

    def successor(self, script: Path, job_id: str, name: str, array_index: str | None = None, patience_s: float = 120.0) -> tuple[str, bool]:
        """The id of a job with the same script that starts when `job_id` is over, and whether it was submitted now: where
        the site lets nobody requeue. One that waits under this name already is taken. Raises SubmitError."""

        def once() -> tuple[str, bool]:
            for line in self.run("squeue", "-h", "-r", "--me", "-n", name, "-t", "PENDING", "-o", "%i|%A|%k").splitlines():
                shown, plain, comment = [*line.strip().split("|", 2), "", ""][:3]
                if comment.startswith("holdfast:") and comment != f"holdfast:{name}":
                    continue  # a run of another name that a user gave the same job name
                if job_id not in (shown, plain) and (array_index is None or shown.endswith(f"_{array_index}")):
                    return shown, False
            extra = [] if array_index is None else [f"--array={array_index}"]
            number = job_number(self.run("sbatch", "--parsable", f"--dependency=afterany:{job_id}", *extra, str(script)))
            return (number if array_index is None else f"{number}_{array_index}"), True

        return self.patiently(once, patience_s)

    def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node -> state as slurmctld has it, such as `DOWN+NOT_RESPONDING`."""
        if not nodes:
            return {}
        return {record.get("NodeName", ""): record.get("State", "") for record in parse_scontrol(self.run("scontrol", "-o", "show", "node", ",".join(nodes)))}

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        """Keeps a job that waits away from these nodes. Raises SubmitError."""
        self.run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")

    def partition_nodes(self, job_id: str) -> int:
        """Nodes in the partition of a job; 0 when that cannot be found out."""
        record = parse_scontrol(self.run("scontrol", "-o", "show", "job", job_id))[0]
        partition = parse_scontrol(self.run("scontrol", "-o", "show", "partition", record.get("Partition", "").partition(",")[0]))[0]
        return int(partition.get("TotalNodes", "0"))

    def config(self) -> dict[str, str]:
        """`scontrol show config` as key -> value."""
        return parse_config(self.run("scontrol", "show", "config"))

    def partitions(self) -> list[dict[str, str]]:
        return parse_scontrol(self.run("scontrol", "-o", "show", "partition"))

    def cancel(self, *job_ids: str) -> None:
        self.run("scancel", *job_ids)


def parse_config(text: str) -> dict[str, str]:
    """Key -> value of `scontrol show config`; "(null)" is an empty value."""
    found = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() and " " not in key.strip():
            found[key.strip()] = "" if value.strip() == "(null)" else value.strip()
    return found


def unreachable(err: SubmitError) -> bool:
    """Whether a client failed because slurmctld did not answer, so that nothing is known."""
    return bool(_UNREACHABLE.search(str(err)))


def explain(program: str, message: str) -> str:
    """Slurm's error message, with what to do where the message alone does not tell."""
    if "Could not establish a configuration source" in message:
        return f"{program}: Slurm's commands are here, but no cluster is configured: there is no slurm.conf, neither where SLURM_CONF says nor in /etc/slurm."
    if "Unable to contact slurm controller" in message or "Connection refused" in message or "Unable to establish" in message:
        return f"{program}: {message}. slurmctld cannot be reached; `scontrol ping` shows whether it runs."
    return f"{program}: {message}"
