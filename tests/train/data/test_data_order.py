"""Which samples a step consumes: every one once per epoch, for any batch, any number of processes, any restart.

Run: pytest tests/train/data/test_data_order.py"""

import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import permuted, rank_slice, sample_ids, shard

FROZEN_A = [367, 115, 958, 655, 499, 97, 348, 834]
FROZEN_B = [41786, 70365, 47884, 45592, 53854, 27475]
FROZEN_C = [0, 2, 1, 0]
FROZEN_SIZES = {
    4095: [1416, 2023, 69, 3706],
    4096: [1416, 2023, 69, 3706],
    4097: [2645, 4079, 166, 3706],
    16384: [2645, 4079, 166, 3706],
    16385: [12802, 7899, 2503, 6886],
}


def epoch_ids(num_samples: int, seed: int, epoch: int = 0) -> np.ndarray:
    index = np.arange(num_samples, dtype=np.int64)
    return permuted(index, np.full_like(index, epoch), num_samples, seed)


@examples(150)
@given(num_samples=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation_of_all_samples(num_samples: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_ids(num_samples, seed, epoch)), np.arange(num_samples))


@examples(100)
@given(num_samples=st.integers(1, 200), batch=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_every_sample_comes_once_per_epoch_across_step_boundaries(num_samples: int, batch: int, seed: int) -> None:
    steps = -(-3 * num_samples // batch)
    consumed = np.concatenate([sample_ids(step, batch, num_samples, seed) for step in range(steps)])
    for epoch in range(3):
        of_epoch = consumed[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(np.sort(of_epoch), np.arange(num_samples))


def test_the_list_of_samples_does_not_depend_on_the_batch_size() -> None:
    whole = sample_ids(0, 600, 250, 7)
    for batch in (1, 8, 60, 200):
        cut = np.concatenate([sample_ids(step, batch, 250, 7) for step in range(600 // batch)])
        assert np.array_equal(cut, whole[: len(cut)])


def test_order_is_frozen() -> None:
    """A change here reshuffles every run that is still going: it needs a new name for the order, not new numbers."""
    assert sample_ids(0, 8, 1000, 0).tolist() == FROZEN_A
    assert sample_ids(123_456, 6, 84_827, 1234).tolist() == FROZEN_B
    assert sample_ids(5, 4, 3, 42).tolist() == FROZEN_C


# Around a power of four the width of the two halves changes.
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097])
def test_sizes_around_a_power_of_four_are_permuted_within_the_least_domain(num_samples: int) -> None:
    assert np.array_equal(np.sort(epoch_ids(num_samples, 9)), np.arange(num_samples))


def test_order_is_frozen_around_a_power_of_four() -> None:
    assert {n: epoch_ids(n, 9)[:4].tolist() for n in FROZEN_SIZES} == FROZEN_SIZES


def test_seed_and_epoch_change_the_order() -> None:
    base = epoch_ids(1000, 0)
    for other in (epoch_ids(1000, 1), epoch_ids(1000, -1), epoch_ids(1000, 0, epoch=1), epoch_ids(1000, 2**64 - 1)):
        # A random permutation of 1,000 has one fixed point on average; 10 has probability 1e-7.
        assert (other == base).sum() < 10


def test_order_looks_random() -> None:
    n = 20_000
    ids = epoch_ids(n, 3).astype(float)
    # Standard deviation of either correlation is 1 / sqrt(n) = 0.007; 5 of them.
    assert abs(np.corrcoef(ids, np.arange(n))[0, 1]) < 0.035
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.035
    # First sample of 5,000 epochs of 7: chi-square with 6 degrees of freedom, 22.5 has probability 0.001.
    first = permuted(np.zeros(5000, dtype=np.int64), np.arange(5000, dtype=np.int64), 7, 11)
    counts = np.bincount(first, minlength=7)
    assert ((counts - 5000 / 7) ** 2 / (5000 / 7)).sum() < 22.5


def test_a_far_step_of_huge_data_costs_no_memory() -> None:
    ids = sample_ids(10**9, 512, 2**40 + 12345, 1)
    assert ids.dtype == np.int64 and len(np.unique(ids)) == 512
    assert ids.min() >= 0 and ids.max() < 2**40 + 12345


@examples(100)
@given(batch=st.integers(1, 200), micro=st.integers(1, 32), world=st.integers(1, 9))
def test_processes_cut_a_batch_without_gap_or_overlap(batch: int, micro: int, world: int) -> None:
    slots = np.arange(batch)
    shares = [rank_slice(batch, micro, world, rank) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    taken = np.concatenate([slots[part] for share in shares for part in share])
    assert np.array_equal(np.sort(taken), slots)


def test_micro_step_a_of_rank_r_takes_its_slots() -> None:
    assert rank_slice(24, 4, 3, 1) == [slice(4, 8), slice(16, 20)]
    assert rank_slice(10, 4, 2, 0) == [slice(0, 4), slice(8, 10)]
    assert rank_slice(10, 4, 2, 1) == [slice(4, 8), slice(10, 10)]


def test_a_batch_is_the_same_set_of_samples_at_any_world_size() -> None:
    ids = sample_ids(3, 16, 100, 5)
    for world, micro in ((1, 16), (1, 4), (2, 4), (4, 4), (8, 2)):
        parts = [ids[part] for rank in range(world) for part in rank_slice(16, micro, world, rank)]
        assert sorted(np.concatenate(parts)) == sorted(ids)


@examples(100)
@given(num_samples=st.integers(0, 500), world=st.integers(1, 17))
def test_evaluation_counts_every_sample_once(num_samples: int, world: int) -> None:
    shards = [shard(num_samples, world, rank) for rank in range(world)]
    assert np.array_equal(np.concatenate(shards), np.arange(num_samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_impossible_questions_are_refused() -> None:
    for wrong in (
        lambda: sample_ids(-1, 8, 10, 0), lambda: sample_ids(0, 8, 0, 0), lambda: rank_slice(8, 2, 2, 2),
        lambda: shard(8, 2, -1), lambda: shard(8, 2, 2), lambda: shard(-1, 2, 0), lambda: rank_slice(8, 0, 2, 0), lambda: rank_slice(0, 1, 2, 0),
        lambda: sample_ids(0, 0, 10, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"no (batch|slice|shard)"):
            wrong()
