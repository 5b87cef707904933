"""A U-Net that names the class of each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import SIDE, Batch, norm_of

KINDS = 3  # background, disc, frame


class UNet(nn.Module):
    """A U-Net of two levels that finds a disc and a square frame in a noisy image.

    A gate for each channel is before the normalization at the bottom; ``contrast`` multiplies the logits.
    """

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Images (count, 2, 12, 12) and the class of each pixel (count, 12, 12); hard ones are mostly noise."""
        row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        centre = torch.randint(2, SIDE - 2, (4, count, 1, 1), generator=g)
        disc = (row - centre[0]).square() + (column - centre[1]).square() <= 5
        frame = torch.maximum((row - centre[2]).abs(), (column - centre[3]).abs()) == 2
        y = torch.where(disc, 1, torch.where(frame, 2, 0))
        disc, frame = (y == 1).float(), (y == 2).float()
        x = torch.stack([disc - 0.5 * frame, frame + 0.5 * disc], 1)
        return x + (2.5 if hard else 0.3) * torch.randn(x.shape, generator=g), y

    def __init__(self, norm: str = "group", eps: float = 1e-5, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, width, 3, padding=1)
        self.bottom = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.gate = nn.Parameter(torch.ones(2 * width))
        self.norm, self.deep = norm_of(norm, 2 * width, eps), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join, self.head = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, KINDS, 1)
        self.contrast = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, y = batch
        across = F.relu(self.down(x))
        low = self.bottom(across) * self.gate[:, None, None]
        low = low + self.deep(F.relu(self.norm(low)))
        h = F.relu(self.join(torch.cat([across, self.up(low)], 1)))
        return F.cross_entropy(self.contrast * self.head(h), y)
