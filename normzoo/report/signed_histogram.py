"""Histograms of values with their sign, in bins of one width, from buckets that are of a float's leading bits."""

from __future__ import annotations

import numpy as np

BINS = 81  # an odd number, so that one bin has 0 in its middle


def signed_shares(pairs: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges of bins of one width from the largest magnitude below 0 to that above, and the share of values in each.

    The values of a bucket are spread evenly over it, so that a bin is off by at most the values of two buckets. Zeros
    and subnormal numbers are in the middle bin; values that are not finite are left out.

    Args:
        pairs: rows (bucket, count); counts of a bucket that comes several times are added.
        mantissa_bits: m; a bucket is a float32's sign, exponent and m leading mantissa bits.

    Returns:
        (BINS + 1,) edges and (BINS,) shares, which add up to 1; two empty arrays without a value other than 0.
    """
    half = 1 << (8 + mantissa_bits)
    normal, infinity = 1 << mantissa_bits, 255 << mantissa_bits  # buckets below are zero or subnormal
    magnitude = pairs[:, 0] % half
    finite = (pairs[:, 0] < 2 * half) & (magnitude < infinity)
    pairs, magnitude = pairs[finite], magnitude[finite]
    tiny = magnitude < normal
    zeros = pairs[tiny, 1].sum()
    low, high = _edge(magnitude[~tiny], mantissa_bits), _edge(magnitude[~tiny] + 1, mantissa_bits)
    if not high.size:
        return np.zeros(0), np.zeros(0)
    negative = pairs[~tiny, 0] >= half
    low, high = np.where(negative, -high, low), np.where(negative, -low, high)
    edges = np.linspace(-np.abs([low, high]).max(), np.abs([low, high]).max(), BINS + 1)
    # How much of each bucket is below each edge
    below = np.clip((edges[:, None] - low) / (high - low), 0.0, 1.0)
    counts = np.diff(below @ pairs[~tiny, 1].astype(float))
    counts[BINS // 2] += zeros
    return edges, counts / counts.sum()


def _edge(bucket: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """The smallest magnitude in a bucket of normal numbers."""
    exponent, mantissa = bucket >> mantissa_bits, bucket & ((1 << mantissa_bits) - 1)
    return np.ldexp(1.0 + mantissa / (1 << mantissa_bits), exponent - 127)
