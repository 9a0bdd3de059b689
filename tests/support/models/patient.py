"""A model whose steps take as long as they are told and no processor: for tests of what happens at a certain time."""

import time
from typing import Any

from torch import nn

from train.models.registry import build_model


def build(vocab_size: int, seq_len: int, pause: float = 0.0, **options: Any) -> nn.Module:
    """The preset nano; each forward pass waits `pause` seconds first."""
    model = build_model("nano", vocab_size=vocab_size, seq_len=seq_len, overrides=options)
    model.returns_loss_sum = True
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(pause))
    return model
