"""How heavy the tails of a sample are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def excess_kurtosis(x: Tensor) -> Tensor:
    """Fourth standardized moment minus 3, biased: ``mean((x - mean)^4) / mean((x - mean)^2)^2 - 3``.

    0 for a Gaussian, 6 for a Laplace sample; NaN if all values are equal, or for an empty tensor.

    Args:
        x: any shape, floating point; computed in float32 or wider.

    Returns:
        0-d tensor, on the device of ``x``.

    Example:
        >>> excess_kurtosis(torch.tensor([-1.0, 1.0])).item()
        -2.0
    """
    x = x.detach().flatten()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        return x.new_full((), torch.nan)
    low, high = x.aminmax()
    x = x - x.mean()
    # Scaled by the largest deviation, so that fourth powers of tiny gradients do not underflow.
    square = (x / x.abs().amax()).square()
    # Equal values leave the rounding of their mean, which is not a spread
    return torch.where(low == high, torch.nan, square.square().mean() / square.mean().square() - 3)


def hill_estimator(x: Tensor, k: int) -> Tensor:
    """Hill's estimate of the tail index alpha from the k largest magnitudes.

    ``alpha = k / sum_{i=1..k} log(|x|_(i) / |x|_(k+1))`` with |x|_(1) >= |x|_(2) >= ...; P(|x| > t) ~ t^-alpha,
    so a small alpha is a heavy tail. Infinite if the k+1 largest are equal, NaN if
    |x|_(k+1) is zero.

    Args:
        x: any shape, floating point, more than k values.
        k: how many of the largest magnitudes, at least 1.

    Returns:
        0-d tensor, on the device of ``x``.

    Raises:
        ValueError: unless 1 <= k < number of values.

    Source: Hill 1975, Annals of Statistics 3(5).
    """
    if not 1 <= k < x.numel():
        raise ValueError(f"k must be from 1 to the number of values less one ({x.numel() - 1}), not {k}")
    x = x.detach().flatten()
    top = x.to(torch.promote_types(x.dtype, torch.float32)).abs().topk(k + 1, sorted=True).values
    return torch.where(top[k] > 0, 1 / (top[:k].log() - top[k].log()).mean(), torch.nan)


def stable_index(x: Tensor, m: int) -> Tensor:
    """Index alpha of a symmetric alpha-stable sample from sums over blocks of m consecutive values.

    With the n // m block sums Y_i, over the values those blocks hold::

        1 / alpha = (mean_i log|Y_i| - mean log|x|) / log m

    2 for a Gaussian, 1 for a Cauchy sample. The sample is not centred; a remainder of n % m values is left out.

    Args:
        x: any shape, floating point, none of it zero, read in memory order.
        m: block size, from 2 to the number of values.

    Returns:
        0-d tensor, on the device of ``x``.

    Raises:
        ValueError: unless 2 <= m <= number of values.

    Source: Mohammadi, Mohammadpour & Ogata 2015, Metrika 78; as used by Simsekli et al. 2019, arXiv 1901.06053.
    """
    n = x.numel()
    if not 2 <= m <= n:
        raise ValueError(f"m must be from 2 to the number of values ({n}), not {m}")
    x = x.detach().flatten()
    blocks = x.to(torch.promote_types(x.dtype, torch.float32))[: n - n % m].view(-1, m)
    inverse = (blocks.sum(1).abs().log().mean() - blocks.abs().log().mean()) / math.log(m)
    return 1 / inverse


def tail_summary(x: Tensor) -> Tensor:
    """Largest magnitude, L2 norm and biased excess kurtosis, without reading anything back to the host.

    Args:
        x: any shape, floating point, not empty.

    Returns:
        (3,) tensor, float32 or wider, on the device of ``x``.
    """
    x = x.detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.stack([x.abs().amax(), torch.linalg.vector_norm(x), excess_kurtosis(x)])
