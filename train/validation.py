"""Validation: every sample counts once, whatever the number of ranks."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from train.data.loader import LISTEN_S, ValidationFeed
from train.data.order import shard
from train.data.sources import Dataset, byte_entropy
from train.data.windows import TokenWindows
from train.distributed.parallel import share_buffers
from train.distributed.runtime import Runtime
from train.models.contract import read_loss


@dataclass(frozen=True)
class Validation:
    """`loss` is the mean in nats per target over the validation samples; NaN where none of them has a target."""

    loss: float

    def metrics(self, data: Dataset) -> dict[str, float]:
        """For bytes also bits per byte, beside what a model that knows only the frequency of each byte would reach."""
        values = {"val_loss": self.loss}
        if data.unit == "byte":
            values["val_bits_per_byte"] = self.loss / math.log(2)
            if isinstance(data, TokenWindows):
                values["val_entropy_bits_per_byte"] = byte_entropy(data.stream)
        return values


def evaluate(
    model: nn.Module,
    context: Callable[[], AbstractContextManager[object]],
    data: Dataset,
    feed: ValidationFeed,
    runtime: Runtime,
    *,
    samples: int | None,
    micro_batch: int,
    agree: Callable[[bool], tuple[bool, ...]],
) -> Validation | None:
    """The validation loss under the precision of training; None when the ranks agreed to stop in the middle.

    `agree` takes whether this rank waits for samples, and tells all of them whether to stop and whether any of them waits.

    `model` is the module inside DDP: ranks have shards of different lengths and must not wait for each other in it."""
    count = min(len(data), samples or len(data))
    # Spread over the whole set: files stand one behind the other in it, and its first samples are a few of them only.
    chosen = np.linspace(0, len(data) - 1, count).round().astype(np.int64)
    mine = chosen[shard(count, runtime.world, runtime.rank)]
    # The largest shard decides how often the ranks ask each other whether to stop: all ask equally often.
    rounds = math.ceil(math.ceil(count / runtime.world) / micro_batch)
    portions = [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)]
    feed.begin(portions)
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    share_buffers(model, runtime)
    was_training = model.training
    model.eval()
    try:
        for index in range(rounds):
            waiting = True
            while waiting:
                stop, waiting = agree(not feed.ready(LISTEN_S))
                if stop:
                    return None
            if index >= len(portions):
                continue
            batch = {name: tensor.to(runtime.device) for name, tensor in feed.next().items()}
            with torch.no_grad(), context():
                loss_sum, targets = read_loss(model(**batch), batch)
            sums += torch.stack([loss_sum.double(), targets.to(runtime.device).double()])
    finally:
        model.train(was_training)
        feed.end()
    loss, targets = runtime.total(sums).tolist()
    return Validation(loss / targets if targets else math.nan)
