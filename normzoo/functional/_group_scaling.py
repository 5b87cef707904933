"""Division of each position by its root mean square over groups of channels, as power normalization does first."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo._shapes import statistics_dtype

# Channels of a group below which adding them one by one is faster than the kernel for sums.
FEW = 8
# Channels of a group from which on the factors are kept for backward: they are one value for each group.
KEPT = 8


@dataclass(frozen=True, eq=False)
class GroupScaling:
    """``u = x * factor``, ``factor = 1 / sqrt(mean(x^2) + eps)`` over each position's groups of consecutive channels.

    A formula for ``_pieces.by_sample``; power normalization also calls its parts.
    """

    groups: int
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(statistics_dtype(x))
        return self.scaled(wide, self.factor(wide))

    def write(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Put the result into ``y``."""
        factor = self.factor(x)
        torch.mul(self._grouped(x), factor, out=self._grouped(y))
        return (factor,) if self.keeps(x) else ()

    def vjp(
        self, x: Tensor, dy: Tensor, *, kept: tuple[Tensor, ...], out: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient for x."""
        (factor,) = kept or (self.factor(x),)
        return self.pulled_back(dy.clone(), self.scaled(x, factor), factor, out), []

    def keeps(self, x: Tensor) -> bool:
        """Whether the factors are few enough to be kept beside x."""
        return x.shape[1] >= KEPT * self.groups

    def factor(self, x: Tensor) -> Tensor:
        """(N, groups, 1, ...) of (N, C, ...) in float32 or wider."""
        squares = self._grouped(x).square()
        return (_over_group(squares) / squares.shape[2] + self.eps).rsqrt()

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """U, of the shape of x."""
        return (self._grouped(x) * factor).flatten(1, 2)

    def pulled_back(self, du: Tensor, u: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient for x, in ``out`` if given, from that for u, which is overwritten."""
        du, u = self._grouped(du), self._grouped(u)
        along = _over_group(du * u) / -u.shape[2]
        du.addcmul_(u, along)
        return torch.mul(du, factor, out=None if out is None else self._grouped(out)).flatten(1, 2)

    def _grouped(self, x: Tensor) -> Tensor:
        """(N, groups, C / groups, ...), a view."""
        return x.unflatten(1, (self.groups, -1))


def _over_group(v: Tensor) -> Tensor:
    """The sum over dimension 2, which is kept."""
    if v.shape[2] < FEW:
        return functools.reduce(torch.add, v.unbind(2)).unsqueeze(2)
    return v.sum(2, keepdim=True)
