"""What a rank tells about itself when the watchdog asks: its Python stacks, and its last collectives.

The stacks are written in C, inside the signal handler, also while one call holds the interpreter's lock. The collectives come
from torch's flight recorder (TORCH_FR_BUFFER_SIZE), which a thread reads when the same signal wakes it; it needs the lock for a
moment, so that a rank that holds it for ever leaves its stacks only.
"""

import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from jobs.core.atomic_write import replace_file
from jobs.core.contract import STACKS_SIGNAL


def answer_when_asked(stacks: Path, collectives: Path) -> None:
    """From now on STACKS_SIGNAL is answered into these files. Called in the main thread."""
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(STACKS_SIGNAL, lambda *_: None)
    # Python's own handler, which comes after the stacks, does nothing but wake the thread.
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    faulthandler.register(STACKS_SIGNAL, file=open(stacks, "ab", buffering=0), all_threads=True, chain=True)
    threading.Thread(target=_listen, args=(heard, collectives), name="recorder", daemon=True).start()


def _listen(heard: int, place: Path) -> None:
    while number := os.read(heard, 1):
        if number[0] == STACKS_SIGNAL:
            text = last_collectives()
            if text:
                with suppress(OSError):
                    replace_file(place, text, flush=False)


def last_collectives() -> bytes:
    """The flight recorder as JSON: of NCCL where it is in use, else of gloo. Empty where there is none."""
    if "torch.distributed" not in sys.modules:
        return b""
    import torch
    from torch._C import _distributed_c10d as c10d

    # Names that are not torch's public ones: without them there are still the stacks.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json") if torch.cuda.is_initialized() else ("_dump_fr_trace_json",):
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        with suppress(Exception):
            found = dump()
            text: bytes = found if isinstance(found, bytes) else str(found).encode()
            if b'"record_id"' in text:
                return text
    return b""
