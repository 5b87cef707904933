"""Extremes and moments of the finite values of a tensor, with counts of the others, in a form that merges.

Kept together as one tensor of seven float64 numbers, here called *packed*: the number of finite values, the least and
the greatest of them, their mean, M2 = sum (x - mean)^2, the number of infinite values and that of NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNT, LOW, HIGH, MEAN, M2, INFINITE, NAN = range(7)
COLUMNS = 7
_PIECE = 2**22  # values whose temporaries are held at a time


def finite_moments(x: Tensor) -> Tensor:
    """Packed moments of the finite values, without waiting for a GPU.

    Values are divided by about the largest magnitude before they are squared, so that no square overflows.

    Args:
        x: any shape and dtype, complex numbers as pairs of real ones; may be empty.

    Returns:
        (7,) float64 tensor on the device of ``x``: count, least, greatest, mean, M2, infinite, NaN. Of no finite values
        the least is infinity, the greatest minus infinity, mean and M2 are 0.

    Example:
        >>> finite_moments(torch.tensor([1.0, 3.0, float("inf")])).tolist()
        [2.0, 1.0, 3.0, 2.0, 2.0, 1.0, 0.0]
    """
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    x = x.flatten()
    if not x.numel():
        return no_finite_values(x.device)
    parts = [_of_piece(piece) for piece in x.split(_PIECE)]
    return parts[0] if len(parts) == 1 else merge_finite_moments(torch.stack(parts))


def no_finite_values(device: torch.device | None = None) -> Tensor:
    """(7,): the moments of nothing, from which merging starts."""
    return torch.tensor([0.0, torch.inf, -torch.inf, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=device)


def merge_finite_moments(packed: Tensor) -> Tensor:
    """The packed moments of the union of several samples: ``M2 = sum M2_i + n_i (mean_i - mean)^2``.

    Args:
        packed: (R, ..., 7) float64, R samples.

    Returns:
        (..., 7) float64.

    Source: Chan, Golub & LeVeque 1983, The American Statistician 37(3), equations 2.1.

    Example:
        >>> merge_finite_moments(torch.stack([finite_moments(torch.tensor(v)) for v in (1.0, 3.0)])).tolist()
        [2.0, 1.0, 3.0, 2.0, 2.0, 0.0, 0.0]
    """
    count, low, high, mean, m2, infinite, nan = packed.unbind(-1)
    n = count.sum(0)
    whole = (count / n.clamp(min=1) * mean).sum(0)
    m2 = (m2 + count * (mean - whole).square()).sum(0)
    return torch.stack([n, low.amin(0), high.amax(0), whole, m2, infinite.sum(0), nan.sum(0)], -1)


def finite_std(packed: Tensor) -> Tensor:
    """(Biased) standard deviation of the finite values, (...); NaN if there are none."""
    n = packed[..., COUNT]
    return torch.where(n > 0, (packed[..., M2] / n).sqrt(), torch.nan)


def root_mean_square(packed: Tensor) -> Tensor:
    """Root of the mean square of the finite values, (...); NaN if there are none."""
    n = packed[..., COUNT]
    return torch.where(n > 0, (packed[..., M2] / n + packed[..., MEAN].square()).sqrt(), torch.nan)


def _of_piece(x: Tensor) -> Tensor:
    """Of a 1-d tensor of at least one value."""
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float() if x.is_floating_point() else x.double()
    if x.device.type == "cpu" and (packed := _of_finite(x)) is not None:  # as most tensors are: in fewer passes
        return packed
    finite = x.isfinite()
    count, nan = finite.sum().double(), x.isnan().sum()
    low = torch.where(finite, x, torch.inf).amin()
    high = torch.where(finite, x, -torch.inf).amax()
    size = _size(low, high)
    scaled = torch.where(finite, x, 0.0) / size
    mean = scaled.sum() / count.clamp(min=1).to(x.dtype)
    deviation = torch.where(finite, scaled - mean, 0.0)
    rest = deviation.sum().double() / count.clamp(min=1)
    m2 = (deviation.square().sum().double() - count * rest.square()).clamp(min=0)
    size = size.double()
    moments = [count, low, high, (mean.double() + rest) * size, m2 * size.square(), x.numel() - count - nan, nan]
    return torch.stack([column.double() for column in moments])


def _of_finite(x: Tensor) -> Tensor | None:
    """Of a 1-d tensor on a CPU; None if a value is not finite."""
    least, greatest = x.aminmax()
    low, high, n = least.item(), greatest.item(), x.numel()
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    size = _size(least, greatest).item()
    deviation = x / size
    mean = deviation.mean()
    deviation -= mean
    rest = deviation.sum().item() / n
    m2 = max(deviation.square_().sum().item() - n * rest**2, 0.0)
    return torch.tensor([n, low, high, (mean.item() + rest) * size, m2 * size**2, 0, 0], dtype=torch.float64)


def _size(low: Tensor, high: Tensor) -> Tensor:
    """The power of two below the largest magnitude, by which division is exact; 1 if that is 0 or not known."""
    size = torch.maximum(-low, high)
    size = torch.where((size > 0) & size.isfinite(), size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
    return torch.ldexp(torch.ones_like(size), size.frexp().exponent - 1)
