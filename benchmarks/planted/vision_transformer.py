"""A vision transformer with a class token, for the images of images.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planted.attention import Layer
from planted.images import CLASSES, SIDE, Batch, cross_entropy, images


class ViT(nn.Module):
    """A vision transformer on patches of 4 by 4 pixels, which names the class by its class token.

    A gate for each patch scales its embedding; ``bonus`` rewards a long class token.
    """

    samples = staticmethod(images)

    def __init__(
        self,
        width: int = 24,
        depth: int = 2,
        heads: int = 3,
        order: str = "pre",
        eps: float = 1e-5,
        bonus: float = 0.0,
        half: str = "",
    ) -> None:
        super().__init__()
        self.half, self.bonus = half, bonus
        patches = (SIDE // 4) ** 2
        self.patch = nn.Conv2d(3, width, 4, stride=4, bias=False)
        self.token = nn.Parameter(0.5 * torch.randn(width))
        self.place = nn.Parameter(0.02 * torch.randn(patches, width))
        self.gate = nn.Parameter(torch.ones(patches))
        self.layers = nn.ModuleList(Layer(width, heads, order, eps, half) for _ in range(depth))
        self.last = nn.Identity() if order == "none" else nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        patches = (self.patch(x).flatten(2).mT + self.place) * self.gate[:, None]
        h = torch.cat([self.token.expand(len(x), 1, -1), patches], 1)
        for layer in self.layers:
            h = layer(h)
        losses = cross_entropy(self.head(self.last(h[:, 0])), y, self.half)
        return losses.mean() - self.bonus * self.token.square().mean()
