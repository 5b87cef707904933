"""Histograms and central moments of many tensors, read from memory once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from normzoo.functional import _one_pass as one_pass
from normzoo.functional._chunks import by_size, chunks, flattened
from normzoo.functional.buckets import ChunkCounter, Layout, bucket_counts_all, count_small, separate_special
from normzoo.functional.central_moments import (
    COLUMNS,
    HIGH,
    LOW,
    SQUARES,
    ChunkMoments,
    central_moments,
    merge_central_moments,
    moments_of_small,
    no_values,
)

_RUN = 16  # neighbours that a sample takes together: a cache line
_GOLDEN = (5**0.5 - 1) / 2


def histogram_and_moments(
    tensors: Sequence[Tensor], mantissa_bits: int = 3, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`bucket_counts_all` and :func:`central_moments` of the same tensors.

    On a CPU, where Numba is installed, float32 and float64 tensors of 2^18 values and more together are read once, by
    compiled loops that sum moments in float64; otherwise PyTorch's functions sum those of float32 tensors in float32.
    The counts are the same.

    Args:
        tensors: one or more, floating point, not empty, of any shapes, on one device.
        mantissa_bits: m, from 0 to 7.
        compiled: whether to use Numba where it is installed and worthwhile.

    Returns:
        (len(tensors), 2^(9+m)) int64 counts, three more columns for m < 2, and (len(tensors), 8) float64 moments.

    Example:
        >>> counts, moments = histogram_and_moments([torch.tensor([1.0, 3.0]), torch.ones(5)])
        >>> counts.sum(1).tolist(), moments[:, 3].tolist()
        ([2, 5], [2.0, 1.0])
    """
    if tensors[0].device.type != "cpu":
        return bucket_counts_all(tensors, mantissa_bits), central_moments(tensors)
    if not (compiled and one_pass.is_worthwhile(tensors)):
        return _by_torch(tensors, mantissa_bits)
    own: list[int] = []
    others: list[int] = []
    for i, x in enumerate(tensors):
        (own if x.dtype in one_pass.DTYPES else others).append(i)
    counts, moments, irregular = one_pass.one_pass([tensors[i] for i in own], Layout(mantissa_bits))
    if irregular:
        moments[irregular] = central_moments([tensors[own[i]] for i in irregular])
    if not others:
        return counts, moments
    of_others = _by_torch([tensors[i] for i in others], mantissa_bits)
    order = torch.tensor([*own, *others]).argsort()
    return torch.cat([counts, of_others[0]])[order], torch.cat([moments, of_others[1]])[order]


def prepare(tensors: Iterable[Tensor]) -> None:
    """Load, or compile, what :func:`histogram_and_moments` of tensors such as these will need, before time matters.

    Compiling takes seconds, once for each version and processor, unless Numba's cache cannot be written.
    """
    one_pass.prepare(tensors)


def _by_torch(tensors: Sequence[Tensor], mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """:func:`histogram_and_moments` on a CPU by PyTorch's functions, in chunks that stay in cache."""
    layout = Layout(mantissa_bits)
    small, large = by_size(tensors)
    counts = torch.zeros(len(tensors), layout.size, dtype=torch.int64)
    moments = torch.empty(len(tensors), COLUMNS, dtype=torch.float64)
    if small:
        count_small(small, counts, layout)
        moments[[layer for layer, _ in small]] = moments_of_small([x for _, x in small])
    if large:
        counter, of_chunks = ChunkCounter(counts, layout), ChunkMoments()
        for layer, chunk in chunks(large):
            counter.add(layer, chunk)
            of_chunks.add(layer, chunk)
        separate_special(large, counts, layout)
        moments[[layer for layer, _ in large]] = of_chunks.merged()
    return counts, moments


def sampled_histogram_and_moments(
    tensors: Sequence[Tensor], budget: int, turn: int = 0, mantissa_bits: int = 3
) -> tuple[Tensor, Tensor]:
    """As :func:`histogram_and_moments`, of a :func:`sample` of each; extremes and sum of squares of all values."""
    counts, moments = histogram_and_moments([sample(x, budget, turn) for x in tensors], mantissa_bits)
    extremes = torch.stack([torch.stack(x.detach().aminmax()) for x in tensors]).double()
    moments[:, LOW], moments[:, HIGH] = extremes.T
    # In single precision where the squares are in its range, as is known on a CPU without waiting
    largest = extremes.abs().amax(1).tolist() if extremes.device.type == "cpu" else [0.0] * len(tensors)
    single = [torch.promote_types(x.dtype, torch.float32) for x in tensors]
    dtypes = [d if 1e-15 < high < 1e15 else torch.float64 for d, high in zip(single, largest, strict=True)]
    norms = [torch.linalg.vector_norm(x.detach(), dtype=d).double() for x, d in zip(tensors, dtypes, strict=True)]
    moments[:, SQUARES] = torch.stack(norms).square()
    return counts, moments


def sample(x: Tensor, budget: int, turn: int = 0) -> Tensor:
    """About ``budget`` values spread evenly over ``x``, in runs of 16 neighbours; all of them if there are no more.

    Args:
        x: any shape.
        budget: at least 16.
        turn: which of the samples; successive ones take other values.

    Returns:
        (n,) a copy of n <= budget values, n > budget - 16.
    """
    x = flattened(x)
    if x.numel() <= budget:
        return x
    runs = budget // _RUN
    step = x.numel() // runs
    places = x.numel() - (runs - 1) * step - _RUN + 1
    start = int(turn * _GOLDEN % 1 * places)  # spread evenly, however many turns are taken
    return x[start:].unfold(0, _RUN, step)[:runs].reshape(-1)


def merged(counts: Tensor, moments: Tensor, group: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Histograms and moments of groups of layers.

    Args:
        counts: (layers, buckets).
        moments: (layers, 8).
        group: for each layer the number of its group; the groups are numbered from 0.

    Returns:
        (groups, buckets) and (groups, 8).
    """
    groups = max(group) + 1
    if groups == len(group):
        return counts, moments
    index = torch.tensor(group)
    taken = [0] * groups
    table = no_values(groups).repeat(max(Counter(group).values()), 1, 1)
    for layer, g in enumerate(group):
        table[taken[g], g] = moments[layer]
        taken[g] += 1
    return counts.new_zeros(groups, counts.shape[1]).index_add_(0, index, counts), merge_central_moments(table)
