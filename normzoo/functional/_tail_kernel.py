"""The loop of ``tail_statistics``, which Numba compiles; importing this file imports Numba."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

from normzoo.functional._kernels import EXACT, compiled


def of_histograms() -> Callable[..., Any]:
    """The compiled :func:`_of_histograms`."""
    numbers, values = types.int64[:, ::1], types.float64[::1]
    signature = (numbers, *[types.int64] * 4, values, values, values, types.float64, numbers, types.float64[:, ::1])
    return compiled(_of_histograms, signature, EXACT)


@numba.njit(**EXACT)
def _quantiles(row, half, first, last, n, middles, levels, found):  # type: ignore[no-untyped-def]
    """Fill in the quantiles of the magnitudes of n values, of which those not near zero are from first to last."""
    for i in range(len(levels)):
        rank = max(math.ceil(n * levels[i]), 1)
        below, value = row[0] + row[half], 0.0
        for magnitude in range(first, last + 1):
            if below >= rank:
                break
            below += row[magnitude] + row[half + magnitude]
            value = middles[magnitude]
        found[i] = np.nan if n == 0 else value if below >= rank else np.inf


@numba.njit(**EXACT)
def _tail_index(row, half, first, last, n, logs, fraction):  # type: ignore[no-untyped-def]
    """Hill's tail index of n magnitudes that are not zero."""
    top = min(max(math.ceil(fraction * n), 1), n - 1)
    higher, there, at = 0, 0, last
    while at >= first:  # down to the bucket of the (top + 1)-th largest
        there = row[at] + row[half + at]
        if higher + there > top:
            break
        higher += there
        at -= 1
    if at < first:
        return np.nan
    inside = top - higher  # of the largest, those in that bucket
    threshold = logs[at + 1] - (logs[at + 1] - logs[at]) * (inside + 0.5) / there
    spread = inside * (logs[at + 1] - threshold) / 2
    for magnitude in range(at + 1, last + 1):
        excess = (logs[magnitude] + logs[magnitude + 1]) / 2 - threshold
        spread += (row[magnitude] + row[half + magnitude]) * excess
    return top / spread if spread > 0 else np.inf


def _of_histograms(  # type: ignore[no-untyped-def]
    counts, half, infinity, nan, overflow, middles, logs, levels, fraction, numbers, values
):
    """Statistics of histograms, as :class:`FilledHistograms` has them, layer by layer.

    Args:
        counts: (layers, buckets).
        half: of the :class:`Layout`.
        infinity: of the layout.
        nan: of the layout.
        overflow: of the layout.
        middles: of the magnitude buckets.
        logs: logarithms of their edges.
        levels: of the quantiles.
        fraction: of the magnitudes, from which alpha is estimated.
        numbers: (layers, 3), which gets how many values there are, zeros, and values that are not finite.
        values: (layers, len(levels) + 1), which gets quantiles and alpha.

    Returns:
        (filled, 2) pairs of bucket and count, and (layers + 1,) where those of a layer begin and end.
    """
    layers, buckets = counts.shape
    ends = np.zeros(layers + 1, np.int64)
    pairs = np.empty((layers * buckets, 2), np.int64)  # takes only the memory that is written to
    place = 0
    for layer in range(layers):
        row, size = counts[layer], 0
        first, last, n = infinity, 0, row[half]  # magnitudes that are not zero, from the first to the last one filled
        for bucket in range(buckets):
            count = row[bucket]
            if not count:
                continue
            pairs[place, 0], pairs[place, 1] = bucket, count
            place += 1
            size += count
            magnitude = bucket - half if bucket >= half else bucket
            if 0 < magnitude < infinity:
                first, last, n = min(first, magnitude), max(last, magnitude), n + count
        beyond = row[overflow] + row[overflow + 1]
        numbers[layer, 0], numbers[layer, 1] = size, row[0]
        numbers[layer, 2] = row[infinity] + row[half + infinity] + row[nan]
        _quantiles(row, half, first, last, row[0] + n + beyond, middles, levels, values[layer])
        alpha = np.nan
        if n >= 2 and not beyond:
            alpha = _tail_index(row, half, first, last, n, logs, fraction)
        values[layer, len(levels)] = alpha
        ends[layer + 1] = place
    return pairs[:place].copy(), ends
