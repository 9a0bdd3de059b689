"""The run directory: the one home of every path in it.

runs/<name>-<id>/
  job.yaml  origins.json          resolved settings, and where each came from
  submit.sbatch                   the script; sbatch of it by hand works too
  code/  snapshot.json  code.diff frozen code, its git commit and what was not committed
  code.json                       sha256 of every frozen file
  ledger.jsonl  metrics.jsonl
  tensorboard/  wandb/            what trackers wrote, where they are used
  report.html                     made by holdfast report
  attempts/3/                     what one attempt leaves behind: environment, progress, markers, errors
  checkpoints/step-00001200/
  compiled/                       what torch.compile and Triton made, for the next attempt
  logs/<jobid>.<rank>.out         and <jobid>.batch.out
  stop                            a file that a person makes to stop the run at the next step
  tasks/5/                        of an array: the run of task 5
  sweep.json  study.journal       of a sweep, which is an array: what it searches, and Optuna's record; trial.json in each task
"""

from dataclasses import dataclass
from pathlib import Path

from jobs.core import safe_read
from jobs.core.errors import DamagedFileError

# Where a person's own script keeps its files when holdfast did not start it (holdfast.py).
ALONE = "holdfast-run"
# Job arrays keep their members under this folder of the array's own directory.
_MEMBERS = "tasks"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. `path` is absolute; nothing needs to exist."""

    path: Path

    @property
    def id(self) -> str:
        return f"{self.path.parent.parent.name}.{self.path.name}" if self.is_member else self.path.name

    @property
    def is_member(self) -> bool:
        """Whether this is one task of an array."""
        return self.path.parent.name == _MEMBERS

    @property
    def job_yaml(self) -> Path:
        return self.path / "job.yaml"

    @property
    def origins(self) -> Path:
        return self.path / "origins.json"

    @property
    def script(self) -> Path:
        return (self.path.parent.parent if self.is_member else self.path) / "submit.sbatch"

    @property
    def code(self) -> Path:
        return (self.path.parent.parent if self.is_member else self.path) / "code"

    @property
    def snapshot(self) -> Path:
        return self.path / "snapshot.json"

    @property
    def diff(self) -> Path:
        return self.path / "code.diff"

    @property
    def code_sums(self) -> Path:
        """sha256 of every frozen file, so that a rerun can tell that it runs the same bytes."""
        return (self.path.parent.parent if self.is_member else self.path) / "code.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """wandb makes this folder itself."""
        return self.path / "wandb"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def submitit(self) -> Path:
        """Where submitit keeps its own files about the job."""
        return (self.path.parent.parent if self.is_member else self.path) / "submitit"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def report(self) -> Path:
        """The page that `holdfast report` writes."""
        return self.path / "report.html"

    @property
    def pace(self) -> Path:
        """How long steps, validations and saves of this run take, as seen from outside."""
        return self.path / "pace.json"

    @property
    def members(self) -> Path:
        return self.path / _MEMBERS

    @property
    def array(self) -> "RunDir":
        """The array that this run is a task of."""
        return RunDir(self.path.parent.parent)

    @property
    def sweep(self) -> Path:
        """What the array searches, when it is a sweep: a `jobs.sweep.search_space.Sweep`."""
        return self.path / "sweep.json"

    @property
    def study(self) -> Path:
        """Optuna's journal of a sweep."""
        return self.path / "study.journal"

    @property
    def sweep_plot(self) -> Path:
        return self.path / "sweep.png"

    @property
    def trial(self) -> Path:
        """Of one trial of a sweep: its number, and the values that it was given."""
        return self.path / "trial.json"

    def member(self, index: int) -> "RunDir":
        """The run of one task of this array."""
        return RunDir(self.members / str(index))

    def compiled(self, key: str) -> Path:
        """What torch.compile made for one kind of GPU and version of torch; the tasks of an array share it."""
        return self._compiled / f"{key}.bin"

    def compiled_kernels(self, key: str) -> Path:
        """What Triton made for the same, where it is not torch's."""
        return self._compiled / f"{key}-triton.zip"

    @property
    def _compiled(self) -> Path:
        return (self.path.parent.parent if self.is_member else self.path) / "compiled"

    def log(self, job_id: str, rank: int | str) -> Path:
        return self.logs / f"{job_id}.{rank}.out"

    def attempt(self, number: int) -> "AttemptDir":
        return AttemptDir(self.path / "attempts" / str(number))

    @property
    def has_members(self) -> bool:
        return self.members.is_dir()


@dataclass(frozen=True)
class AttemptDir:
    """Paths of what one attempt leaves behind."""

    path: Path

    @property
    def env(self) -> Path:
        """Shell lines that the batch script sources: attempt number and rendezvous."""
        return self.path / "env.sh"

    @property
    def log_sizes(self) -> Path:
        """Sizes of the job's logs when the attempt began: there its own words begin."""
        return self.path / "log_sizes.json"

    @property
    def progress(self) -> Path:
        """The last optimizer step that rank 0 finished, as text."""
        return self.path / "progress"

    def samples(self, rank: int) -> Path:
        """Which samples a rank used at which step, where LOG_SAMPLES asks for it."""
        return self.path / f"samples.{rank}.jsonl"

    @property
    def clock(self) -> Path:
        """What rank 0's time was spent on (`train.metrics.goodput_timer`), rewritten in place."""
        return self.path / "clock.json"

    @property
    def trace(self) -> Path:
        """What the profiler saw on rank 0, where PROFILE_STEPS asks for it."""
        return self.path / "trace.json.gz"

    @property
    def owner(self) -> Path:
        """Which job this attempt belongs to."""
        return self.path / "owner.json"

    @property
    def section(self) -> Path:
        """What rank 0 is doing: a word of `train.progress`, and the step of Slurm that it runs in."""
        return self.path / "section"

    @property
    def watch(self) -> Path:
        """What the watchdog needs to know about the attempt."""
        return self.path / "watch.json"

    @property
    def hang(self) -> Path:
        """What the watchdog saw before it ended the step."""
        return self.path / "hang.json"

    def stacks(self, rank: int) -> Path:
        """Python stacks of a rank, written when the watchdog asks for them."""
        return self.path / f"stacks.{rank}.txt"

    def collectives(self, rank: int) -> Path:
        """The last collectives of a rank, from torch's flight recorder, written at the same moment."""
        return self.path / f"collectives.{rank}.json"

    def preflight(self, node: str) -> Path:
        """What the checks of a node before the attempt found."""
        return self.path / f"preflight.{node}.json"

    @property
    def allreduce(self) -> Path:
        """What the all-reduce before the attempt measured."""
        return self.path / "allreduce.json"

    def joined(self, node: str) -> Path:
        """Made by a node that took part in it."""
        return self.path / f"joined.{node}"

    def marker(self, rank: int) -> Path:
        """How a rank left: reason, step, signal."""
        return self.path / f"exit.{rank}.json"

    def error(self, rank: int) -> Path:
        """Traceback of a rank that failed."""
        return self.path / f"error.{rank}.txt"

    def helper(self, rank: int) -> Path:
        """Made by a rank of a user script that imported holdfast: `{}`, or {"signal": NAME} once the script was told to stop."""
        return self.path / f"helper.{rank}.json"

    @property
    def warned(self) -> Path:
        """Made by the batch script of a user script when Slurm warned it of the time limit."""
        return self.path / "warned"

    @property
    def step_guard(self) -> Path:
        """What `launcher.attempt.step_guard` did to a user script: signal sent, time limit near, first failure."""
        return self.path / "step_guard.json"


def origins(run: RunDir) -> dict[str, str]:
    """Where each setting of a run came from; nothing where that was not written down. Raises DamagedFileError."""
    try:
        found = safe_read.read_object(run.origins)
    except FileNotFoundError:
        return {}
    for name, origin in found.items():
        if not isinstance(origin, str):
            raise DamagedFileError(f"{run.origins}: {name[:80]} is {safe_read.describe(origin)}; allowed: text")
    return found
