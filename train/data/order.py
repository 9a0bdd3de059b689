"""Which samples an optimizer step consumes: a pure function of the step and the seed.

The samples of all steps form one endless list: position g = step * batch_size + i belongs to epoch g // num_samples,
and holds the sample that the epoch's permutation puts at g % num_samples. So there is no sampler state to save, a run
resumes at any step and at any number of processes with the same samples, and each epoch has every sample once, also
where an epoch ends in the middle of a batch.

The permutation is our own keyed Feistel network (splitmix64 as its mixing function) with cycle-walking: any entry can
be had without the others, in no memory, and no release of numpy can change it under a run that is still going.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio
_MASK64 = (1 << 64) - 1


def sample_ids(step: int, batch_size: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Ids, shape [batch_size], of the samples that optimizer step `step` consumes over all processes."""
    if step < 0 or batch_size < 1 or num_samples < 1:
        raise ValueError(f"no batch of {batch_size} at step {step} over {num_samples} samples")
    position = np.arange(batch_size, dtype=np.int64) + np.int64(step * batch_size)
    epoch, index = np.divmod(position, np.int64(num_samples))
    return permuted(index, epoch, num_samples, seed)


def permuted(index: NDArray[np.int64], epoch: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Where each epoch's permutation of range(num_samples) sends `index`; both arrays have one shape, [n]."""
    # Two halves of equal width; the domain 4**half is less than four times num_samples, so that few walks are needed.
    half = max(2, ((num_samples - 1).bit_length() + 1) // 2)
    key = _mix(epoch.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(_mix_int(seed)))
    out = _feistel(index.astype(np.uint64), key, half)
    # Cycle-walking: what lands outside is sent on until it lands inside, which keeps the map one-to-one.
    outside = np.flatnonzero(out >= num_samples)
    while outside.size:
        out[outside] = _feistel(out[outside], key[outside], half)
        outside = outside[out[outside] >= num_samples]
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], key: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    width, low = np.uint64(half), np.uint64((1 << half) - 1)
    top = np.uint64(64 - half)  # the high bits of a mixed word are its best
    left, right = x >> width, x & low
    for r in range(_ROUNDS):
        round_key = key + np.uint64((r + 1) * _GOLDEN & _MASK64)
        left, right = right, left ^ (_mix(right ^ round_key) >> top)
    return (left << width) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), over an array; products wrap at 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    """The same for one Python integer of any sign and size: numpy's scalars warn where its arrays wrap."""
    x = (x + _GOLDEN) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def rank_slice(batch_size: int, micro_batch: int, world: int, rank: int) -> list[slice]:
    """The slots of a global batch that one process takes, a slice per micro-step.

    Micro-step a of rank r takes slots [(a * world + r) * micro_batch, + micro_batch). All ranks get the same number of
    slices, so that collectives match; where batch_size does not divide, the last ones are shorter or empty."""
    if not 0 <= rank < world or micro_batch < 1 or batch_size < 1:
        raise ValueError(f"no slice for rank {rank} of {world}, micro-batch {micro_batch}, batch {batch_size}")
    windows = -(-batch_size // (micro_batch * world))
    starts = ((a * world + rank) * micro_batch for a in range(windows))
    return [slice(min(s, batch_size), min(s + micro_batch, batch_size)) for s in starts]


def shard(num_samples: int, world: int, rank: int) -> NDArray[np.int64]:
    """The ids that one process evaluates: contiguous, each id at exactly one rank, sizes at most one apart.

    Nothing is repeated to make ranks equal: sum losses and counts over all ranks, then divide."""
    if not 0 <= rank < world or num_samples < 0:
        raise ValueError(f"no shard for rank {rank} of {world} over {num_samples} samples")
    return np.arange(num_samples * rank // world, num_samples * (rank + 1) // world, dtype=np.int64)
