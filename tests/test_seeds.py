"""Random numbers follow from seed, step and stream, and are those of torch's own seeding."""

import random

import numpy as np
import pytest
import torch

from train.seeds import seed_everything


def drawn(seed: int, step: int, stream: int = 0) -> tuple[float, float, float]:
    seed_everything(seed, step, stream)
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_each_seed_step_and_stream_has_numbers_of_its_own_and_always_the_same() -> None:
    places = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2) for stream in (0, 1)]
    first = [drawn(*place) for place in places]
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
    assert all(len(set(column)) == len(places) for column in zip(*first, strict=True))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]
)
def test_they_are_the_numbers_of_manual_seed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = torch.default_generator.manual_seed
    torch.rand((), device=device)  # the GPU is in use

    class Generator:
        def manual_seed(self, seed: int) -> None:
            asked.append(seed)
            real(seed)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "default_generator", Generator())
        seed_everything(7, 3, 1)
    numbers = torch.rand(8, device=device)
    torch.manual_seed(asked[0])
    assert torch.equal(torch.rand(8, device=device), numbers)
