"""How heavy the tails of a sample are.

A sample with NaN or infinite values gives NaN; only ``power_law_fit``, as the histograms of ``LogHistogram``, leaves
such values out. A sample of fewer values than a function needs raises ``ValueError``; ``excess_kurtosis`` is NaN.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


def excess_kurtosis(x: Tensor) -> Tensor:
    """Fourth standardized moment minus 3, biased: ``mean((x - mean)^4) / mean((x - mean)^2)^2 - 3``.

    0 for a Gaussian, 6 for a Laplace sample; NaN if all values are equal or one is not finite, or for an empty tensor.

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
    so a small alpha is a heavy tail. Infinite if the k+1 largest are equal, NaN if |x|_(k+1) is zero or a value is not
    finite.

    Args:
        x: any shape, floating point, more than k values.
        k: how many of the largest magnitudes, at least 1.

    Returns:
        0-d tensor, on the device of ``x``.

    Raises:
        ValueError: unless 1 <= k < number of values.

    Standard error: alpha / sqrt(k) for a Pareto tail; a tail that is Pareto only in the limit adds a bias.

    Source: Hill 1975, Annals of Statistics 3(5).

    Example:
        >>> round(hill_estimator(torch.tensor([1.0, -2.0, 4.0]), k=1).item(), 4)  # 1 / log(4 / 2)
        1.4427
    """
    logs = _log_excesses(x, k)
    return torch.where(logs.isnan().any(), torch.nan, 1 / logs.mean())


def moment_estimator(x: Tensor, k: int) -> Tensor:
    """Dekkers, Einmahl & de Haan's estimate of the extreme value index gamma from the k largest magnitudes.

    With ``M_j = mean_{i=1..k} (log|x|_(i) - log|x|_(k+1))^j``, |x|_(1) >= |x|_(2) >= ...::

        gamma = M_1 + 1 - 0.5 / (1 - M_1^2 / M_2)

    gamma > 0: a heavy tail with index alpha = 1 / gamma; about 0: an exponential or Gaussian one; < 0: magnitudes have
    an upper end. Hill's estimator knows the first case only. NaN if |x|_(k+1) is zero, the k+1 largest are equal or a
    value is not finite; -infinity if the k largest are equal.

    Standard error: sqrt((1 + gamma^2) / k) for gamma >= 0; a tail of that kind only in the limit adds a bias.

    Args:
        x: any shape, floating point, more than k values.
        k: how many of the largest magnitudes, at least 1.

    Returns:
        0-d tensor, on the device of ``x``.

    Raises:
        ValueError: unless 1 <= k < number of values.

    Source: Dekkers, Einmahl & de Haan 1989, Annals of Statistics 17(4), equation 1.7.

    Example:
        >>> x = torch.arange(1.0, 1001.0) / 1000  # as if uniform, gamma -1
        >>> round(moment_estimator(x, k=200).item(), 1)
        -1.0
    """
    logs = _log_excesses(x, k)
    first, second = logs.mean(), logs.square().mean()
    return first + 1 - 0.5 / (1 - first.square() / second)


def _log_excesses(x: Tensor, k: int) -> Tensor:
    """(k,) ``log|x|_(i) - log|x|_(k+1)``; NaN above a threshold of zero, or with values that are not finite."""
    if not 1 <= k < x.numel():
        raise ValueError(f"k must be at least 1 and less than the number of values ({x.numel()}), not {k}")
    x = x.detach().flatten()
    top = x.to(torch.promote_types(x.dtype, torch.float32)).abs().topk(k + 1, sorted=True).values
    # The largest is not finite if any value is, as topk puts NaN before infinity
    return torch.where((top[k] > 0) & top[0].isfinite(), top[:k].log() - top[k].log(), torch.nan)


def quantile_ratio(x: Tensor, upper: float = 0.999, lower: float = 0.5) -> Tensor:
    """A far quantile of the magnitudes over a middle one: ``q_upper(|x|) / q_lower(|x|)``.

    The q-quantile of n magnitudes is the one of rank ``max(1, ceil(q * n))``, without interpolation. For
    q99.9 / q50: 4.88 for a Gaussian, 9.97 for a Laplace, 16.9 for a Student-t(3), 637 for a Cauchy distribution; a
    scale does not matter. Infinite if only the lower quantile is zero, NaN if both are or if a value is not finite.

    Standard error of the ratio's logarithm, with u and l the two shares, f the density of |x|, a = f(q_u) q_u and
    b = f(q_l) q_l: sqrt((u (1-u) / a^2 + l (1-l) / b^2 - 2 l (1-u) / (a b)) / n).

    Args:
        x: any shape, floating point, not empty.
        upper: from lower to 1.
        lower: from 0 to upper.

    Returns:
        0-d tensor, float32 or wider, on the device of ``x``.

    Raises:
        ValueError: for an empty tensor, or unless 0 <= lower <= upper <= 1.

    Source: Hyndman & Fan 1996, The American Statistician 50(4), definition 1, for the quantiles.

    Example:
        >>> quantile_ratio(torch.tensor([1.0, -2.0, 3.0, -8.0]), upper=1.0).item()
        4.0
    """
    if not 0 <= lower <= upper <= 1:
        raise ValueError(f"quantiles must be 0 <= lower <= upper <= 1, not lower={lower} and upper={upper}")
    n = x.numel()
    if not n:
        raise ValueError("an empty tensor has no quantiles")
    x = x.detach().flatten()
    x = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    far, middle = (x.kthvalue(max(1, math.ceil(level * n))).values for level in (upper, lower))
    return torch.where(x.isfinite().all(), far / middle, torch.nan)


def stable_index(x: Tensor, m: int) -> Tensor:
    """Index alpha of a symmetric alpha-stable sample from sums over blocks of m consecutive values.

    With the n // m block sums Y_i, over the values those blocks hold::

        1 / alpha = (mean_i log|Y_i| - mean log|x|) / log m

    2 for a Gaussian, 1 for a Cauchy sample. The sample is not centred; a remainder of n % m values is left out. NaN if
    a value is not finite, or if one of those in blocks, or a block sum, is zero or overflows.

    Args:
        x: any shape, floating point, read in memory order.
        m: block size, from 2 to the number of values.

    Returns:
        0-d tensor, on the device of ``x``.

    Raises:
        ValueError: unless 2 <= m <= number of values.

    Source: Mohammadi, Mohammadpour & Ogata 2015, Metrika 78; as used by Simsekli et al. 2019, arXiv 1901.06053.

    Example:
        >>> round(stable_index(torch.tensor([1.0, 1.0, 2.0, 2.0]), m=2).item(), 4)  # sums grow as m: alpha 1
        1.0
    """
    n = x.numel()
    if not 2 <= m <= n:
        raise ValueError(f"m must be from 2 to the number of values ({n}), not {m}")
    x = x.detach().flatten()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = x[: n - n % m].view(-1, m)
    inverse = (blocks.sum(1).abs().log().mean() - blocks.abs().log().mean()) / math.log(m)
    return torch.where(inverse.isfinite() & x.isfinite().all(), 1 / inverse, torch.nan)


class PowerLawFit(NamedTuple):
    """A power law fitted to the largest magnitudes, and how it compares with a log-normal distribution.

    Attributes:
        alpha: tail index, P(|x| > t) ~ t^-alpha; the exponent of the density, which ``powerlaw`` reports, less 1.
        standard_error: of alpha, alpha / sqrt(tail).
        threshold: the magnitude from which the law is fitted (xmin).
        tail: how many magnitudes lie there.
        distance: Kolmogorov-Smirnov distance between these and the law.
        log_likelihood_ratio: of the power law against the log-normal, divided by its standard deviation; positive if
            the power law fits better.
        p_value: of a ratio so far from 0 if both fitted equally well; a large one leaves the sign undecided.
    """

    alpha: float
    standard_error: float
    threshold: float
    tail: int
    distance: float
    log_likelihood_ratio: float
    p_value: float


def power_law_fit(x: Tensor, threshold: float | None = None) -> PowerLawFit:
    """Fit a power law to the largest magnitudes and compare it with a log-normal, by the package ``powerlaw``.

    For records read later, not for training: the sample is copied to the host, and without a threshold each of its
    values is tried as one (1,000 values of a Pareto distribution on one core: 0.2 s with alpha 1, 2 s with alpha 5).

    Args:
        x: any shape, floating point; zeros and non-finite values are left out.
        threshold: the magnitude from which to fit; by default the one with the least Kolmogorov-Smirnov distance.

    Raises:
        ImportError: if ``powerlaw`` is not installed.
        ValueError: if fewer than two different magnitudes reach the threshold, or for a threshold that is not finite
            and above 0.

    Source: Clauset, Shalizi & Newman 2009, SIAM Review 51(4); Alstott, Bullmore & Plenz 2014, PLoS ONE 9(1).

    Example:
        >>> x = (torch.arange(1, 200) / 200.0) ** -0.5  # quantiles of a Pareto distribution with alpha 2
        >>> round(power_law_fit(x, threshold=1.0).alpha, 1)
        2.0
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            powerlaw = importlib.import_module("powerlaw")
    except ImportError as error:
        raise ImportError("power_law_fit needs the package powerlaw: pip install normzoo[tails]") from error
    if threshold is not None and not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold must be a finite magnitude above 0, or None for the best, not {threshold}")
    x = x.detach().double().abs().flatten().cpu()
    x = x[x.isfinite() & (x > 0)]
    reached = int(x[x >= (threshold or 0.0)].unique().numel())
    if reached < 2:
        raise ValueError(f"a power law needs at least two different magnitudes from the threshold on, not {reached}")
    with warnings.catch_warnings(action="ignore"):  # it warns of its own deprecations, and of thresholds it discards
        # An exponent, alpha + 1, of any size above 1: powerlaw's own bound is 3
        fit = powerlaw.Fit(x.numpy(), xmin=threshold, verbose=0, parameter_ranges={"alpha": [1, None]})
        ratio, p_value = fit.distribution_compare("power_law", "lognormal", normalized_ratio=True)
        alpha, tail = float(fit.power_law.alpha) - 1, int((x >= float(fit.xmin)).sum())
        distance = float(fit.power_law.D)
    return PowerLawFit(alpha, alpha / math.sqrt(tail), float(fit.xmin), tail, distance, float(ratio), float(p_value))
