"""Many tensors at once from files into a GPU: several threads read, through pinned memory, and the GPU fetches meanwhile.

One thread that copies from a mapped file waits in turn for the page and for the bus. Nothing here knows what the tensors are.
"""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

# Reading is a copy out of the page cache, or a wait for a disk: more threads than a bus needs, fewer than a node has processors.
_THREADS = 8
# Per thread two of these are pinned: one is filled while the GPU fetches the other.
_BLOCK = 16 * 2**20


class Filling:
    """Fills tensors with others of the same shape, all of them by the end of the `with` block; an error of any is raised there.

    A tensor that is being filled may be used by operations queued after that, and must not be read before."""

    def __init__(self, threads: int = _THREADS, block: int = _BLOCK):
        """`block`: bytes of pinned memory, two per thread."""
        self._threads = ThreadPoolExecutor(max(1, min(threads, len(os.sched_getaffinity(0)))), thread_name_prefix="fill")
        self._block = block
        self._mine = threading.local()
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=error is not None)
        if error is None:
            for one in self._pending:
                one.result()

    def new(self, source: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on `device` that `source` is being copied into."""
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
        self.add(target, source)
        return target

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source`, on the CPU, into `target`. Raises ValueError where the shapes differ."""
        if target.shape != source.shape:
            raise ValueError(f"{tuple(source.shape)} does not fit into {tuple(target.shape)}")
        # Detached: a weight that is trained may not be written to otherwise.
        target = target.detach()
        if not target.is_cuda or target.dtype != source.dtype or not target.is_contiguous():
            target.copy_(source)
            return
        # A thread has a current stream of its own: what it queues has to come before what the caller queues next.
        self._pending.append(self._threads.submit(self._fill, target, source, torch.cuda.current_stream(target.device)))

    def _fill(self, target: torch.Tensor, source: torch.Tensor, stream: "torch.cuda.Stream") -> None:
        into, out_of = target.view(-1).view(torch.uint8), source.contiguous().view(-1).view(torch.uint8).numpy()
        with torch.cuda.stream(stream):
            for start in range(0, len(out_of), self._block):
                piece = out_of[start : start + self._block]
                buffer, fetched = self._next_buffer()
                fetched.synchronize()
                # By numpy: a copy of torch's would start threads of its own in each of these.
                np.copyto(buffer[: len(piece)].numpy(), piece)
                into[start : start + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
                fetched.record()

    def _next_buffer(self) -> "tuple[torch.Tensor, torch.cuda.Event]":
        """The buffer of this thread that was used longest ago, and the event after which the GPU has fetched what it holds."""
        if not hasattr(self._mine, "buffers"):
            self._mine.buffers = [(torch.empty(self._block, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        self._mine.buffers.reverse()
        return self._mine.buffers[0]  # type: ignore[no-any-return]
