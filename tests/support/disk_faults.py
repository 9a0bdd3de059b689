"""Faults that are prepared inside a training process before it starts (Farm.before)."""

import errno
import os
import time


def _disk(**calls):
    from jobs.checkpoint import commit

    for name, call in calls.items():
        setattr(commit.Disk, name, call)


def disk_full_at_the_third_save():
    """ENOSPC at the second file of the third save and never again."""
    from jobs.checkpoint import commit

    real, count = commit.Disk.fsync, [0]

    def fsync(self, fd):
        count[0] += 1
        if count[0] == 13:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, fd)

    _disk(fsync=fsync)


def disk_always_full():
    def create(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _disk(create=create)


def read_only():
    def mkdir(self, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    _disk(mkdir=mkdir)


def slow_disk(flush_s=0.25):
    """Each flush takes a quarter of a second: a save takes one second and more."""
    from jobs.checkpoint import commit

    real = commit.Disk.fsync

    def fsync(self, fd):
        time.sleep(flush_s)
        real(self, fd)

    _disk(fsync=fsync)


def disk_not_quite_as_slow():
    """A save takes a quarter of a second."""
    slow_disk(flush_s=0.05)


def bug_in_the_writer():
    def rename(self, old, new):
        raise RuntimeError("a mistake of ours")

    _disk(rename=rename)


def clock_set_back_a_year():
    real = time.time
    time.time = lambda: real() - 365 * 86_400


def data_that_hangs():
    """The samples of step 10 come when a file says so."""
    from train.data import synthetic

    real = synthetic.AffineTokens.batch
    calls = [0]

    def batch(self, ids):
        if self.__dict__.get("split", "train") == "train":
            calls[0] += 1
            if calls[0] == 11 and os.environ["HOLDFAST_ATTEMPT"] == "1":
                time.sleep(3600)
        return real(self, ids)

    synthetic.AffineTokens.batch = batch


def validation_data_that_hangs():
    """Rank 1's second batch of the first validation comes in an hour."""
    from train.data import synthetic

    real = synthetic.AffineTokens.batch
    calls = [0]

    def batch(self, ids):
        if self._offset and os.environ.get("RANK") == "1":
            calls[0] += 1
            if calls[0] == 2 and os.environ["HOLDFAST_ATTEMPT"] == "1":
                time.sleep(3600)
        return real(self, ids)

    synthetic.AffineTokens.batch = batch


def compilation_that_hangs():
    """The first forward pass takes an hour, as a compilation may."""
    from train.models import gpt

    real = gpt.GPT.forward

    def forward(self, *args, **kwargs):
        if os.environ["HOLDFAST_ATTEMPT"] == "1":
            time.sleep(3600)
        return real(self, *args, **kwargs)

    gpt.GPT.forward = forward


def slow_first_saves():
    """Every save of the first attempt takes SLOW_SAVE_S more before it is complete."""
    from jobs.checkpoint import commit

    if os.environ["HOLDFAST_ATTEMPT"] != "1":
        return
    finish = commit.Commit.finish

    def slowly(self, *args, **kwargs):
        time.sleep(float(os.environ["SLOW_SAVE_S"]))
        return finish(self, *args, **kwargs)

    commit.Commit.finish = slowly


def small_files():
    """What lies in one file of 2 GiB otherwise lies in several."""
    from train.checkpoint import state_dict

    state_dict.FILE_BYTES = 20_000
