"""A small convolutional classifier: the workload that is no language model, with BatchNorm and images in it."""

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """images float [B, channels, H, W], targets int64 [B] -> sum of cross entropies (train/models/contract.py).

    BatchNorm normalises over the images of one process: unlike the rest of the result, its running means depend on how
    the batch is spread over processes."""

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._stage(channels, width),
            *self._stage(width, 2 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images).float(), targets, reduction="sum")

    def logits(self, images: Tensor) -> Tensor:
        """[B, num_classes]."""
        return self.head(self.features(images))  # type: ignore[no-any-return]
