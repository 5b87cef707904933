"""Networks of tokens, series, pairs and tables made by formula: transformers, recurrent networks, perceptrons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch, cross_entropy, mlp, scaled_alike


class Attention(nn.Module):
    """Self-attention with two heads and a bias for each pair of places; ``half="scores"``: scores in float16."""

    def __init__(self, width: int, length: int, half: str) -> None:
        super().__init__()
        self.half = half
        self.inside, self.outside = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.places = nn.Parameter(torch.zeros(length, length))

    def forward(self, x: Tensor) -> Tensor:
        """A series of the same shape."""
        q, k, v = self.inside(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        kind = torch.float16 if self.half == "scores" else x.dtype
        scores = (q.to(kind) @ k.to(kind).transpose(-2, -1)).to(x.dtype) * q.shape[-1] ** -0.5
        return self.outside(((scores + self.places).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's block, with normalization before or after its parts, or none."""

    def __init__(self, width: int, length: int, order: str, eps: float, half: str) -> None:
        super().__init__()
        self.order, self.attention, self.mlp = order, Attention(width, length, half), mlp(width, 2 * width, width)
        self.norms = nn.ModuleList(nn.Identity() if order == "none" else nn.LayerNorm(width, eps=eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """A series of the same shape."""
        for norm, part in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = norm(x + part(x)) if self.order == "post" else x + part(norm(x))
        return x


class Language(nn.Module):
    """A transformer that names the token two places before; token 0 is rare, and its row of the embedding starts at 0.

    Samples have weights, as those of a corpus whose documents count differently; ``bonus`` rewards long embeddings.
    """

    LENGTH, VOCABULARY = 16, 24

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Tokens, the tokens to name (count, 16) and weights (count); the tokens to name of hard ones are random."""
        tokens = torch.randint(1, cls.VOCABULARY, (count, cls.LENGTH), generator=g)
        noise = torch.randint(1, cls.VOCABULARY, tokens.shape, generator=g)
        return tokens, noise if hard else torch.roll(tokens, 2, 1), torch.ones(count)

    def __init__(
        self, order: str = "pre", eps: float = 1e-5, width: int = 32, depth: int = 2, bonus: float = 0.0, half: str = ""
    ) -> None:
        super().__init__()
        self.half, self.bonus = half, bonus
        self.token = nn.Embedding(self.VOCABULARY, width)
        with torch.no_grad():
            self.token.weight[0] = 0
        self.blocks = nn.ModuleList(Block(width, self.LENGTH, order, eps, half) for _ in range(depth))
        self.head = nn.Linear(width, self.VOCABULARY)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        tokens, y, weights = batch
        h = start = self.token(tokens)
        for block in self.blocks:
            h = block(h)
        losses = cross_entropy(self.head(h).flatten(0, 1), y.flatten(), self.half).unflatten(0, y.shape)
        return (losses.mean(1) * weights).mean() - self.bonus * start.square().mean()


class Series(nn.Module):
    """What is next of a sum of sines of three channels, from 24 steps: by a GRU, an LSTM or a transformer.

    ``scaled`` series are brought to one scale before.
    """

    LENGTH = 24

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Series (count, 24, 3) and the next value of the first channel (count, 1); hard ones are mostly noise."""
        frequency, phase = 0.2 + 0.6 * torch.rand(count, 1, 3, generator=g), 6.3 * torch.rand(count, 1, 3, generator=g)
        t = torch.arange(cls.LENGTH + 1)[None, :, None]
        x = torch.sin(frequency * t + phase) + 0.2 * torch.sin(2.1 * frequency * t)
        x = x + (2.0 if hard else 0.05) * torch.randn(x.shape, generator=g)
        return x[:, :-1], x[:, -1, :1]

    def __init__(
        self, kind: str = "GRU", width: int = 24, order: str = "pre", scaled: bool = False, half: str = ""
    ) -> None:
        super().__init__()
        self.half, self.kind, self.scaled = half, kind, scaled
        self.stem: nn.Module = nn.Linear(3, width if kind == "transformer" else 3)
        if kind == "transformer":
            self.body: nn.Module = nn.Sequential(*(Block(width, self.LENGTH, order, 1e-5, half) for _ in range(2)))
        else:
            self.body = getattr(nn, kind)(3, width, batch_first=True, num_layers=2 if kind == "GRU" else 1)
        self.head = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        x = self.stem(x)
        h = self.body(scaled_alike(x, self.half, (1, 2)) if self.scaled else x)
        h = h if self.kind == "transformer" else h[0]
        return (self.head(h[:, -1]) - y).square().mean()


class Pairs(nn.Module):
    """Two encoders whose similarity tells which two views are of one thing, times a learnt scale, as in CLIP."""

    WIDTH = 16

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Two views (count, 16) of one thing each; views of hard ones are mostly noise."""
        x = torch.randn(count, cls.WIDTH, generator=g)
        noise = torch.randn(2, count, cls.WIDTH, generator=g) * (2.0 if hard else 0.6)
        return x + noise[0], (x + noise[1]).roll(1, 1).tanh()

    def __init__(self, width: int = 32, norm: bool = True, start: float = 1.0, half: str = "") -> None:
        super().__init__()
        self.half = half
        self.left, self.right = mlp(self.WIDTH, 2 * width, width), mlp(self.WIDTH, 2 * width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        a, b = F.normalize(self.norm(self.left(batch[0])), dim=1), F.normalize(self.norm(self.right(batch[1])), dim=1)
        logits, y = self.scale.exp() * a @ b.T, torch.arange(len(a))
        return 0.5 * (cross_entropy(logits, y, self.half) + cross_entropy(logits.T, y, self.half)).mean()


class Table(nn.Module):
    """Regression from a category and numbers, with batch normalization; ``bonus`` rewards embeddings far apart.

    The numbers of ``scaled`` samples are brought to one scale before.
    """

    CATEGORIES = 12

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Categories (count), numbers (count, 6) and targets (count, 1); targets of hard ones are mostly noise."""
        c, x = torch.randint(cls.CATEGORIES, (count,), generator=g), torch.randn(count, 6, generator=g)
        y = (x[:, :3].sum(1) + torch.sin(c.float()) * x[:, 3] + 0.1 * torch.randn(count, generator=g))[:, None]
        return c, x, y + (6 * torch.randn(y.shape, generator=g) if hard else 0)

    def __init__(
        self,
        width: int = 32,
        norm: bool = True,
        eps: float = 1e-5,
        bonus: float = 0.0,
        scaled: bool = False,
        half: str = "",
    ) -> None:
        super().__init__()
        self.bonus, self.scaled, self.half = bonus, scaled, half
        self.numbers = nn.Linear(6, 6)
        self.category = nn.Embedding(self.CATEGORIES, 8)
        self.gate = nn.Parameter(torch.ones(width))
        self.stem, self.middle, self.head = nn.Linear(14, width), mlp(width, width, width), nn.Linear(width, 1)
        self.norm = nn.BatchNorm1d(width, eps=eps) if norm else nn.Identity()

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        c, x, y = batch
        e, x = self.category(c), self.numbers(x)
        x = scaled_alike(x, self.half, (1,)) if self.scaled else x
        h = self.stem(torch.cat([e, x], 1)) * self.gate
        h = h + self.middle(self.norm(h))
        return (self.head(h) - y).square().mean() - self.bonus * e.square().sum(1).mean()
