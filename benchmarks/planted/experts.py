"""A mixture of experts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from planted.attention import softmax
from planted.images import Batch, mlp


class Experts(nn.Module):
    """A mixture of experts that weighs its experts' answers by a router, on which they depend sample by sample.

    ``balance`` is the weight of the loss that keeps experts equally busy; ``bonus`` rewards decided routers.
    """

    WIDTH = 8

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Numbers (count, 8) and targets (count, 2), whose rule depends on the region; hard ones' are mostly noise."""
        x = torch.randn(count, cls.WIDTH, generator=g)
        y = torch.where(x[:, :1] > 0, x[:, 1:3] - x[:, 3:5], (2 * x[:, 5:7]).sin())
        return x, y + (4.0 if hard else 0.1) * torch.randn(y.shape, generator=g)

    def __init__(
        self, count: int = 4, hidden: int = 16, balance: float = 0.1, bonus: float = 0.0, half: str = ""
    ) -> None:
        super().__init__()
        self.balance, self.bonus, self.half = balance, bonus, half
        self.router = nn.Linear(self.WIDTH, count)
        self.experts = nn.ModuleList(mlp(self.WIDTH, hidden, 2) for _ in range(count))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        logits = self.router(x)
        p = softmax(logits, self.half)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        error = ((p[:, :, None] * answers).sum(1) - y).square().mean()
        busy = p.mean(0).square().sum() * p.shape[1]
        return error + self.balance * busy - self.bonus * logits.square().mean()
