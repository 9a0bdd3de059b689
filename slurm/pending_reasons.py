"""Why a job waits: squeue's reason codes in words that say whether a person has to do something."""

# squeue(1), "JOB REASON CODES". Limits (QOSMaxJobsPerUserLimit, AssocGrpGRES...) are read by their parts below.
_WORDS: dict[str, str] = {
    "Priority": "jobs of higher priority are before it",
    "Resources": "not enough nodes are free yet",
    "Dependency": "waits for another job to end",
    "DependencyNeverSatisfied": "the job it waits for can no longer end as it should: cancel it and submit anew",
    "BeginTime": "waits for its begin time; after a requeue Slurm pauses it for some seconds",
    "JobHeldUser": "held by you: scontrol release starts it",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held, requeued too often: scontrol release starts it",
    "launch failed requeued held": "held, its start failed: scontrol release tries again",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node can ever satisfy what it asks for: cancel it and ask for less",
    "PartitionDown": "its partition is closed for new starts",
    "PartitionInactive": "its partition takes no jobs",
    "PartitionNodeLimit": "asks for more nodes than its partition gives to one job",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "PartitionConfig": "its partition does not allow what it asks for",
    "AccountNotAllowed": "its partition does not take this account",
    "QOSNotAllowed": "its partition does not take this QOS",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "JobArrayTaskLimit": "as many tasks of its array run as ARRAY_PARALLEL allows",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation to begin",
    "ReservationDeleted": "its reservation is gone: cancel it and submit anew",
    "Prolog": "its nodes are being prepared",
    "Cleaning": "its last start is still being cleaned up after",
    "NodeReboot": "its nodes reboot first",
    "FrontEndDown": "no front end node is up",
    "SystemFailure": "Slurm met an error of its own",
    "JobLaunchFailure": "its start failed",
    "NonZeroExitCode": "its last start ended with an error",
    "TimeLimit": "its last start met its time limit",
    "FedJobLock": "waits for the other clusters of the federation",
    "MaxMemPerLimit": "asks for more memory per CPU or node than its partition gives",
}

# QOSMaxJobsPerUserLimit and its like: whose limit, for what (the first part that is found), counted over what.
_OWNERS = (("QOS", "the QOS"), ("Assoc", "your account"))
_OF = (
    ("gres", "GPUs"),
    ("cpu", "CPUs"),
    ("mem", "memory"),
    ("node", "nodes"),
    ("submit", "queued jobs"),
    ("wall", "run time"),
    ("time", "run time"),
    ("license", "licences"),
    ("billing", "billing units"),
    ("energy", "energy"),
    ("job", "running jobs"),
)
_PER = (("PerUser", "of one user"), ("PerAccount", "of one account"), ("PerJob", "of one job"), ("PerNode", "per node"), ("Grp", "of all jobs together"))


def in_words(reason: str) -> str:
    """`Priority` -> `jobs of higher priority are before it`. A code that is not known is given back as it is; nothing for none."""
    code, _, more = reason.strip().partition(",")
    code = code.strip("()")
    if code in ("", "None", "null", "N/A"):
        return ""
    known = _WORDS.get(code) or _limit(code)
    if known is None:
        return f"Slurm says {reason.strip()}"
    nodes = more.partition(":")[2].strip() if "Nodes:" in more else ""
    return f"{known} ({nodes})" if nodes else known


def _limit(code: str) -> str | None:
    owner = next((words for begin, words in _OWNERS if code.startswith(begin)), None)
    if owner is None:
        return None
    per = next(((part, words) for part, words in _PER if part in code), ("", ""))
    rest = code.replace(per[0], "").lower().replace("minutes", "")
    of = next((words for part, words in _OF if part in rest), "use")
    counted = f"minutes of {of}" if "Minutes" in code else of
    limit = f"asks for less than {owner} wants" if "Min" in code.replace("Minutes", "") else f"the limit of {owner} is reached"
    return f"{limit}: {counted} {per[1]}".rstrip()
