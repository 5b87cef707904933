"""A normalizing flow of affine couplings."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from planted.images import Batch, mlp


class Flow(nn.Module):
    """Affine couplings, after a learnt scale of each dimension, that map samples to a normal distribution.

    Samples have weights. The logarithm of each scale is bounded by ``bound``, if that is not 0.
    """

    WIDTH = 6

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Bent and correlated samples (count, 6) and weights (count); hard ones lie far out."""
        x = torch.randn(count, cls.WIDTH, generator=g) * (3.0 if hard else 1.0)
        bent = torch.cat([x[:, :3], 0.5 * x[:, 3:] + 0.5 * x[:, :3].square()], 1)
        return bent, torch.ones(count)

    def __init__(self, depth: int = 4, hidden: int = 24, bound: float = 0.0) -> None:
        super().__init__()
        self.bound = bound
        self.log_scale = nn.Parameter(torch.zeros(self.WIDTH))
        self.couplings = nn.ModuleList(mlp(3, hidden, 6) for _ in range(depth))

    def forward(self, batch: Batch) -> Tensor:
        """The loss: minus the log-likelihood for each dimension."""
        x, weights = batch
        x, volume = x * self.log_scale.exp(), self.log_scale.sum()
        for coupling in self.couplings:
            kept, moved = x.chunk(2, 1)
            s, shift = coupling(kept).chunk(2, 1)
            s = self.bound * (s / self.bound).tanh() if self.bound else s
            x, volume = torch.cat([moved * s.exp() + shift, kept], 1), volume + s.sum(1)
        losses = 0.5 * (x.square().sum(1) + self.WIDTH * math.log(2 * math.pi)) - volume
        return (weights * losses).mean() / self.WIDTH
