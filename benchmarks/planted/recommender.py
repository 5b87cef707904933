"""A recommender by factors of users and things."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch, mlp


class Recommender(nn.Module):
    """Whether a user takes a thing, by the product of their factors and by a network of these and the circumstances.

    Samples have weights. A gate for each channel of the network is before its batch normalization; ``bonus`` rewards
    long factors of things. With ``half="softplus"`` the loss is its plain formula in float16.
    """

    USERS, THINGS = 15, 11

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Circumstances (count, 4), users, things, what was taken, and weights (count each); hard ones are random."""
        x = torch.randn(count, 4, generator=g)
        users = torch.randint(cls.USERS, (count,), generator=g)
        things = torch.randint(cls.THINGS, (count,), generator=g)
        likes = 2 * torch.cos(users * things * 1.3) + x[:, 0] + 0.5 * x[:, 1] * x[:, 2]
        noise = torch.randn(count, generator=g)
        return x, users, things, ((noise if hard else likes + 0.2 * noise) > 0).float(), torch.ones(count)

    def __init__(
        self,
        rank: int = 6,
        width: int = 24,
        norm: bool = True,
        eps: float = 1e-5,
        sharp: float = 1.0,
        half: str = "",
        bonus: float = 0.0,
    ) -> None:
        super().__init__()
        self.half, self.bonus, self.sharp = half, bonus, sharp
        self.user, self.thing = nn.Embedding(self.USERS, rank), nn.Embedding(self.THINGS, rank)
        self.stem, self.gate = nn.Linear(2 * rank + 4, width), nn.Parameter(torch.ones(width))
        self.norm = nn.BatchNorm1d(width, eps=eps) if norm else nn.Identity()
        self.middle, self.head = mlp(width, width, width), nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, users, things, taken, weights = batch
        u, v = self.user(users), self.thing(things)
        h = self.stem(torch.cat([u, v, x], 1)) * self.gate
        h = h + self.middle(self.norm(h))
        z = self.sharp * ((u * v).sum(1) + self.head(h)[:, 0])
        ways = z.half().exp().add(1).log().to(z.dtype) if self.half == "softplus" else F.softplus(z)
        return ((ways - taken * z) * weights).mean() - self.bonus * v.square().mean()
