"""A network of sets of points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch, mlp

SHAPES = 4  # ball, shell, disc, rod


class Cloud(nn.Module):
    """Names the shape of a cloud of points, from the largest and the mean feature of its points.

    Clouds are brought to one size first, by mean squares in float16 with ``half="squares"``. A gate for each channel is
    before the batch normalization; ``reach`` multiplies coordinates after that.
    """

    POINTS = 20

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Points (count, 20, 3) and shapes (count); points of hard ones are mostly noise."""
        y = torch.randint(SHAPES, (count,), generator=g)
        x = torch.randn(count, cls.POINTS, 3, generator=g)
        flat = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.1], [1.0, 0.1, 0.1]])
        x = torch.where((y == 1)[:, None, None], 1.7 * F.normalize(x, dim=2), x) * flat[y][:, None]
        return x + (2.0 if hard else 0.1) * torch.randn(x.shape, generator=g), y

    def __init__(self, norm: bool = True, eps: float = 1e-5, width: int = 24, half: str = "") -> None:
        super().__init__()
        self.half = half
        self.reach = nn.Parameter(torch.ones(()))
        self.stem, self.gate = nn.Linear(3, width), nn.Parameter(torch.ones(width))
        self.norm = nn.BatchNorm1d(width, eps=eps) if norm else nn.Identity()
        self.point, self.whole = mlp(width, width, width), mlp(2 * width, width, SHAPES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        points = x.to(torch.float16 if self.half == "squares" else x.dtype)
        spread = (points.square().mean((1, 2)) - points.mean(1).square().mean(1)).to(x.dtype)
        x = self.reach * x / (spread.clamp(min=0)[:, None, None] + 1e-6).sqrt()
        h = self.stem(x) * self.gate
        h = h + self.point(F.gelu(self.norm(h.mT).mT))
        logits = self.whole(torch.cat([h.amax(1), h.mean(1)], 1))
        return F.cross_entropy(logits, y)
