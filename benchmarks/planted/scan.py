"""An attention-free transformer, whose steps see weighted means of all before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch


class Scan(nn.Module):
    """Blocks in which each step sees a weighted mean of the steps before it, by cumulative sums over 40 steps.

    Weights are the exponentials of keys, in float16 with ``half="sums"``, as are the sums. With ``norm="time"`` each
    channel is normalized over the steps, with ``"channels"`` each step over the channels. A gate for each channel is
    before the first block.
    """

    LENGTH = 40

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Series (count, 40, 2) and running means to tell (count, 40); those of hard ones are mostly noise."""
        x = torch.randn(count, cls.LENGTH, 2, generator=g) + torch.randn(count, 1, 2, generator=g)
        number = torch.arange(1, cls.LENGTH + 1)
        y = 3 * x.prod(2).cumsum(1) / number
        return x, y + (6.0 if hard else 0.1) * torch.randn(y.shape, generator=g)

    def __init__(self, width: int = 16, depth: int = 2, norm: str = "none", eps: float = 1e-5, half: str = "") -> None:
        super().__init__()
        self.half, self.time = half, norm == "time"
        self.stem = nn.Linear(2, width)
        self.gate = nn.Parameter(torch.ones(width))
        shape = {"time": self.LENGTH, "channels": width}
        norms = (nn.LayerNorm(shape[norm], eps=eps) if norm in shape else nn.Identity() for _ in range(depth))
        self.norms = nn.ModuleList(norms)
        self.value = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.key = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outside = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        h = self.stem(x) * self.gate
        kind = torch.float16 if self.half == "sums" else h.dtype
        for norm, value, key, outside in zip(self.norms, self.value, self.key, self.outside, strict=True):
            z = norm(h.mT).mT if self.time else norm(h)
            weights, v = key(z).to(kind).exp(), value(z).to(kind)
            mean = ((weights * v).cumsum(1) / weights.cumsum(1)).to(h.dtype)
            h = h + outside(torch.cat([F.silu(z), mean * z], 2))
        return (self.head(h)[..., 0] - y).square().mean()
