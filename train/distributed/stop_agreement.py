"""Agreement of the ranks on whether to stop: one small all-reduce on the CPU at each step boundary."""

from pathlib import Path

from jobs.rank.stop_flag import StopFlag, name_of
from train.distributed.runtime import Distributed


class StopAgreement:
    """`stop_code` is 0 until the ranks agreed to stop, then the code of `StopFlag.code`; the same on every rank after each `sync`."""

    def __init__(self, dist: Distributed, flag: StopFlag, stop_file: Path | None):
        """`stop_file`: None on the ranks that do not look for it."""
        self._dist, self._flag, self._stop_file = dist, flag, stop_file
        self.stop_code = 0

    def sync(self, *flags: bool) -> tuple[bool, ...]:
        """All-reduce the stop code and these flags. Returns, for each flag, whether any rank sets it. Collective."""
        self.stop_code, *reduced = self._dist.all_reduce_max(self.stop_code or self._flag.code(self._stop_file), *map(int, flags))
        return tuple(map(bool, reduced))

    @property
    def stopped_by(self) -> str | None:
        """TERM, USR2 and so on; None while nobody has asked for a stop."""
        return name_of(self.stop_code) if self.stop_code else None
