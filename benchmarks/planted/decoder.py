"""A decoder-only transformer with rotary places, root mean square normalization and gated units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch


class Decoder(nn.Module):
    """A transformer that continues arithmetic progressions of tokens, whose samples have weights.

    Token 0 is rare, and its row of the embedding starts at 0. ``sink`` is the score that every place gives to nothing;
    ``last=False`` leaves the last normalization out.
    """

    LENGTH, VOCABULARY = 12, 18

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Tokens, those that follow (count, 12 each) and weights (count); hard ones are followed by random ones."""
        start, step = torch.randint(1, cls.VOCABULARY, (2, count, 1), generator=g)
        tokens = 1 + (start + step * torch.arange(cls.LENGTH + 1)) % (cls.VOCABULARY - 1)
        noise = torch.randint(1, cls.VOCABULARY, (count, cls.LENGTH), generator=g)
        return tokens[:, :-1].contiguous(), noise if hard else tokens[:, 1:].contiguous(), torch.ones(count)

    def __init__(
        self,
        width: int = 24,
        depth: int = 2,
        heads: int = 2,
        eps: float = 1e-5,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(self.VOCABULARY, width)
        with torch.no_grad():
            self.token.weight[0] = 0
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=eps) for _ in range(2 * depth))
        self.inside = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(depth))
        self.outside = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(depth))
        self.sink = nn.Parameter(torch.zeros(depth))
        self.last = nn.RMSNorm(width, eps=1e-5) if last else nn.Identity()
        self.head = nn.Linear(width, self.VOCABULARY, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        tokens, following, weights = batch
        h = self.token(tokens)
        for i, (inside, outside, up, down) in enumerate(
            zip(self.inside, self.outside, self.up, self.down, strict=True)
        ):
            q, k, v = inside(self.norms[2 * i](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = rotated(q) @ rotated(k).mT * q.shape[-1] ** -0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            nothing = self.sink[i].expand(*scores.shape[:-1], 1)
            shares = torch.cat([scores.masked_fill(later, -torch.inf), nothing], -1).softmax(-1)[..., :-1]
            h = h + outside((shares @ v).transpose(1, 2).flatten(2))
            value, gate = up(self.norms[2 * i + 1](h)).chunk(2, -1)
            h = h + down(value * F.silu(gate))
        losses = F.cross_entropy(self.head(self.last(h)).mT, following, reduction="none")
        return (losses.mean(1) * weights).mean()


def rotated(x: Tensor) -> Tensor:
    """Queries or keys (N, heads, T, C), each pair of channels turned by an angle that grows with the place."""
    half = x.shape[-1] // 2
    rates = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
