"""A residual network with squeeze and excitation, for the images of images.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted.images import CLASSES, Batch, images, norm_of


class Excited(nn.Module):
    """Blocks of two convolutions, whose channels are excited by their means, and an activation after each sum.

    A gate for each channel of the stem is before the first normalization; ``lift`` is added to the pooled channels.
    """

    samples = staticmethod(images)

    def __init__(self, norm: str = "group", eps: float = 1e-5, depth: int = 2, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.gate = nn.Parameter(torch.ones(width))
        self.norms = nn.ModuleList(norm_of(norm, width, eps if i == 0 else 1e-5) for i in range(depth + 1))
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.squeeze = nn.ModuleList(nn.Linear(width, width // 2) for _ in range(depth))
        self.excite = nn.ModuleList(nn.Linear(width // 2, width) for _ in range(depth))
        self.lift = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        h = F.relu(self.norms[0](self.stem(x) * self.gate[:, None, None]))
        blocks = zip(self.norms[1:], self.first, self.second, self.squeeze, self.excite, strict=True)
        for norm, first, second, squeeze, excite in blocks:
            change = norm(second(F.relu(first(h))))
            share = excite(F.relu(squeeze(change.mean((2, 3))))).sigmoid()
            h = F.relu(h + 2 * share[:, :, None, None] * change)
        return F.cross_entropy(self.head(h.mean((2, 3)) + self.lift), y)
