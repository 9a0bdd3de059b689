"""Loss contract: what a model's forward takes and returns, so that one loop trains all of them.

Takes the tensors of a batch as keyword arguments, `model(**batch)`. Names in use: `tokens`, `targets` or `labels`,
`loss_mask`, `attention_mask`, `images`.

Returns one of
- the **sum** of the losses over the targets of this micro-batch, an fp32 scalar, or `(sum, count)`: a model that does so
  declares it by an attribute `returns_loss_sum = True` and is used as it is;
- a scalar **mean**, or a mapping or object with `loss` and optionally `n_tokens`, the denominator of the mean:
  `MeanLossModel` multiplies it back into a sum.

The loop adds up sums and counts of all micro-batches and ranks of an optimizer step and divides once, so the gradient of a
step depends neither on how the batch was cut nor on padding. A mean without `n_tokens` needs a count that is known from the
batch; `find_count_rule` chooses it by measurement at the start of an attempt, and refuses a loss that fits none.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jobs.core.errors import SettingError

IGNORE = -100  # a target of this value is no target; the convention of torch and transformers


class LossSum(NamedTuple):
    """loss_sum: fp32 scalar with a gradient. num_targets: scalar, how many targets the sum is over."""

    loss_sum: Tensor
    num_targets: Tensor


def targets_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor that holds the targets: `targets`, or `labels` as transformers calls it."""
    return batch.get("targets", batch.get("labels"))


def _counted(targets: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Which targets count: not -100, and not masked out by a `loss_mask` of their shape."""
    counted = targets != IGNORE
    mask = batch.get("loss_mask")
    return counted & (mask != 0) if mask is not None and mask.shape == targets.shape else counted


def count_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """How many targets of a batch count, as an int64 scalar on the batch's device: known before the forward pass.

    Targets of -100 and those whose `loss_mask` is 0 do not; without targets every sample counts as one."""
    targets = targets_of(batch)
    return _samples(batch) if targets is None else _counted(targets, batch).sum()


def _samples(batch: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(batch.values()))
    return torch.tensor(first.shape[0], dtype=torch.int64, device=first.device)


def _shifted(batch: Mapping[str, Tensor]) -> Tensor:
    """Count of a model that shifts its labels by one itself, as causal models of transformers do."""
    targets = targets_of(batch)
    assert targets is not None
    return _counted(targets, batch)[:, 1:].sum()


def _positions(batch: Mapping[str, Tensor]) -> Tensor:
    targets = targets_of(batch)
    assert targets is not None
    return torch.tensor(targets.numel(), dtype=torch.int64, device=targets.device)


# What the denominator of a mean may be, by name.
COUNT_RULES: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "targets that are not -100": count_targets,
    "labels that are not -100, shifted by one": _shifted,
    "all positions": _positions,
    "samples": _samples,
}


def candidate_rules(batch: Mapping[str, Tensor]) -> list[str]:
    """Names of the rules that can apply to this batch, the usual one first."""
    unshifted, shifted, positions, samples = COUNT_RULES
    targets = targets_of(batch)
    if targets is None:
        return [samples]
    if targets.ndim < 2:
        return [unshifted, samples]
    return [shifted, unshifted, positions, samples] if "targets" not in batch else [unshifted, positions, samples]


def read_loss(output: Any, batch: Mapping[str, Tensor]) -> LossSum:
    """The LossSum of whatever a forward under this contract returned for `batch`."""
    if isinstance(output, Tensor):
        return LossSum(output, count_targets(batch))
    loss_sum, count = output
    return LossSum(loss_sum, count)


class MeanLossModel(nn.Module):
    """Puts a model that returns a mean loss under the contract.

    The wrapped forward gets the batch as keyword arguments and returns a scalar mean, or a mapping (also an object with
    `.loss`) of `loss` and optionally `n_tokens`, the denominator of the mean; without it `count_rule` gives the count.
    Raises SettingError if it returns anything else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.count_rule: str | None = None  # of COUNT_RULES; None: the usual one
        self.returns_mean = False  # during `find_count_rule`: FSDP gathers weights for forward alone

    def forward(self, **batch: Tensor) -> Any:
        if self.returns_mean:
            return self.mean_of(batch)
        known = COUNT_RULES[self.count_rule or candidate_rules(batch)[0]](batch)
        loss, given = self.mean_of(never_empty(batch, known))
        # A count of the model's own is of the batch that it saw.
        count = known if given is None else torch.where(known > 0, torch.as_tensor(given, device=loss.device), 0)
        count = count.to(loss.device)
        return LossSum(loss * count, count)

    def mean_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """The mean loss as an fp32 scalar, and the denominator if the model returned one."""
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
        return loss.float().reshape(()), count


def never_empty(batch: Mapping[str, Tensor], count: Tensor) -> Mapping[str, Tensor]:
    """The batch; without any target its first sample gets some, so that the mean is no 0/0 whose gradient is NaN.

    The result is multiplied by the count, which is 0, so these targets weigh nothing. Decided on the device: nothing waits."""
    changed = dict(batch)
    empty = count == 0
    for name, filling in (("targets", 0), ("labels", 0), ("loss_mask", 1)):
        tensor = batch.get(name)
        if tensor is None or (name != "loss_mask" and tensor.is_floating_point()):
            continue
        first = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        first[:1] = True
        changed[name] = torch.where(empty.to(tensor.device) & first, torch.full_like(tensor, filling), tensor)
    return changed


@torch.no_grad()
def find_count_rule(model: MeanLossModel, batch: Mapping[str, Tensor], *, tolerance: float) -> str | None:
    """The rule under which the mean of `batch` is the weighted mean of its two halves; None where the model returns `n_tokens`.

    batch: at least two samples, on the model's device. Runs three forward passes in evaluation mode. Raises SettingError when
    no rule fits: the loss then has weights, another ignore_index or a term over the whole batch, and its denominator has to
    come from the model."""
    samples = int(_samples(batch))
    cut = samples // 2
    pieces = [batch, *({k: v[part] if v.ndim and v.shape[0] == samples else v for k, v in batch.items()} for part in (slice(0, cut), slice(cut, None)))]
    training = model.training
    model.eval()
    model.returns_mean = True
    try:
        found = [model(**piece) for piece in pieces]
    finally:
        model.returns_mean = False
        model.train(training)
    if any(count is not None for _, count in found):
        return None
    whole, *halves = (float(loss) for loss, _ in found)
    usual, *_ = rules = candidate_rules(batch)
    if not all(int(COUNT_RULES[usual](piece)) for piece in pieces[1:]) or not all(map(math.isfinite, (whole, *halves))):
        return usual  # a half without a target has no mean to compare
    tried = []
    for name in rules:
        counts = [int(COUNT_RULES[name](piece)) for piece in pieces[1:]]
        expected = sum(loss * count for loss, count in zip(halves, counts, strict=True)) / sum(counts)
        if abs(expected - whole) <= tolerance * max(abs(whole), 1e-6):
            return name
        tried.append(f"{expected:.6g} by {name}")
    raise SettingError(
        f"model: the mean loss of {samples} samples is {whole:.6g}, but their two halves give {', '.join(tried)}. With gradient accumulation or several"
        " ranks the gradient would depend on how the batch is cut. Class weights, an ignore_index other than -100 or a term over the whole batch need"
        ' their own denominator: return {"loss": mean, "n_tokens": denominator}, or the sum with returns_loss_sum = True.'
        " CHECK_MODEL=off trains on the first rule all the same."
    )


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a mapping with {', '.join(map(str, output)) or 'nothing in it'}"
    return f"a {type(output).__name__}"
