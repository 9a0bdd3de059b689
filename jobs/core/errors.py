"""The errors that a person may see, and the exit code each one ends a command with.

    HoldfastError            1   anything a person can be told in one message
      SettingError           2   wrong usage or settings
      NotFoundError          2   a run, job file or site file that does not exist
      RenderError            2   a value that no batch script can carry
      ImpossibleJobError    78   the job can never run as configured
      SubmitError            1   Slurm refused, or could not be reached
      CheckpointError        1   state on disk that cannot be used
      DamagedFileError       1   a file of a run directory that is not what holdfast writes there
      LabError               1   the private cluster would not start or stop
      DataWorkerError      1   a process that read samples is gone
      RunOwnedError         75   another job owns this run; try again later

`assert` is kept for our own mistakes; these are for everybody else's.
"""

from jobs.core.contract import Exit


class HoldfastError(Exception):
    """Base of every error that is shown as a message and not as a traceback."""

    exit_code: int = Exit.FAILED


class SettingError(HoldfastError):
    exit_code = Exit.USAGE


class NotFoundError(HoldfastError):
    exit_code = Exit.USAGE


class RenderError(HoldfastError):
    exit_code = Exit.USAGE


class ImpossibleJobError(HoldfastError):
    exit_code = Exit.IMPOSSIBLE


class SubmitError(HoldfastError):
    pass


class SubmissionUnknownError(SubmitError):
    """Slurm may have made a job although its submission failed: nothing that the job needs may be deleted."""


class CheckpointError(HoldfastError):
    pass


class DamagedFileError(HoldfastError, ValueError):
    """Names the file and what is wrong with it. Also a ValueError, as the errors of int() and json are, for readers that treat a file that
    cannot be read as missing."""


class LabError(HoldfastError):
    pass


class DataWorkerError(HoldfastError):
    pass


class RunOwnedError(HoldfastError):
    exit_code = Exit.REQUEUE
