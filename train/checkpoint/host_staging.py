"""Pinned host memory: staging buffers of a save, and parallel copies of memory-mapped tensors to a GPU.

A single thread that loads would wait alternately for the page cache and for the bus.
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

# Host memory for a save is allocated in pieces of this many bytes, and tensors in it are aligned to so many.
_SLAB = 2**28
_ALIGN = 256


class PinnedPool:
    """Host buffers for a copy of the state, pinned where there is a GPU; every save reuses them."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        # What is left of each slab.
        self._rests: list[torch.Tensor] = []

    def buffer(self, file: str, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the buffer of a tensor of a file, the same one each time."""
        key = (file, name)
        known = self._buffers.get(key)
        if known is None or known.shape != shape or known.dtype != dtype:
            self._buffers[key] = known = self._take(shape.numel() * dtype.itemsize).view(dtype).view(shape)
        return known

    def _take(self, size: int) -> torch.Tensor:
        # In slabs, because torch rounds each pinned allocation up to a power of two. Small ones: whoever launches a kernel waits while
        # one is pinned, about 0.15 s for this size.
        place = next((n for n, rest in enumerate(self._rests) if rest.numel() >= size), None)
        if place is None:
            place = len(self._rests)
            self._rests.append(self._new(max(_SLAB if self._pinned else size, size)))
        rest = self._rests[place]
        self._rests[place] = rest[-(-size // _ALIGN) * _ALIGN :]
        return rest[:size]

    def _new(self, size: int) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._pinned = False  # a limit on locked memory; ordinary memory is slower, not wrong
        return torch.empty(size, dtype=torch.uint8)


class PinnedCopier:
    """Copies tensors in threads; all copies are done at the end of the `with` block, which raises the first error.

    Operations queued later on the device may use a target; the host must not read it before the end of the block."""

    def __init__(self, threads: int = _THREADS, block: int = _BLOCK):
        """`block`: bytes of pinned memory, two per thread."""
        self._threads = ThreadPoolExecutor(max(1, min(threads, len(os.sched_getaffinity(0)))), thread_name_prefix="copy")
        self._block = block
        self._local = threading.local()
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "PinnedCopier":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=error is not None)
        if error is None:
            for future in self._pending:
                future.result()

    def new(self, source: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a new tensor on `device` that `source` is being copied into."""
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
        self.add(target, source)
        return target

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source`, on the CPU, into `target`. Raises ValueError where the shapes differ."""
        if target.shape != source.shape:
            raise ValueError(f"{tuple(source.shape)} does not fit into {tuple(target.shape)}")
        # Detached: a weight that is trained may not be written to otherwise.
        target = target.detach()
        if not target.is_cuda or target.dtype != source.dtype or not target.is_contiguous():
            target.copy_(source)
            return
        # A thread has a current stream of its own: what it queues has to come before what the caller queues next.
        self._pending.append(self._threads.submit(self._copy, target, source, torch.cuda.current_stream(target.device)))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: "torch.cuda.Stream") -> None:
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
        if not hasattr(self._local, "buffers"):
            self._local.buffers = [(torch.empty(self._block, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        self._local.buffers.reverse()
        return self._local.buffers[0]  # type: ignore[no-any-return]
