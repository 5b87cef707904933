"""A perceiver: a few latent vectors read an array, again and again with the same weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.attention import CrossAttention
from planted.images import Batch, mlp


class Perceiver(nn.Module):
    """Latent vectors that attend to an array of readings, then to each other, as often as ``turns`` says.

    Normalization is before the parts (``order="pre"``), after each sum (``"post"``), or nowhere (``"none"``). A gate
    for each latent vector scales it at the start; ``bonus`` rewards long latent vectors.
    """

    LENGTH, LATENTS = 14, 5

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Readings (count, 14, 3) and targets (count, 2), of which those of hard ones are mostly noise.

        A target is the reading of the first channel where the second is largest, and the mean of the third.
        """
        x = torch.randn(count, cls.LENGTH, 3, generator=g)
        where = x[:, :, 1].argmax(1)
        y = torch.stack([x[torch.arange(count), where, 0], 2 * x[:, :, 2].mean(1)], 1)
        return x, y + (5.0 if hard else 0.05) * torch.randn(y.shape, generator=g)

    def __init__(
        self,
        width: int = 24,
        heads: int = 2,
        turns: int = 2,
        order: str = "pre",
        eps: float = 1e-5,
        half: str = "",
        bonus: float = 0.0,
    ) -> None:
        super().__init__()
        self.order, self.turns, self.bonus = order, turns, bonus
        self.reading = nn.Linear(3, width)
        self.place = nn.Parameter(0.2 * torch.randn(self.LENGTH, width))
        self.latent = nn.Parameter(0.5 * torch.randn(self.LATENTS, width))
        self.gate = nn.Parameter(torch.ones(self.LATENTS))
        self.reads = CrossAttention(width, heads, half)
        self.own = CrossAttention(width, heads, half)
        self.mlp = mlp(width, 2 * width, width)
        kinds = [nn.Identity() if order == "none" else nn.LayerNorm(width, eps=eps) for _ in range(3)]
        self.norms = nn.ModuleList(kinds)
        self.head = nn.Linear(width, 2)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        array = self.reading(x) + self.place
        h = (self.latent * self.gate[:, None]).expand(len(x), -1, -1)
        for _ in range(self.turns):
            parts = (lambda s: self.reads(s, array), lambda s: self.own(s, s), self.mlp)
            for norm, part in zip(self.norms, parts, strict=True):
                h = norm(h + part(h)) if self.order == "post" else h + part(norm(h))
        said = self.head(h.mean(1))
        return F.smooth_l1_loss(said, y, beta=2.0) - self.bonus * self.latent.square().mean()
