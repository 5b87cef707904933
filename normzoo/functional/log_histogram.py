"""What histograms of float buckets tell: quantiles, tail index, TensorBoard's form; see ``buckets`` for the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from normzoo.functional.buckets import Layout

TAIL_LEVELS = (0.5, 0.99, 0.999)  # of the quantiles that show a tail: records and plots have these


def bucket_edges(mantissa_bits: int) -> Tensor:
    """Lower edges of the finite magnitude buckets, and the upper edge of the last.

    Returns:
        (255 * 2^m + 1,) float64; the first two are 0 and 2^-(126+m).

    Example:
        >>> bucket_edges(3)[1016:1020].tolist()
        [1.0, 1.125, 1.25, 1.375]
    """
    top = torch.arange(255 << mantissa_bits, dtype=torch.int32)
    edges = (top << (23 - mantissa_bits)).view(torch.float32).double()
    return torch.cat([edges, torch.tensor([2.0**128], dtype=torch.float64)])


def magnitude_counts(counts: Tensor, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """Counts of the finite magnitudes, (..., 255 * 2^m), and of infinities and NaN together, (...).

    The first magnitude bucket holds the zeros and the tiny values; float64 values beyond float32's range are in
    neither.
    """
    return _magnitudes(counts, Layout(mantissa_bits)).sum(-2), nonfinite_counts(counts, mantissa_bits)


def nonfinite_counts(counts: Tensor, mantissa_bits: int) -> Tensor:
    """How many values are infinite or NaN, (...), of histograms (..., 2^(9+m))."""
    layout = Layout(mantissa_bits)
    infinite = counts[..., layout.infinity] + counts[..., layout.half + layout.infinity]
    return infinite + counts[..., layout.nan]


def _magnitudes(counts: Tensor, layout: Layout) -> Tensor:
    """(..., 2, 255 * 2^m): a view of the counts of the finite values of either sign by magnitude."""
    return counts[..., : 2 * layout.half].unflatten(-1, (2, -1))[..., : layout.infinity]


@cache
def edges_middles_logs(mantissa_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bucket_edges`, the middle of each bucket, 0 of the first, and the logarithms of the edges."""
    edges = bucket_edges(mantissa_bits)
    middles = (edges[:-1] + edges[1:]) / 2
    middles[0] = 0.0
    return edges, middles, edges.log()


class FilledHistograms:
    """Histograms of several layers without the buckets that are empty in every layer, and statistics of them.

    Most buckets are empty in every layer, and would take as much time as the others.

    Args:
        counts: (layers, 2^(9+m)) int64, on the host.
        mantissa_bits: m.
    """

    def __init__(self, counts: Tensor, mantissa_bits: int) -> None:
        self._all, self._layout = counts, Layout(mantissa_bits)
        self._buckets, self._counts = _without_empty_buckets(counts)

    def sizes(self) -> Tensor:
        """How many values were counted, (layers,)."""
        return self._counts.sum(1)

    def pairs(self) -> list[Tensor]:
        """:func:`filled_buckets` of the histograms."""
        return _pairs(self._buckets, self._counts)

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """:func:`quantiles` of the magnitudes."""
        layout, (weights, span) = self._layout, self._magnitudes
        values = edges_middles_logs(layout.mantissa_bits)[1]
        small = self._all[:, :1] + self._all[:, layout.half : layout.half + 1]
        beyond = self._all[:, layout.overflow : layout.overflow + 2].sum(-1, keepdim=True)
        infinity = values.new_full((1,), math.inf)
        return _quantiles(torch.cat([small, weights, beyond], -1), torch.cat([values[:1], values[span], infinity]), q)

    def tail_indices(self, fraction: float | None, k: int | None = None) -> Tensor:
        """:func:`tail_indices` of the histograms."""
        check_tail(fraction, k)
        counts, layout, (weights, span) = self._all, self._layout, self._magnitudes
        edges = edges_middles_logs(layout.mantissa_bits)[2][span.start : span.stop + 1]
        low, high, weights = edges[:-1], edges[1:], weights.double()
        n = weights.sum(1) + counts[:, layout.half]
        top = (fraction * n).ceil() if fraction is not None else torch.full_like(n, float(k or 1))
        top = top.clamp(min=1).minimum(n - 1)
        above = weights.flip(1).cumsum(1).flip(1)  # values in this bucket or a higher one
        at = ((above > top[:, None]).sum(1) - 1).clamp(min=0)[:, None]  # the bucket of the (k+1)-th largest
        there, low_at, high_at = weights.gather(1, at), low[at], high[at]
        higher = above.gather(1, at) - there
        inside = top[:, None] - higher  # of the top k, those in that bucket
        threshold = high_at - (high_at - low_at) * (inside + 0.5) / there
        spread = inside * (high_at - threshold) / 2
        excess = ((low + high) / 2 - threshold).mul_(weights)
        spread = (spread + excess.masked_fill_(torch.arange(len(low)) <= at, 0.0).sum(1, keepdim=True))[:, 0]
        alpha = torch.where(spread > 0, top / spread, torch.inf)
        beyond = counts[:, layout.overflow : layout.overflow + 2].any(1)
        return torch.where((n < 2) | beyond | (above[:, 0] < top + 1), torch.nan, alpha)

    @cached_property
    def _magnitudes(self) -> tuple[Tensor, slice]:
        """As :func:`magnitude_counts`, from the first to the last bucket beyond the zeros that is filled in any layer.

        Returns:
            (layers, n) counts, n at least 1, and which of the magnitude buckets these are.
        """
        layout = self._layout
        magnitudes = self._buckets % layout.half
        finite = (magnitudes > 0) & (magnitudes < layout.infinity) & (self._buckets < 2 * layout.half)
        filled = magnitudes[finite]
        span = slice(int(filled.min()), int(filled.max()) + 1) if len(filled) else slice(1, 2)
        weights = self._counts.new_zeros(len(self._counts), span.stop - span.start)
        return weights.index_add_(1, filled - span.start, self._counts[:, finite]), span


def zero_counts(counts: Tensor) -> Tensor:
    """How many values are zero, (...), of histograms (..., 2^(9+m))."""
    return counts[..., 0]


def apart(counts: Tensor, mantissa_bits: int) -> dict[str, Tensor]:
    """What is counted apart, each of shape (...): no two of these overlap.

    ``zeros``; ``tiny``, below 2^-(126+m) in magnitude; ``subnormal``, below 2^-126, without the tiny;
    ``positive_infinity``; ``negative_infinity``; ``nan``; ``positive_overflow`` and ``negative_overflow``, float64
    values of magnitude 2^128 and more.

    Example:
        >>> from normzoo.functional.buckets import bucket_counts
        >>> found = apart(bucket_counts(torch.tensor([0.0, -0.0, 1e-45, float("nan")])), mantissa_bits=3)
        >>> [name for name, count in found.items() if count], int(found["zeros"])
        (['zeros', 'tiny', 'nan'], 2)
    """
    layout = Layout(mantissa_bits)
    both = counts[..., : 2 * layout.half].unflatten(-1, (2, -1))
    return {
        "zeros": zero_counts(counts),
        "tiny": counts[..., layout.half],
        "subnormal": both[..., 1 : 1 << mantissa_bits].sum((-2, -1)),
        "positive_infinity": both[..., 0, layout.infinity],
        "negative_infinity": both[..., 1, layout.infinity],
        "nan": counts[..., layout.nan],
        "positive_overflow": counts[..., layout.overflow],
        "negative_overflow": counts[..., layout.overflow + 1],
    }


def quantiles(counts: Tensor, q: Sequence[float], mantissa_bits: int, absolute: bool = False) -> Tensor:
    """The values whose rank is ``ceil(q * n)`` among the n finite ones, to within a bucket.

    The midpoint of its bucket is returned, off by at most 2^-(m+1) of the true value, for normal float32 numbers; for
    smaller ones off by at most 2^-(126+m). Zeros and tiny values give 0. Float64 values beyond float32's range count
    as finite, and give an infinity.

    Args:
        counts: (layers, 2^(9+m)) int64, on the host.
        q: each from 0 to 1.
        mantissa_bits: m.
        absolute: of |x| instead of x.

    Returns:
        (layers, len(q)) float64; NaN for a layer without finite values.

    Raises:
        ValueError: unless 0 <= q <= 1.

    Example:
        >>> from normzoo.functional.buckets import bucket_counts
        >>> quantiles(bucket_counts(torch.tensor([-4.0, 1.0, 2.0]))[None], [0.0, 0.5], mantissa_bits=3).tolist()
        [[-4.25, 1.0625]]
    """
    if absolute:
        return FilledHistograms(counts, mantissa_bits).quantiles(q)
    layout = Layout(mantissa_bits)
    values = edges_middles_logs(mantissa_bits)[1]
    beyond = counts[..., layout.overflow : layout.overflow + 2]
    positive, negative = _magnitudes(counts, layout).unbind(-2)
    weights = torch.cat([beyond[..., 1:], negative.flip(-1), positive, beyond[..., :1]], -1)
    infinity = values.new_full((1,), math.inf)
    return _quantiles(weights, torch.cat([-infinity, -values.flip(0), values, infinity]), q)


def _quantiles(weights: Tensor, values: Tensor, q: Sequence[float]) -> Tensor:
    """(layers, len(q)) quantiles of values, (n,), that occur as often as the weights, (layers, n), say."""
    check_levels(q)
    cumulative = weights.cumsum(-1)
    n = cumulative[:, -1:]
    ranks = (n * torch.tensor(list(q), dtype=torch.float64)).ceil().long().clamp(min=1)
    found = values[torch.searchsorted(cumulative, ranks).clamp(max=len(values) - 1)]
    return torch.where(n > 0, found + 0.0, torch.nan)  # + 0.0: no negative zero


def tail_index(counts: Tensor, fraction: float | None, mantissa_bits: int, k: int | None = None) -> float:
    """:func:`tail_indices` of one histogram, (2^(9+m),)."""
    return float(tail_indices(counts[None], fraction, mantissa_bits, k))


def tail_indices(counts: Tensor, fraction: float | None, mantissa_bits: int, k: int | None = None) -> Tensor:
    """Hill's tail index alpha of the largest magnitudes, from histograms.

    As :func:`normzoo.functional.hill_estimator`, taking the logarithms as evenly spread within each bucket. Next to
    the estimate from the values themselves, each logarithm is off by less than log(1 + 2^-m).

    Args:
        counts: (layers, 2^(9+m)) int64 on the host.
        fraction: the share of the largest magnitudes, between 0 and 1: k = ceil(fraction * n), n the finite non-zero
            values.
        mantissa_bits: m.
        k: how many of the largest magnitudes, instead of a fraction; at most n - 1 are taken.

    Returns:
        (layers,) float64: NaN with fewer than two non-zero finite values, if any lies beyond float32's range, or if the
        largest k + 1 reach down to tiny values; infinity if the largest k + 1 share no spread at all.

    Raises:
        ValueError: unless 0 < fraction < 1 or k >= 1, one of them given.
    """
    return FilledHistograms(counts, mantissa_bits).tail_indices(fraction, k)


def check_levels(q: Sequence[float]) -> None:
    """Raise a ValueError unless the levels of quantiles are from 0 to 1."""
    if not all(0 <= p <= 1 for p in q):
        raise ValueError(f"q must be from 0 to 1, not {q}")


def check_tail(fraction: float | None, k: int | None = None) -> None:
    """Raise a ValueError unless a tail is given by its share of the values, or by their number."""
    if (fraction is None) == (k is None):
        raise ValueError(f"give either fraction or k, not fraction={fraction} and k={k}")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def tensorboard_histogram(counts: Tensor, mantissa_bits: int, max_buckets: int = 200) -> dict[str, Any]:
    """The keyword arguments of ``SummaryWriter.add_histogram_raw`` that describe a histogram, but for the tag.

    Neighbouring buckets are merged, 2, 4, 8, ... of each sign, until at most ``max_buckets`` are left. Only finite
    values are described. ``min`` and ``max`` are the outer edges of the outermost filled buckets, ``sum`` and
    ``sum_squares`` are taken over the midpoints of the unmerged ones, each off by at most 2^-(m+1).

    Args:
        counts: (2^(9+m),) int64, on the host.
        mantissa_bits: m.
        max_buckets: at least 3.

    Returns:
        ``min``, ``max``, ``num``, ``sum``, ``sum_squares``, ``bucket_limits`` (right edges, rising), ``bucket_counts``.

    Raises:
        ValueError: if max_buckets is below 3.

    Example:
        >>> from normzoo.functional.buckets import bucket_counts
        >>> found = tensorboard_histogram(bucket_counts(torch.tensor([1.0, 1.0, -2.0])), mantissa_bits=3)
        >>> found["num"], found["min"], found["max"], found["bucket_limits"]
        (3, -2.25, 1.125, [-2.0, 1.0, 1.125])
    """
    if max_buckets < 3:
        raise ValueError(f"max_buckets must be at least 3, not {max_buckets}")
    layout = Layout(mantissa_bits)
    edges, middle, _ = edges_middles_logs(mantissa_bits)
    positive, negative = counts[: 2 * layout.half].unflatten(0, (2, -1))[:, : layout.infinity].unbind()
    num = int(positive.sum() + negative.sum())
    for group in (2**j for j in range(9 + mantissa_bits)):
        limits, merged = _without_gaps(*_signed(positive, negative, edges, group))
        if len(merged) <= max_buckets:
            break
    lower, upper = _range(positive, negative, edges)
    signed, both = (positive - negative).double(), (positive + negative).double()
    return {
        "min": lower,
        "max": upper,
        "num": num,
        "sum": float((signed * middle).sum()),
        "sum_squares": float((both * middle.square()).sum()),
        "bucket_limits": limits,
        "bucket_counts": merged,
    }


def _signed(positive: Tensor, negative: Tensor, edges: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Right edges and counts from the lowest to the highest value, ``group`` magnitude buckets to one.

    The first groups of the two signs, with the zeros, are one bucket.
    """
    count = -(-len(positive) // group)
    positive, negative = (
        torch.cat([c, c.new_zeros(count * group - len(c))]).view(count, group).sum(1) for c in (positive, negative)
    )
    upper = edges[torch.arange(1, count + 1).mul(group).clamp(max=len(edges) - 1)]
    limits = torch.cat([-upper[:-1].flip(0), upper])
    return limits, torch.cat([negative[1:].flip(0), (negative[:1] + positive[:1]), positive[1:]])


def _without_gaps(limits: Tensor, counts: Tensor) -> tuple[list[float], list[int]]:
    """Without the empty buckets at the ends, and with one for each empty stretch between others."""
    filled = counts > 0
    if not filled.any():
        return [0.0], [0]
    before_filled = torch.cat([filled[1:], filled.new_zeros(1)])
    first = int(filled.nonzero()[0])
    keep = filled | before_filled
    keep[:first] = False
    return limits[keep].tolist(), counts[keep].tolist()


def _range(positive: Tensor, negative: Tensor, edges: Tensor) -> tuple[float, float]:
    """The outer edges of the outermost filled buckets; zeros and tiny values are at 0."""
    ends = []
    for far, near in ((negative, positive), (positive, negative)):
        if far[1:].any():
            ends.append(float(edges[int(far.nonzero()[-1]) + 1]))
        elif (far[0] + near[0]) > 0 or not near.any():
            ends.append(0.0)
        else:  # all on the other side: its innermost edge
            ends.append(-float(edges[int(near.nonzero()[0])]))
    return 0.0 - ends[0], ends[1]


def filled_buckets(counts: Tensor) -> list[Tensor]:
    """For each layer of (layers, buckets), on the host, the filled buckets: (filled, 2) pairs of bucket and count.

    Example:
        >>> filled_buckets(torch.tensor([[0, 5], [0, 0], [2, 1]]))[2].tolist()
        [[0, 2], [1, 1]]
    """
    return _pairs(*_without_empty_buckets(counts))


def _without_empty_buckets(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The buckets that are filled in any layer, (n,), and their counts, (layers, n)."""
    buckets = counts.sum(0).nonzero().flatten()
    return buckets, counts[:, buckets]


def _pairs(buckets: Tensor, counts: Tensor) -> list[Tensor]:
    """For each layer of (layers, n) counts of these buckets, (n,), pairs of bucket and count where it is not 0."""
    layer, column = counts.nonzero().unbind(1)
    per_layer = layer.bincount(minlength=len(counts)).tolist()
    return list(torch.stack([buckets[column], counts[layer, column]], 1).split(per_layer))


def to_pairs(counts: Tensor) -> list[list[list[int]]]:
    """For each layer the filled buckets, as pairs [bucket, count].

    Example:
        >>> from normzoo.functional.buckets import bucket_counts
        >>> to_pairs(bucket_counts(torch.tensor([1.0, 1.0]))[None])
        [[[1016, 2]]]
    """
    return [row.tolist() for row in filled_buckets(counts.cpu())]


def from_pairs(pairs: Sequence[Any], mantissa_bits: int) -> Tensor:
    """What :func:`to_pairs` described, in lists or in arrays (filled, 2), as (layers, 2^(9+m)) int64.

    Raises:
        ValueError: for a bucket that such a histogram does not have, or a negative count.
    """
    layout = Layout(mantissa_bits)
    counts = torch.zeros(len(pairs), layout.size, dtype=torch.int64)
    for layer, row in enumerate(pairs):
        bucket, count = torch.as_tensor(row, dtype=torch.int64).reshape(-1, 2).unbind(1)
        wrong = (bucket < 0) | (bucket >= layout.size) | (count < 0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"bucket {int(bucket[first])} with count {int(count[first])}: buckets go from 0 to {layout.size - 1} "
                f"with {mantissa_bits} mantissa bits, counts from 0"
            )
        counts[layer].index_add_(0, bucket, count)
    return counts
