"""What the rows of gradient tails say of histograms, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normzoo.functional import _one_pass as one_pass
from normzoo.functional.buckets import Layout
from normzoo.functional.log_histogram import (
    TAIL_LEVELS,
    FilledHistograms,
    check_levels,
    check_tail,
    edges_middles_logs,
    nonfinite_counts,
    zero_counts,
)


class TailStatistics(NamedTuple):
    """Statistics of the histograms of several layers, on the host.

    ``sizes``, ``zeros`` and ``nonfinite``, (layers,) int64: the number of values, of zeros, and of infinite and NaN
    values. ``quantiles``, (layers, levels) float64, of the magnitudes. ``alpha``, (layers,) float64: Hill's tail index.
    ``pairs``: for each layer (filled, 2) int64 of bucket and count.
    """

    sizes: Tensor
    zeros: Tensor
    nonfinite: Tensor
    quantiles: Tensor
    alpha: Tensor
    pairs: list[np.ndarray]


def tail_statistics(
    counts: Tensor,
    mantissa_bits: int,
    fraction: float,
    levels: Sequence[float] = TAIL_LEVELS,
    compiled: bool | None = None,
) -> TailStatistics:
    """The statistics of :class:`FilledHistograms`, in one pass by Numba or by PyTorch's functions.

    Counts and quantiles are the same either way, alpha to within rounding.

    Args:
        counts: (layers, 2^(9+m)) int64, on the host.
        mantissa_bits: m.
        fraction: share of the largest magnitudes that alpha is estimated from, between 0 and 1.
        levels: of the quantiles, each from 0 to 1.
        compiled: whether to use Numba; by default where :func:`histogram_and_moments` has used it in this process.

    Raises:
        ValueError: for a fraction or levels out of range.

    Example:
        >>> from normzoo.functional.buckets import bucket_counts
        >>> found = tail_statistics(bucket_counts(torch.tensor([-4.0, 1.0, 0.0]))[None], 3, fraction=0.5)
        >>> found.quantiles[0, 0].item(), found.zeros.tolist(), found.pairs[0].tolist()
        (1.0625, [1], [[0, 1], [1016, 1], [3080, 1]])
    """
    if one_pass.is_loaded() if compiled is None else compiled:
        return _by_numba(counts, Layout(mantissa_bits), fraction, levels)
    filled = FilledHistograms(counts, mantissa_bits)
    return TailStatistics(
        filled.sizes(),
        zero_counts(counts),
        nonfinite_counts(counts, mantissa_bits),
        filled.quantiles(levels),
        filled.tail_indices(fraction),
        [pairs.numpy() for pairs in filled.pairs()],
    )


def _by_numba(counts: Tensor, layout: Layout, fraction: float, levels: Sequence[float]) -> TailStatistics:
    check_tail(fraction)
    check_levels(levels)
    numbers = np.empty((len(counts), 3), np.int64)
    quantiles_and_alpha = np.empty((len(counts), len(levels) + 1))
    _, middles, logs = (values.numpy() for values in edges_middles_logs(layout.mantissa_bits))
    pairs, ends = _kernel()(
        counts.contiguous().numpy(),
        *(layout.half, layout.infinity, layout.nan, layout.overflow),
        *(middles, logs, np.array(levels, dtype=np.float64), fraction),
        *(numbers, quantiles_and_alpha),
    )
    sizes, zeros, nonfinite = torch.from_numpy(numbers).unbind(1)
    found = torch.from_numpy(quantiles_and_alpha)
    of_layers = [pairs[start:end] for start, end in pairwise(ends.tolist())]
    return TailStatistics(sizes, zeros, nonfinite, found[:, :-1], found[:, -1], of_layers)


def prepare() -> None:
    """Load, or compile, what :func:`tail_statistics` will need, before time matters."""
    if one_pass.is_loaded():
        _kernel()


@cache
def _kernel() -> Any:
    from normzoo.functional import _tail_kernel

    return _tail_kernel.of_histograms()
