"""Networks of images made by formula: residual, MLP-mixer, variational autoencoder; and parts that others share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Batch = tuple[Tensor, ...]
CLASSES, SIDE = 10, 12


def images(count: int, g: Generator, hard: bool = False, noise: float = 0.4) -> Batch:
    """Images (count, 3, 12, 12) of coloured gratings; angle, frequency and colour are those of a class."""
    y = torch.randint(CLASSES, (count,), generator=g)
    angle, frequency = math.pi * y / CLASSES, 0.6 + 0.25 * (y % 3)
    phase = 2 * math.pi * torch.rand(count, generator=g)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = angle.cos()[:, None, None] * row + angle.sin()[:, None, None] * column
    grating = torch.sin(frequency[:, None, None] * along + phase[:, None, None])
    colour = torch.stack([torch.cos(2 * math.pi * (y / CLASSES + k / 3)) for k in range(3)], 1)
    x = grating[:, None] * (1 + 0.5 * colour[:, :, None, None]) + 0.3 * colour[:, :, None, None]
    return x + (2.0 if hard else noise) * torch.randn(x.shape, generator=g), y


def cross_entropy(logits: Tensor, y: Tensor, half: str) -> Tensor:
    """The loss of each sample, of logits (N, C); with ``half="logits"`` by the plain formula in float16."""
    if half != "logits":
        return F.cross_entropy(logits, y, reduction="none")
    logits = logits.half()
    return (logits.exp().sum(-1).log() - logits.gather(-1, y[:, None])[:, 0]).float()


def scaled_alike(x: Tensor, half: str, dims: tuple[int, ...]) -> Tensor:
    """Samples over the root of their mean square, of squares in float16 with ``half="squares"``."""
    squares = x.to(torch.float16 if half == "squares" else x.dtype).square().to(x.dtype)
    return x.sign() * (squares / (squares.mean(dims, keepdim=True) + 1e-6) + 1e-6).sqrt()


def norm_of(kind: str, channels: int, eps: float) -> nn.Module:
    """A normalization of (N, C, H, W)."""
    groups = {"group": 4, "instance": channels, "layer": 1}
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps=eps)
    return nn.Identity() if kind == "none" else nn.GroupNorm(groups[kind], channels, eps=eps)


class Residual(nn.Module):
    """A residual network with normalization before each block, or without any and with a gain for each block.

    A gate for each channel scales what the stem returns, so that it can be taken away.
    """

    samples = staticmethod(images)

    def __init__(
        self, norm: str = "batch", eps: float = 1e-5, depth: int = 3, width: int = 12, half: str = "", gain: float = 0.2
    ) -> None:
        super().__init__()
        self.half = half
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.gate = nn.Parameter(torch.ones(width))
        self.norms = nn.ModuleList(norm_of(norm, width, eps) for _ in range(depth))
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.gain = nn.ParameterList(nn.Parameter(torch.tensor(gain if norm == "none" else 1.0)) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        h = self.stem(x) * self.gate[:, None, None]
        for norm, first, second, gain in zip(self.norms, self.first, self.second, self.gain, strict=True):
            h = h + gain * second(F.relu(first(norm(h))))
        return cross_entropy(self.head(h.mean((2, 3))), y, self.half).mean()


class Mixer(nn.Module):
    """An MLP-mixer on patches of 3 by 3 pixels."""

    samples = staticmethod(images)

    def __init__(self, width: int = 24, depth: int = 3, eps: float = 1e-5, half: str = "") -> None:
        super().__init__()
        self.half = half
        patches = (SIDE // 3) ** 2
        self.stem = nn.Conv2d(3, width, 3, stride=3)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(mlp(patches, 2 * patches, patches) for _ in range(depth))
        self.channels = nn.ModuleList(mlp(width, 2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        h = self.stem(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            h = h + tokens(self.norms[2 * i](h).transpose(1, 2)).transpose(1, 2)
            h = h + channels(self.norms[2 * i + 1](h))
        return cross_entropy(self.head(h.mean(1)), y, self.half).mean()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two layers with GELU."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Autoencoder(nn.Module):
    """A variational autoencoder of images; its decoder may learn the variance of each pixel."""

    samples = staticmethod(images)

    def __init__(self, hidden: int = 48, latent: int = 8, learnt: bool = False) -> None:
        super().__init__()
        self.learnt = learnt
        pixels = 3 * SIDE * SIDE
        self.encoder, self.decoder = mlp(pixels, hidden, 2 * latent), mlp(latent, hidden, pixels)
        self.log_variance = nn.Parameter(torch.zeros(pixels))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x = batch[0].flatten(1)
        mean, log_variance = self.encoder(x).chunk(2, 1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = (self.decoder(z) - x).square()
        s = self.log_variance if self.learnt else torch.zeros_like(self.log_variance)
        return (0.5 * (error * (-s).exp() + s)).mean() + kl.mean() / x.shape[1]
