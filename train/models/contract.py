"""What a model's forward takes and returns, so that one loop can train all of them.

Takes: the tensors of a batch as keyword arguments, `model(**batch)`. Names in use: `tokens`, `targets`, `loss_mask`,
`attention_mask`, `images`.

Returns the **sum** of the losses over what counts in this micro-batch, as an fp32 scalar; or `LossSum`, where the model
itself knows how many that were. Never a mean: the loop adds up the counts of all micro-steps and all processes of an
optimizer step and divides once, so that a step's gradient depends neither on how the batch was cut nor on padding.

A model of one's own (`package.module:build`) may return a mean, or a mapping with `loss` and optionally `n_tokens`;
`MeanLossModel` is put around it and makes a LossSum of that. One that keeps to the contract itself says so by an
attribute `returns_loss_sum = True` and is used as it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jobs.errors import SettingError

IGNORE = -100  # a target of this value is no target; the convention of torch and transformers


class LossSum(NamedTuple):
    """loss_sum: fp32 scalar with a gradient. num_targets: scalar, how many targets the sum is over."""

    loss_sum: Tensor
    num_targets: Tensor


def count_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """How many targets of a batch count, as an int64 scalar on the batch's device: known before the forward pass.

    Targets of -100 and those whose `loss_mask` is 0 do not; without targets every sample counts as one."""
    if "targets" not in batch:
        first = next(iter(batch.values()))
        return torch.tensor(first.shape[0], dtype=torch.int64, device=first.device)
    counted = batch["targets"] != IGNORE
    if "loss_mask" in batch:
        counted = counted & (batch["loss_mask"] != 0)
    return counted.sum()


def read_loss(output: Any, batch: Mapping[str, Tensor]) -> LossSum:
    """The LossSum of whatever a forward under this contract returned for `batch`."""
    if isinstance(output, Tensor):
        return LossSum(output, count_targets(batch))
    loss_sum, count = output
    return LossSum(loss_sum, count)


class MeanLossModel(nn.Module):
    """Puts a model that returns a mean loss under the contract.

    The wrapped forward gets the batch as keyword arguments and returns a scalar mean, or a mapping (also an object with
    `.loss`) of `loss` and optionally `n_tokens`, the number that the mean is over; without it `count_targets` says.
    Raises SettingError if it returns anything else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> LossSum:
        output = self.model(**batch)
        loss, count = output, None
        if isinstance(output, Mapping):
            loss, count = output.get("loss"), output.get("n_tokens")
        elif not isinstance(output, Tensor):
            loss, count = getattr(output, "loss", None), getattr(output, "n_tokens", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise SettingError(
                f"model: forward of {type(self.model).__name__} returned {_shape(output)}; it must return a scalar mean"
                " loss, or a mapping with 'loss' and optionally 'n_tokens'"
            )
        if count is None:
            count = count_targets(batch)
        count = torch.as_tensor(count, device=loss.device)
        total = loss.float().reshape(()) * count
        # A mean over nothing is NaN, the sum over nothing is zero.
        return LossSum(torch.where(count > 0, total, torch.zeros_like(total)), count)


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a mapping with {', '.join(map(str, output)) or 'nothing in it'}"
    return f"a {type(output).__name__}"
