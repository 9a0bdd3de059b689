"""A trace of some steps by torch's profiler (setting profile_steps), for chrome://tracing or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from jobs.config.settings import Job
from jobs.config.types import step_range
from jobs.core.atomic_write import replacing_by_path


class StepProfiler:
    """Profiles the steps of PROFILE_STEPS on rank 0; steps count from 1, as in the log. Errors are logged and never end a run."""

    def __init__(self, job: Job, path: Path, say: Callable[[str], None], *, enabled: bool):
        self._range = step_range(job.profile_steps) if job.profile_steps and enabled else None
        self._path, self._say = path, say
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before step `step`: starts the profiler at the first step of the range."""
        if self._range is None or self._profile is not None or not self._range[0] <= step <= self._range[1]:
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=kinds)
        self._profile.start()

    def after(self, step: int) -> None:
        """Call after step `step`: writes the trace after the last step of the range."""
        if self._profile is None or self._range is None:
            return
        if step < self._range[1]:
            self._profile.step()
        else:
            self.close()

    def close(self) -> None:
        """Write the trace recorded so far, atomically: a stop may come before the last step of the range."""
        if self._profile is None:
            return
        recorded, self._profile, self._range = self._profile, None, None
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            recorded.stop()
            with replacing_by_path(self._path) as path:
                recorded.export_chrome_trace(str(path))  # packed, since the name ends in .gz
            self._say(f"  profile written to {self._path}; open it in chrome://tracing or ui.perfetto.dev")
        except (OSError, RuntimeError) as err:
            self._say(f"  WARNING: the profile could not be written: {err}")
