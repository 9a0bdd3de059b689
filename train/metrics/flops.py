"""Model FLOPs: the one home of the count that speeds are told in."""

from collections.abc import Mapping

import torch
from torch import nn


def flops_per_sample(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[float | None, str]:
    """FLOPs of one sample, forward and backward, and the formula behind them; None where no formula would be right.

    `batch` is one of the model's, for the length of its samples. Padding counts, activations that are computed again do not."""
    tokens = batch.get("tokens")
    if tokens is None or tokens.ndim != 2:
        return None, "not counted: samples are no rows of tokens, and a weight may be used any number of times for one"
    length = tokens.shape[1]
    counted = getattr(model, "flops_per_token", None)
    if counted is not None:
        per_token = float(counted(length))
        formula = "6 N + 6 L d T (N: blocks and head; causal attention)"
    else:
        per_token = 6.0 * sum(p.numel() for p in model.parameters())
        formula = "6 N (N: all parameters; attention not counted)"
    return per_token * length, f"{_engineering(per_token)}FLOP per token = {formula}"


def _engineering(number: float) -> str:
    """7.73 G for 7,730,000,000."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:,.0f} "
