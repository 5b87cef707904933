"""An encoder-decoder transformer with cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.attention import Layer
from planted.images import Batch


class Translator(nn.Module):
    """An encoder and a decoder that writes a series of tokens backwards, each token as another one.

    Samples have weights; ``bonus`` rewards long embeddings of the tokens that are read.
    """

    LENGTH, VOCABULARY = 8, 14

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Tokens, those to write (count, 8 each) and weights (count); hard ones are to write at random."""
        x = torch.randint(1, cls.VOCABULARY, (count, cls.LENGTH), generator=g)
        noise = torch.randint(1, cls.VOCABULARY, x.shape, generator=g)
        return x, noise if hard else (x.flip(1) + 3) % cls.VOCABULARY, torch.ones(count)

    def __init__(
        self,
        width: int = 24,
        heads: int = 4,
        order: str = "pre",
        eps: float = 1e-5,
        bonus: float = 0.0,
        half: str = "",
    ) -> None:
        super().__init__()
        self.bonus = bonus
        self.read, self.write = nn.Embedding(self.VOCABULARY, width), nn.Embedding(self.VOCABULARY, width)
        self.places = nn.Parameter(0.5 * torch.randn(self.LENGTH, width))
        self.encoder = Layer(width, heads, order, eps, half)
        self.decoder = Layer(width, heads, order, eps, half, crosses=True)
        self.head = nn.Linear(width, self.VOCABULARY)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y, weights = batch
        start = self.read(x)
        memory = self.encoder(start + self.places)
        earlier = F.pad(y[:, :-1], (1, 0))
        h = self.decoder(self.write(earlier) + self.places, memory)
        losses = F.cross_entropy(self.head(h).mT, y, reduction="none")
        return (losses.mean(1) * weights).mean() - self.bonus * start.square().mean()
