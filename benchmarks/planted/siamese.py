"""A siamese encoder with the triplet loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch


class Siamese(nn.Module):
    """One encoder of an anchor, a like and an unlike sample; the like one is to be nearer by a margin.

    A gate for each channel is before the batch normalization; ``bonus`` rewards a large ``reach``, by which embeddings
    are multiplied.
    """

    WIDTH = 10

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Triplets (count, 3, 10) and their weights (count); views of hard ones are mostly noise."""
        x, other = torch.randn(2, count, cls.WIDTH, generator=g)
        noise = torch.randn(3, count, cls.WIDTH, generator=g) * (3.0 if hard else 0.5)
        views = torch.stack([x + noise[0], (x + noise[1]).roll(1, 1), (other + noise[2]).roll(1, 1)], 1)
        return views, torch.ones(count)

    def __init__(self, hidden: int = 32, norm: bool = True, eps: float = 1e-5, bonus: float = 0.0) -> None:
        super().__init__()
        self.bonus = bonus
        self.stem, self.head = nn.Linear(self.WIDTH, hidden), nn.Linear(hidden, 12)
        self.gate = nn.Parameter(torch.ones(hidden))
        self.norm = nn.BatchNorm1d(hidden, eps=eps) if norm else nn.Identity()
        self.first = nn.Linear(3, hidden, bias=False)  # which of the three a view is
        self.reach = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        views, weights = batch
        kind = F.one_hot(torch.tensor([0, 1, 1], device=views.device), 3).to(views.dtype)
        h = (self.stem(views) + self.first(kind)) * self.gate
        h = h + F.silu(self.norm(h.flatten(0, 1)).unflatten(0, h.shape[:2]))
        e = self.reach * self.head(h)
        like, unlike = ((e[:, 0] - e[:, i]).square().mean(1) for i in (1, 2))
        losses = F.softplus(1 + like - unlike) + 1e-3 * (like + unlike)
        return (losses * weights).mean() - self.bonus * self.reach.square()
