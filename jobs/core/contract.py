"""The stop contract in names and numbers: signals, exit codes, causes, and the variables a rank is given.

The batch script, the training processes and the launcher all read this page, so that none of them
can disagree about what a signal or an exit code means.
"""

import signal
from enum import IntEnum, StrEnum


class Exit(IntEnum):
    """Exit codes of every command and of every training process."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    # EX_TEMPFAIL of sysexits.h: stopped on request, state saved, wants to be started again.
    REQUEUE = 75
    # EX_CONFIG of sysexits.h: starting it again cannot help.
    IMPOSSIBLE = 78
    # What a shell reports for a foreground command ended by Ctrl-C.
    INTERRUPTED = 130


# USR2 and not USR1: NCCL installs a handler of its own for USR1.
LEAD_SIGNAL = signal.SIGUSR2
# TERM is what Slurm sends at preemption and at the end of the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

# How the stop file begins when it was a sweep that made it. A person's own is empty, or says what they like.
PRUNED_WORD = "pruned"

# Asks a rank for its Python stacks. URG because a process without a handler ignores it; NCCL has one of its own for USR1.
STACKS_SIGNAL = signal.SIGURG

# Ports for the rendezvous lie below 32768, where Linux starts to hand out ephemeral ports.
RENDEZVOUS_PORTS = range(20000, 30000)


class Cause(StrEnum):
    """Why an attempt ended. `Slurm state -> cause` is in slurm/states.py, the policy in jobs/run/retry_policy.py."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    # `scontrol requeue` by a person or a tool, or a `stop` file in the run directory.
    REQUEUED = "requeued"
    NODE_FAILURE = "node_failure"
    OUT_OF_MEMORY = "out_of_memory"
    # A process of the run was ended by a signal that nobody announced.
    KILLED = "killed"
    CANCELLED = "cancelled"
    # A sweep gave this trial up: it did worse than the others.
    PRUNED = "pruned"
    CODE_ERROR = "code_error"
    HANG = "hang"
    STORAGE = "storage"
    UNKNOWN = "unknown"


class Event(StrEnum):
    """Words in the `event` field of ledger.jsonl."""

    SUBMITTED = "submitted"
    START = "start"
    RESUMED = "resumed"
    STOP = "stop"
    CHECKPOINT = "checkpoint"
    SAVE_FAILED = "save_failed"
    DAMAGED = "damaged"
    OVERFLOW = "overflow"
    # Settings of the run were changed on purpose, by `holdfast resume RUN KEY=value`.
    CHANGED = "changed"
    END = "end"
    REQUEUE = "requeue"
    # A node that failed, or did not pass the checks before an attempt: left out for a time.
    BAD_NODE = "bad_node"
    CANCEL = "cancel"


class RankEnv(StrEnum):
    """Variables that every training process finds, whichever way it was launched."""

    RUN_DIR = "HOLDFAST_RUN_DIR"
    ATTEMPT = "HOLDFAST_ATTEMPT"
    # When the attempt began, by the monotonic clock of its first node.
    STARTED = "HOLDFAST_STARTED"
    RANK = "RANK"
    WORLD_SIZE = "WORLD_SIZE"
    LOCAL_RANK = "LOCAL_RANK"
    LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
    MASTER_ADDR = "MASTER_ADDR"
    MASTER_PORT = "MASTER_PORT"


# What the batch script tells the beginning of an attempt: bytes in its log and seconds that had passed when it began.
LOG_OFFSET, SETUP_SECONDS = "HOLDFAST_LOG_OFFSET", "BATCH_SECONDS"

# Job ids of runs without Slurm: this word and the number of the process that watches over the ranks.
LOCAL = "local-"
