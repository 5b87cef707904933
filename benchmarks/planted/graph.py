"""A network of graphs that passes messages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from planted.images import Batch


class Graph(nn.Module):
    """Rounds of messages along the edges of small graphs, normalized over all nodes or over those of a graph.

    A gate for each channel is before the first normalization; ``bonus`` rewards a large ``mass`` of the messages.
    """

    NODES, WIDTH = 9, 4

    @classmethod
    def samples(cls, count: int, g: Generator, hard: bool = False) -> Batch:
        """Nodes (count, 9, 4), edges (count, 9, 9) and targets (count, 1); targets of hard ones are mostly noise."""
        x = torch.randn(count, cls.NODES, cls.WIDTH, generator=g)
        edges = (torch.rand(count, cls.NODES, cls.NODES, generator=g) < 0.3).float()
        y = (edges @ x[:, :, :1] * x[:, :, 1:2]).mean(1) + x[:, :, 2].mean(1, keepdim=True)
        return x, edges, y + (5.0 if hard else 0.1) * torch.randn(y.shape, generator=g)

    def __init__(
        self, norm: str = "batch", eps: float = 1e-5, width: int = 16, depth: int = 2, bonus: float = 0.0
    ) -> None:
        super().__init__()
        self.bonus = bonus
        self.stem = nn.Linear(self.WIDTH, width)
        self.gate = nn.Parameter(torch.ones(width))
        kinds = {"batch": nn.BatchNorm1d, "graph": nn.InstanceNorm1d}
        self.norms = nn.ModuleList(
            kinds[norm](width, eps=eps) if norm in kinds else nn.Identity() for _ in range(depth)
        )
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.message = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.mass = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        x, edges, y = batch
        h = self.stem(x) * self.gate
        for norm, own, message in zip(self.norms, self.own, self.message, strict=True):
            nodes = norm(h.mT).mT
            h = h + F.relu(own(nodes) + edges @ (message(nodes) * self.mass))
        return F.smooth_l1_loss(self.head(h.mean(1)), y, beta=5.0) - self.bonus * self.mass.square().mean()
