"""How far a run has come, written by rank 0 where the end of the attempt, `holdfast status` and the watchdog find it."""

import os

from jobs.run.rundir import AttemptDir


class Progress:
    """The last finished step, where the end of the attempt finds it whatever became of this process."""

    def __init__(self, attempt: AttemptDir, enabled: bool):
        self._fd = os.open(attempt.progress, os.O_WRONLY | os.O_CREAT, 0o644) if enabled else None
        self._section_fd = os.open(attempt.section, os.O_WRONLY | os.O_CREAT, 0o644) if enabled else None
        self._section = ""

    def set(self, step: int) -> None:
        if self._fd is not None:
            os.pwrite(self._fd, f"{step:<12d}".encode(), 0)

    def enter(self, section: str) -> str:
        """Says what comes now, for the watchdog: first_step, step, evaluation or save. Returns what was before."""
        before, self._section = self._section, section
        if self._section_fd is not None and section != before:
            os.pwrite(self._section_fd, f"{section} {os.environ.get('SLURM_STEP_ID', '-')}".ljust(32).encode(), 0)
        return before
