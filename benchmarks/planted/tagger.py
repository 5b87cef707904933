"""A recurrent network in both directions that tags each token of a series."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch


class Tagger(nn.Module):
    """A GRU or an LSTM in both directions, with layer normalization, that tags each token with what is around it.

    Readings of an instrument come with the tokens, and ``gate`` scales what goes into the normalization.
    """

    LENGTH, TOKENS, TAGS = 12, 9, 5

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Tokens (count, 12), readings (count, 12, 2) and tags (count, 12); tags of hard ones are random."""
        tokens = torch.randint(cls.TOKENS, (count, cls.LENGTH), generator=g)
        readings = torch.randn(count, cls.LENGTH, 2, generator=g)
        tags = (tokens + tokens.roll(1, 1) + (readings[..., 0] > 0)) % cls.TAGS
        noise = torch.randint(cls.TAGS, tags.shape, generator=g)
        return tokens, readings, noise if hard else tags

    def __init__(self, kind: str = "GRU", width: int = 16, norm: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.token = nn.Embedding(self.TOKENS, 8)
        self.body = getattr(nn, kind)(10, width, batch_first=True, bidirectional=True)
        self.gate = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(2 * width, eps=eps) if norm else nn.Identity()
        self.middle, self.head = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, self.TAGS)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        tokens, readings, tags = batch
        h = self.body(torch.cat([self.token(tokens), readings], 2))[0] * self.gate
        h = h + self.middle(self.norm(h))
        return F.cross_entropy(self.head(h).mT, tags)
