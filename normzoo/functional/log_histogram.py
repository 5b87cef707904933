"""Signed histograms whose buckets are a float32's sign, exponent and leading mantissa bits.

A value's bucket is read off its bits, so no range has to be chosen, and histograms add up over layers, ranks and
time. With m mantissa bits there are 2^(9+m) buckets, 2^m to each power of two: first the non-negative values by
magnitude, then the negative ones by magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def bucket_counts(x: Tensor, mantissa_bits: int = 3) -> Tensor:
    """Count the values of ``x`` in each bucket, without reading anything back to the host.

    Half precision is widened, which is exact. Float64 is rounded to float32 and, if finite, clamped to its range.

    Args:
        x: any shape, floating point.
        mantissa_bits: m, from 0 to 7.

    Returns:
        (2^(9+m),) int64 on the device of ``x``.
    """
    x = x.detach().flatten()
    if x.dtype == torch.float64:
        largest = torch.finfo(torch.float32).max
        x = torch.where(x.isfinite(), x.clamp(-largest, largest), x)
    size = 1 << (9 + mantissa_bits)
    bucket = (x.float().view(torch.int32) >> (23 - mantissa_bits)) & (size - 1)
    if x.device.type == "cpu":
        return torch.bincount(bucket, minlength=size)
    # bincount on a GPU reads the largest value back to the host
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, bucket.long(), torch.ones_like(bucket, dtype=torch.int64))


def bucket_edges(mantissa_bits: int) -> Tensor:
    """Lower edges of the finite magnitude buckets, and the upper edge of the last.

    Returns:
        (255 * 2^m + 1,) float64; the first two are 0 and the end of the bucket that zero shares with the smallest
        subnormal numbers.
    """
    top = torch.arange(255 << mantissa_bits, dtype=torch.int32)
    edges = (top << (23 - mantissa_bits)).view(torch.float32).double()
    return torch.cat([edges, torch.tensor([2.0**128], dtype=torch.float64)])


def magnitude_counts(counts: Tensor, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """Counts of the finite magnitudes, (..., 255 * 2^m), and of the non-finite values, (...)."""
    both = counts.unflatten(-1, (2, -1)).sum(-2)
    finite = 255 << mantissa_bits
    return both[..., :finite], both[..., finite:].sum(-1)


def quantiles(counts: Tensor, q: Sequence[float], mantissa_bits: int, absolute: bool = False) -> Tensor:
    """The values whose rank is ``ceil(q * n)`` among the n finite ones, to within a bucket.

    The midpoint of its bucket is returned, off by at most 2^-(m+1) of the true value, for normal numbers. The first
    bucket (zero and the smallest subnormal numbers) counts as zero.

    Args:
        counts: (layers, 2^(9+m)) int64, on the host.
        q: each from 0 to 1.
        mantissa_bits: m.
        absolute: of |x| instead of x.

    Returns:
        (layers, len(q)) float64; NaN for a layer without finite values.

    Raises:
        ValueError: unless 0 <= q <= 1.
    """
    if not all(0 <= p <= 1 for p in q):
        raise ValueError(f"q must be from 0 to 1, not {q}")
    edges = bucket_edges(mantissa_bits)
    values = (edges[:-1] + edges[1:]) / 2
    values[0] = 0.0
    if absolute:
        weights = magnitude_counts(counts, mantissa_bits)[0]
    else:
        positive, negative = counts.unflatten(-1, (2, -1))[..., : len(values)].unbind(-2)
        weights, values = torch.cat([negative.flip(-1), positive], -1), torch.cat([-values.flip(0), values])
    cumulative = weights.cumsum(-1)
    n = cumulative[:, -1:]
    ranks = (n * torch.tensor(q, dtype=torch.float64)).ceil().long().clamp(min=1)
    found = values[torch.searchsorted(cumulative, ranks).clamp(max=len(values) - 1)]
    return torch.where(n > 0, found, torch.nan)


def tail_index(counts: Tensor, fraction: float, mantissa_bits: int) -> float:
    """Hill's tail index alpha of the largest magnitudes, from a histogram.

    As :func:`normzoo.functional.hill_estimator` with k = ceil(fraction * n), n the finite non-zero values, taking
    the logarithms as evenly spread within each bucket.

    Args:
        counts: (2^(9+m),) int64 on the host.
        fraction: the share of the largest magnitudes, between 0 and 1.
        mantissa_bits: m.

    Returns:
        NaN with fewer than two non-zero finite values; infinity if the largest k + 1 share no spread at all.

    Raises:
        ValueError: unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    weights = magnitude_counts(counts, mantissa_bits)[0][1:].double()
    n = int(weights.sum())
    if n < 2:
        return math.nan
    k = min(max(1, math.ceil(fraction * n)), n - 1)
    logs = bucket_edges(mantissa_bits)[1:].log()
    above = weights.flip(0).cumsum(0).flip(0)  # values in this bucket or a higher one
    at = int((above >= k + 1).nonzero()[-1])  # the bucket of the (k+1)-th largest
    inside = k - (float(above[at + 1]) if at + 1 < len(above) else 0.0)  # of the top k, those in that bucket
    low, high = logs[at], logs[at + 1]
    threshold = high - (high - low) * (inside + 0.5) / weights[at]
    spread = inside * ((high + threshold) / 2 - threshold)
    spread += (weights[at + 1 :] * ((logs[at + 1 : -1] + logs[at + 2 :]) / 2 - threshold)).sum()
    return k / float(spread) if spread > 0 else math.inf
