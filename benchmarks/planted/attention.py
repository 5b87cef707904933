"""Attention with several heads from one series to another, and a block of a transformer made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from planted.images import mlp


class CrossAttention(nn.Module):
    """Attention of a series to another one, or to itself.

    With ``half="scores"`` the scores are in float16, with ``half="exp"`` the softmax is its plain formula in float16.
    """

    def __init__(self, width: int, heads: int, half: str = "") -> None:
        super().__init__()
        self.heads, self.half = heads, half
        self.query, self.memory, self.outside = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """A series of the shape of x (N, T, C); memory is (N, S, C)."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.memory(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        kind = torch.float16 if self.half == "scores" else x.dtype
        scores = (q.to(kind) @ k.to(kind).mT).to(x.dtype) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return self.outside((softmax(scores, self.half) @ v).transpose(1, 2).flatten(2))


def softmax(scores: Tensor, half: str) -> Tensor:
    """Softmax over the last axis; with ``half="exp"`` by the plain formula in float16."""
    if half != "exp":
        return scores.softmax(-1)
    weights = scores.half().exp()
    return (weights / weights.sum(-1, keepdim=True)).to(scores.dtype)


class Layer(nn.Module):
    """A transformer's layer that attends to its own series, then to another one if there is one.

    Normalization is before the parts (``order="pre"``), after each sum (``"post"``), or nowhere (``"none"``).
    """

    def __init__(self, width: int, heads: int, order: str, eps: float, half: str, crosses: bool = False) -> None:
        super().__init__()
        self.order = order
        self.own, self.mlp = CrossAttention(width, heads, half), mlp(width, 2 * width, width)
        self.cross = CrossAttention(width, heads, half) if crosses else None
        self.norms = nn.ModuleList(nn.Identity() if order == "none" else nn.LayerNorm(width, eps=eps) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """A series of the shape of x; that of a layer with a memory is causal."""
        cross = self.cross
        parts: list[Callable[[Tensor], Tensor]] = [lambda h: self.own(h, h, causal=cross is not None), self.mlp]
        if cross is not None:
            parts.insert(1, lambda h: cross(h, memory))
        for norm, part in zip(self.norms, parts, strict=False):
            x = norm(x + part(x)) if self.order == "post" else x + part(norm(x))
        return x
