"""Messages that slurmstepd writes into the log of a batch job."""

import re

# At the start of a grace time and for scancel it has no reason, or "DUE to SIGNAL Terminated" (26.05); a reason may have a hint
# behind a comma ("DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS").
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE (?:TO|to) ([A-Za-z ]+?)(?:,[^*\n]*)?)? \*\*\*")


def cancel_reasons(log: str) -> list[str]:
    """The reason of each message that Slurm is ending the job or a step, in order: "PREEMPTION", "JOB REQUEUE", ...; "" without a reason."""
    return _CANCELLED.findall(log)
