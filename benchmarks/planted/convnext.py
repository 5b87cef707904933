"""A ConvNeXt-like network, for the images of images.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted.images import CLASSES, Batch, cross_entropy, images, norm_of


class LayerNorm2d(nn.Module):
    """Layer normalization over the channels of each pixel of (N, C, H, W)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvNext(nn.Module):
    """Blocks of a depthwise convolution, a normalization, two convolutions of 1 by 1 and a learnt scale of channels.

    Gates scale the stem's channels, each gate as many neighbours.
    """

    samples = staticmethod(images)

    def __init__(
        self,
        norm: str = "pixel",
        eps: float = 1e-5,
        depth: int = 3,
        width: int = 16,
        gates: int = 16,
        scale: float = 0.3,
        half: str = "",
    ) -> None:
        super().__init__()
        self.half, self.each = half, width // gates
        self.stem = nn.Conv2d(3, width, 2, stride=2, bias=False)
        self.gate = nn.Parameter(torch.ones(gates))
        self.first = LayerNorm2d(width, eps) if norm == "pixel" else norm_of(norm, width, eps)
        kinds = [LayerNorm2d(width, 1e-5) if norm == "pixel" else norm_of(norm, width, 1e-5) for _ in range(depth)]
        self.norms = nn.ModuleList(kinds)
        self.depthwise = nn.ModuleList(nn.Conv2d(width, width, 5, padding=2, groups=width) for _ in range(depth))
        self.wide = nn.ModuleList(nn.Conv2d(width, 3 * width, 1) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Conv2d(3 * width, width, 1) for _ in range(depth))
        self.scale = nn.ParameterList(nn.Parameter(torch.full((width, 1, 1), scale)) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        x = self.stem(x) * self.gate.repeat_interleave(self.each)[:, None, None]
        h = x + self.first(x)
        blocks = zip(self.depthwise, self.norms, self.wide, self.narrow, self.scale, strict=True)
        for depthwise, norm, wide, narrow, scale in blocks:
            h = h + scale * narrow(F.gelu(wide(norm(depthwise(h)))))
        return cross_entropy(self.head(h.mean((2, 3))), y, self.half).mean()
