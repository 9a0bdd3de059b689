"""Importing much at once, such as torch: the largest part of what an attempt takes until its first step."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection while modules are imported, and none of what they made later.

    Every few thousand objects Python looks through all that there are for garbage, and what modules are made of is none:
    0.6 of 3.1 s for `train.trainer` and what torch's optimizers import (torch 2.13, Python 3.11)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
