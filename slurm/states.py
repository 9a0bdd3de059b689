"""Slurm's states of jobs and nodes, and what each one says about an attempt: the one table of it."""

from jobs.core.contract import Cause

# Every state of squeue(1) and sacct(1) that ends a job, with the cause that it stands for. FAILED says only that the
# script returned non-zero: the exit code and the ranks' own markers say more.
ENDED: dict[str, Cause] = {
    "COMPLETED": Cause.FINISHED,
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "DEADLINE": Cause.TIME_LIMIT,
    "NODE_FAIL": Cause.NODE_FAILURE,
    "BOOT_FAIL": Cause.NODE_FAILURE,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "CANCELLED": Cause.CANCELLED,
    "REVOKED": Cause.CANCELLED,
    "FAILED": Cause.UNKNOWN,
}

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING"})
RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})

# Words of a node's state that say it is lost, or is given up.
LOST_NODE = frozenset({"DOWN", "NOT_RESPONDING", "FAIL", "FAILING"})


def base(state: str) -> str:
    """PREEMPTED for `PREEMPTED+`, CANCELLED for `CANCELLED by 1000`."""
    return state.split()[0].rstrip("+").upper() if state.strip() else ""


def is_live(state: str) -> bool:
    """Whether a job in this state holds nodes or may still get them."""
    return base(state) in WAITING | RUNNING


def is_lost(state: str) -> bool:
    """Whether a node in this state, such as `DOWN*+DRAIN`, is lost. One that saves power (`IDLE+CLOUD+POWERED_DOWN`) is not."""
    # Behind a word stand marks: `*` for no answer, others for power and plans.
    words = state.upper().split("+")
    return "*" in state or any(word.rstrip("~#!%$@^-") in LOST_NODE for word in words)
