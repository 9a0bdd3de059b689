"""Validation: every sample counts once, whatever the number of ranks."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from jobs.config.settings import Job
from jobs.run.goodput import Part
from jobs.run.progress import Progress
from train.data.loader import POLL_S, ValidationLoader
from train.data.order import shard
from train.data.sources import Dataset, byte_entropy
from train.data.windows import TokenWindows
from train.distributed.parallel import share_buffers
from train.distributed.runtime import Distributed
from train.distributed.stop_agreement import StopAgreement
from train.metrics.goodput_timer import GoodputTimer
from train.models.contract import read_loss

Context = Callable[[], AbstractContextManager[object]]


class Validator:
    """Computes the validation loss of `model`, the module inside DDP: ranks have shards of different lengths and must not wait for
    each other in it."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        data: Dataset,
        loader: ValidationLoader,
        dist: Distributed,
        agreement: StopAgreement,
        timer: GoodputTimer,
        progress: Progress,
    ):
        assert job.micro_batch_size is not None
        self._model, self._data, self._loader, self._dist = model, data, loader, dist
        self._agreement, self._timer, self._progress = agreement, timer, progress
        self._micro_batch = job.micro_batch_size
        self._samples = min(len(data), job.eval_samples or len(data))

    def run(self, context: Context) -> dict[str, float] | None:
        """Return the values of a validation for the log line, under the precision of `context`; None when the ranks agreed to stop."""
        before = self._progress.enter("evaluation")
        begun = self._timer.now()
        with self._timer.during(Part.EVALUATION):
            loss = self._mean_loss(context)
            if loss is None:
                self._timer.count(Part.LOST, since=begun)
        self._progress.enter(before)
        return None if loss is None else loss_metrics(loss, self._data)

    def close(self) -> None:
        self._loader.close()

    def _mean_loss(self, context: Context) -> float | None:
        """Nats per target over the samples; NaN where none of them has a target, None when the ranks agreed to stop."""
        batches = self._index_batches()
        self._loader.begin(batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self._dist.device)
        share_buffers(self._model, self._dist)
        was_training = self._model.training
        self._model.eval()
        try:
            for index in range(self._rounds()):
                if not self._wait_for_batch():
                    return None
                if index < len(batches):
                    sums += self._batch_sums(context)
        finally:
            self._model.train(was_training)
            self._loader.end()
        loss, targets = self._dist.all_reduce_sum(sums).tolist()
        return loss / targets if targets else math.nan

    def _index_batches(self) -> list[NDArray[np.int64]]:
        """Sample ids of this rank, one array per forward pass."""
        # Spread over the whole set: files are concatenated in it, and its first samples come from a few of them only.
        chosen = np.linspace(0, len(self._data) - 1, self._samples).round().astype(np.int64)
        ids = chosen[shard(self._samples, self._dist.world_size, self._dist.rank)]
        return [ids[start : start + self._micro_batch] for start in range(0, len(ids), self._micro_batch)]

    def _rounds(self) -> int:
        """Forward passes of the largest shard: all ranks sync their flags equally often."""
        return math.ceil(math.ceil(self._samples / self._dist.world_size) / self._micro_batch)

    def _wait_for_batch(self) -> bool:
        """Wait until every rank has its next batch. False when the ranks agreed to stop."""
        while True:
            (waiting,) = self._agreement.sync(not self._loader.ready(POLL_S))
            if self._agreement.stop_code:
                return False
            if not waiting:
                return True

    def _batch_sums(self, context: Context) -> torch.Tensor:
        """[sum of losses, number of targets] of the next batch, on the device."""
        batch = {name: tensor.to(self._dist.device) for name, tensor in self._loader.next().items()}
        with torch.no_grad(), context():
            loss_sum, targets = read_loss(self._model(**batch), batch)
        return torch.stack([loss_sum.double(), targets.to(self._dist.device).double()])


def loss_metrics(loss: float, data: Dataset) -> dict[str, float]:
    """Values for the log line. For bytes also bits per byte, and the entropy of single bytes, which a model that knows only
    their frequency would reach."""
    values = {"val_loss": loss}
    if data.unit == "byte":
        values["val_bits_per_byte"] = loss / math.log(2)
        if isinstance(data, TokenWindows):
            values["val_entropy_bits_per_byte"] = byte_entropy(data.stream)
    return values
