"""Ghost batch normalization (Hoffer, Hubara & Soudry 2017, arXiv 1705.08741)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import positions
from normzoo.functional._channel_affine import channel_affine
from normzoo.functional.batch import batch_norm, update_running


def ghost_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ghost_size: int = 32,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalization of virtual batches of ``ghost_size`` consecutive samples; the last one may be smaller.

    The running statistics move by ``momentum`` towards the average of the virtual batches' means and unbiased
    variances, once for each batch.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        ghost_size: samples of a virtual batch.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training, if a virtual batch has one value per channel.

    Source: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, algorithm 1.
    """
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    n, space = x.shape[0], positions(x)
    smallest = n % ghost_size or min(n, ghost_size)
    if smallest * space == 1:
        raise ValueError(
            f"with ghost_size={ghost_size} a virtual batch has one value per channel of the input of shape "
            f"{tuple(x.shape)}, whose variance is undefined; choose another ghost_size or batch size"
        )
    y, (held,) = channel_affine(x, _Ghosts(ghost_size, eps), weight, bias, sample=True)
    means, variances = zip(*_ghost_moments(held.mean, held.var, ghost_size, space), strict=True)
    if running_mean is not None:
        update_running(running_mean, torch.cat(means).mean(0), momentum)
    if running_var is not None:
        update_running(running_var, torch.cat(variances).mean(0), momentum)
    return y


def _ghosts(v: Tensor, ghost_size: int) -> Iterator[Tensor]:
    """(N, C) as one (ghosts, ghost_size, C) of the full virtual batches and one (1, rest, C)."""
    full = v.shape[0] // ghost_size * ghost_size
    if full:
        yield v[:full].reshape(-1, ghost_size, v.shape[1])
    if full < v.shape[0]:
        yield v[None, full:]


def _ghost_moments(mean: Tensor, var: Tensor, ghost_size: int, space: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Means and unbiased variances, each (ghosts, C), of the full virtual batches and of the rest."""
    for m, v in zip(_ghosts(mean, ghost_size), _ghosts(var, ghost_size), strict=True):
        count = m.shape[1] * space
        whole = m.mean(1, keepdim=True)
        yield whole.squeeze(1), (v + (m - whole).square()).mean(1) * (count / (count - 1))


@dataclass(frozen=True)
class _Ghosts:
    """Each virtual batch by its mean and biased variance."""

    ghost_size: int
    eps: float

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        offset, rstd = self._standardize(mean, var)
        scale = rstd if weight is None else rstd * weight
        shift = offset * scale
        return scale, shift if bias is None else shift + bias

    def _standardize(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The samples' means less their virtual batch's, and 1 / std of that, both (N, C)."""
        offset = mean - self._average(mean)
        return offset, (self._average(torch.addcmul(var, offset, offset)) + self.eps).rsqrt()

    def _average(self, v: Tensor) -> Tensor:
        """Each virtual batch's average, at all its samples."""
        parts = [p.mean(1, keepdim=True).expand_as(p).flatten(0, 1) for p in _ghosts(v, self.ghost_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As autograd's, by hand; d_scale is of x less its sample's mean."""
        mean, var, weight, bias = inputs
        offset, rstd = self._standardize(mean, var)
        product = torch.addcmul(d_scale, offset, d_shift)
        d_weight = None if weight is None else (product * rstd).sum(0)
        scale, d_rstd = (rstd, product) if weight is None else (rstd * weight, product * weight)
        d_var = self._average(d_rstd * rstd.pow(3) * -0.5)
        d_offset = torch.addcmul(d_shift * scale, offset, d_var, value=2)
        d_mean = d_offset - self._average(d_offset)
        return scale, [d_mean, d_var, d_weight, None if bias is None else d_shift.sum(0)]
