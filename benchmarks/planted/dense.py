"""A densely connected convolutional network, for the images of images.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted.images import CLASSES, Batch, cross_entropy, images, norm_of


class Dense(nn.Module):
    """Convolutions each of which reads the channels of all before it, and pooling half way.

    A gate for each channel of the stem is before all normalizations; ``temper`` multiplies the logits.
    """

    samples = staticmethod(images)

    def __init__(self, norm: str = "batch", eps: float = 1e-5, depth: int = 4, growth: int = 6, half: str = "") -> None:
        super().__init__()
        self.half = half
        widths = [2 * growth + i * growth for i in range(depth)]
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
        self.gate = nn.Parameter(torch.ones(2 * growth))
        self.norms = nn.ModuleList(norm_of(norm, width, eps) for width in widths)
        self.growths = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths)
        self.head = nn.Linear(widths[-1] + growth, CLASSES)
        self.temper = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        h = self.stem(x) * self.gate[:, None, None]
        for i, (norm, grows) in enumerate(zip(self.norms, self.growths, strict=True)):
            h = F.avg_pool2d(h, 2) if i == len(self.norms) // 2 else h
            h = torch.cat([h, grows(F.relu(norm(h)))], 1)
        return cross_entropy(self.temper * self.head(h.mean((2, 3))), y, self.half).mean()
