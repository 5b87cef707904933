"""Count, mean and sum of squared deviations of each channel, and how to merge them.

Kept together as one tensor of shape (..., 3, C), here called *packed*: count, mean and M2 = sum (x - mean)^2. They are
float64 whatever the sample: a float32 count stops growing at 2^24, less than one batch of images holds, and merged
means keep 16 digits where the channel lies far from 0; the state is small, so this costs nothing. The passes over a
sample run in its own precision, float32 or wider, around its mean, where no digits cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo._shapes import statistics_dtype
from normzoo.functional._pieces import pieces


def channel_moments(x: Tensor, channel_dim: int = 1) -> Tensor:
    """Packed moments of each channel over all other dimensions.

    By the corrected two-pass formula: with m the rounded mean and d = x - m, ``mean = m + sum d / n`` and
    ``M2 = sum d^2 - (sum d)^2 / n``. Large tensors are cut along the first dimension, and their parts merged.

    Args:
        x: floating point, at least one dimension; may be empty.
        channel_dim: which dimension the channels are.

    Returns:
        (3, C) float64 tensor on the device of ``x``: count, mean, M2. 0 for no values.

    Source: Chan, Golub & LeVeque 1983, The American Statistician 37(3), equation 1.7.

    Example:
        >>> channel_moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]])).tolist()
        [[2.0, 2.0], [2.0, 10.0], [2.0, 0.0]]
    """
    x = x.detach().movedim(channel_dim, 0)
    if x.ndim == 1:
        x = x[:, None]
    channels, count = x.shape[0], x[0].numel() if x.shape[0] else 0
    if not count:
        return torch.zeros(3, channels, dtype=torch.float64, device=x.device)
    x = x.movedim(1, 0)  # what is cut comes first
    parts = [_of_piece(x[rows]) for rows in pieces(x)]
    return parts[0] if len(parts) == 1 else merge_moments(torch.stack(parts))


def _of_piece(x: Tensor) -> Tensor:
    """Of (N, C, ...)."""
    dims, dtype = [0, *range(2, x.ndim)], statistics_dtype(x)
    x = x.to(dtype)
    n = x.numel() // x.shape[1]
    mean = x.mean(dims)
    deviation = x - mean.view(-1, *[1] * (x.ndim - 2))
    rest = deviation.sum(dims).double() / n
    squares = deviation.square_().sum(dims).double()
    return torch.stack([torch.full_like(rest, n), mean.double() + rest, (squares - n * rest.square()).clamp(min=0)])


def merge_moments(packed: Tensor) -> Tensor:
    """The packed moments of the union of several samples.

    ``mean = sum n_i mean_i / n``, ``M2 = sum M2_i + sum n_i (mean_i - mean)^2``: the pairwise formula for any number of
    samples at once. The order of merging changes rounding only; samples without values change nothing.

    Args:
        packed: (R, ..., 3, C) float64, R samples.

    Returns:
        (..., 3, C) float64.

    Source: Chan, Golub & LeVeque 1983, equations 2.1.

    Example:
        >>> parts = torch.stack([channel_moments(torch.tensor([[1.0], [3.0]])), channel_moments(torch.tensor([[5.0]]))])
        >>> merge_moments(parts).flatten().tolist()
        [3.0, 3.0, 8.0]
    """
    n, means, squares = packed.unbind(-2)
    whole = n.sum(0)
    # Around one of the means: differences are exact where all are large and alike
    origin = means.gather(0, n.argmax(0, keepdim=True))
    share = n / whole.clamp(min=1)
    # An empty sample's mean may be anything
    offset = torch.where(n > 0, means - origin, 0.0)
    shift = (share * offset).sum(0)
    between = (n * (offset - shift).square()).sum(0)
    return torch.stack([whole, origin[0] + shift, torch.where(n > 0, squares, 0.0).sum(0) + between], dim=-2)


def moments_variance(packed: Tensor, unbiased: bool = False) -> Tensor:
    """Variances from packed moments: M2 / n, or M2 / (n - 1).

    Args:
        packed: (..., 3, C).
        unbiased: divide by n - 1.

    Returns:
        (..., C) float64; NaN where there are no values, or just one if unbiased.

    Example:
        >>> moments_variance(channel_moments(torch.tensor([[1.0], [3.0]])), unbiased=True).item()
        2.0
    """
    n, _, squares = packed.unbind(-2)
    n = n - 1 if unbiased else n
    return torch.where(n > 0, squares / n, torch.nan)


def moment_drift(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """How far moments have moved from others, in units of the others' standard deviation s = sqrt(running_var).

    ``((mean - running_mean) / s, (sqrt(var) - s) / s)``.

    Args:
        mean: (..., C).
        var: (..., C), not negative.
        running_mean: (..., C), such as a batch normalization's.
        running_var: (..., C).

    Returns:
        Two tensors (..., C): drift of the mean, and of the standard deviation. Infinite from a running variance of 0,
        NaN if nothing moved from there.

    Example:
        >>> one, four = torch.tensor([1.0]), torch.tensor([4.0])
        >>> [drift.item() for drift in moment_drift(mean=four, var=one, running_mean=one, running_var=four)]
        [1.5, -0.5]
    """
    s = running_var.sqrt()
    return (mean - running_mean) / s, (var.sqrt() - s) / s


def dead_channels(var: Tensor, threshold: float = 0.0) -> Tensor:
    """Which channels are constant: variance at or below a threshold, in the units of the variance.

    Args:
        var: (..., C).
        threshold: at least 0.

    Returns:
        (..., C) bool; a variance that is NaN is not dead.

    Raises:
        ValueError: for a negative threshold.

    Example:
        >>> dead_channels(torch.tensor([0.0, 1e-9, 1.0]), threshold=1e-8).tolist()
        [True, True, False]
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, not {threshold}")
    return var <= threshold
