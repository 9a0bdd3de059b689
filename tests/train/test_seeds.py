"""Random numbers follow from seed, step and stream, and are those of torch's own seeding."""

import random

import numpy as np
import torch

from train.rng import seed_everything


def drawn(seed: int, step: int, stream: int = 0) -> tuple[float, float, float]:
    seed_everything(seed, step, stream)
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_each_seed_step_and_stream_has_numbers_of_its_own_and_always_the_same() -> None:
    places = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2) for stream in (0, 1)]
    first = [drawn(*place) for place in places]
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
    assert all(len(set(column)) == len(places) for column in zip(*first, strict=True))


def test_they_are_the_numbers_of_manual_seed() -> None:
    seed_everything(7, 3, 1)
    seed, numbers = torch.initial_seed(), torch.rand(8)
    torch.manual_seed(seed)
    assert torch.equal(torch.rand(8), numbers)
