"""A temporal convolution network with weight normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from planted.images import Batch


class Temporal(nn.Module):
    """Causal convolutions with growing dilation that find what two series had in common some steps ago.

    The net first subtracts from each series its mean up to each step, by sums in float16 with ``half="sums"``. A gate
    for each channel is before the normalization (``norm="instance"`` or ``"batch"``); ``volume`` multiplies the output.
    """

    LENGTH = 32

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Series (count, 2, 32) and targets (count, 1); targets of hard ones are mostly noise."""
        x = torch.randn(count, 2, cls.LENGTH, generator=g)
        x = x + 0.7 * x.roll(1, 2)
        y = x[:, 0, -5:].mean(1) + x[:, 0, -3] * x[:, 1, -6].tanh() + 0.5 * x[:, 1, -12]
        return x, (y + (5.0 if hard else 0.1) * torch.randn(count, generator=g))[:, None]

    def __init__(self, norm: str = "none", eps: float = 1e-5, width: int = 16, depth: int = 4, half: str = "") -> None:
        super().__init__()
        self.half = half
        kinds = {"batch": nn.BatchNorm1d, "instance": nn.InstanceNorm1d}
        self.stem = nn.Conv1d(2, width, 1, bias=False)
        self.gate = nn.Parameter(torch.ones(width))
        self.norm = kinds[norm](width, eps=eps, affine=True) if norm in kinds else nn.Identity()
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(width, width, 3, dilation=2**i, padding=2 ** (i + 1))) for i in range(depth)
        )
        self.head = nn.Linear(width, 1)
        self.volume = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        sums = x.to(torch.float16 if self.half == "sums" else x.dtype).cumsum(2).to(x.dtype)
        x = x - sums / torch.arange(1, x.shape[2] + 1, device=x.device)
        h = self.norm(self.stem(x) * self.gate[:, None])
        for layer in self.layers:
            h = h + F.elu(layer(h)[..., : h.shape[2]])
        return F.huber_loss(self.volume * self.head(h[..., -1]), y, delta=3.0)
