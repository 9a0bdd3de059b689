"""The answer of squeue for one user: live jobs, and the jobs that ended a short time ago."""

from collections.abc import Mapping
from types import MappingProxyType

from slurm.states import ENDED, base


class Queue(dict[str, tuple[str, str, str]]):
    """Jobs that wait or run: id -> (state, reason, nodes). `ended` has the state of jobs that are over and not yet purged (MinJobAge)."""

    ended: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def of(cls, jobs: Mapping[str, tuple[str, str, str]]) -> "Queue":
        queue = cls({job_id: job for job_id, job in jobs.items() if base(job[0]) not in ENDED})
        queue.ended = {job_id: job[0] for job_id, job in jobs.items() if base(job[0]) in ENDED}
        return queue
