"""Extremes and central moments of many tensors in one pass, in a form that merges over chunks, shards and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from normzoo.functional._chunks import by_size, chunks

# Columns: the number of values, least and greatest, their mean, the sums of powers 2 to 4 of what they are off it, and
# the sum of their squares, which may be of more values than the others are.
COUNT, LOW, HIGH, MEAN, M2, M3, M4, SQUARES = range(8)
COLUMNS = 8
# Elements on a GPU that are held in double precision at a time.
TOGETHER = 2**24
# Magnitudes whose fourth powers, summed over a chunk, are within float32's range.
SMALL, BIG = 1e-6, 1e6

Row = tuple[float, ...]


def central_moments(tensors: Sequence[Tensor]) -> Tensor:
    """Count, extremes, mean and central sums of powers of each tensor; on a GPU, without waiting for it.

    Args:
        tensors: one or more, floating point, not empty, of any shapes, on one device.

    Returns:
        (len(tensors), 8) float64 on their device: n, least and greatest value, mean, M2, M3, M4, the sums of
        (x - mean)^k, and the sum of x^2. What is infinite or NaN shows in all but n.

    Example:
        >>> central_moments([torch.tensor([1.0, 3.0])]).tolist()
        [[2.0, 1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 10.0]]
    """
    small, large = by_size(tensors)
    if tensors[0].device.type != "cpu":
        return torch.stack([_of_device(x) for _, x in small])
    found = torch.empty(len(tensors), COLUMNS, dtype=torch.float64)
    if small:
        found[[layer for layer, _ in small]] = moments_of_small([x for _, x in small])
    if large:
        moments = ChunkMoments()
        for layer, chunk in chunks(large):
            moments.add(layer, chunk)
        found[[layer for layer, _ in large]] = moments.merged()
    return found


def merge_central_moments(parts: Tensor) -> Tensor:
    """Those of several samples taken together; a sample may be empty.

    With d_i the distance of a part's mean from that of all: ``M2 = sum_i M2_i + n_i d_i^2``,
    ``M3 = sum_i M3_i + 3 d_i M2_i + n_i d_i^3``, ``M4 = sum_i M4_i + 4 d_i M3_i + 6 d_i^2 M2_i + n_i d_i^4``.

    Args:
        parts: (parts, ..., 8) as of :func:`central_moments`.

    Returns:
        (..., 8).

    Source: Pebay 2008, Sandia report SAND2008-6212; for M2 Chan, Golub & LeVeque 1979.
    """
    count, low, high, mean, m2, m3, m4, squares = parts.unbind(-1)
    n = count.sum(0)
    whole = mean[0] + (count * (mean - mean[0])).sum(0) / n.clamp(min=1)
    d = torch.where(count > 0, mean - whole, 0.0)
    rows = [n, low.amin(0), high.amax(0), whole, (m2 + count * d**2).sum(0)]
    rows.append((m3 + 3 * d * m2 + count * d**3).sum(0))
    rows.append((m4 + 4 * d * m3 + 6 * d**2 * m2 + count * d**4).sum(0))
    rows.append(squares.sum(0))
    return torch.stack(rows, -1)


def no_values(layers: int) -> Tensor:
    """(layers, 8): the moments of nothing, from which merging starts."""
    return torch.tensor([0.0, torch.inf, -torch.inf, *[0.0] * 5], dtype=torch.float64).repeat(layers, 1)


def largest_magnitude(moments: Tensor) -> Tensor:
    """The largest |x|, (...)."""
    return torch.maximum(moments[..., LOW].abs(), moments[..., HIGH].abs())


def euclidean_norm(moments: Tensor) -> Tensor:
    """The root of the sum of squares, (...)."""
    return moments[..., SQUARES].sqrt()


def kurtosis(moments: Tensor) -> Tensor:
    """Biased excess kurtosis, (...): ``n M4 / M2^2 - 3``; NaN if all values are equal."""
    spread = moments[..., HIGH] != moments[..., LOW]
    found = moments[..., COUNT] * moments[..., M4] / moments[..., M2] ** 2 - 3
    return torch.where(spread, found, torch.nan)


def moments_of_small(tensors: Sequence[Tensor]) -> Tensor:
    """:func:`central_moments` of small 1-d tensors on a CPU, all in a few calls, in double precision."""
    sizes = np.array([x.numel() for x in tensors])
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    x = torch.cat([x.double() if x.dtype != tensors[0].dtype else x for x in tensors]).double().numpy()

    def sums(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts)

    with np.errstate(invalid="ignore", over="ignore"):
        mean = sums(x) / sizes
        d = x - np.repeat(mean, sizes)
        square = d * d
        rows = [sizes, np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts), mean]
        rows += [sums(square), sums(square * d), sums(square * square), sums(x * x)]
    return torch.from_numpy(np.stack(rows, 1))


class ChunkMoments:
    """Moments of 1-d chunks on a CPU."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Row]] = {}
        self._memory = torch.empty(0)

    def add(self, layer: int, chunk: Tensor) -> None:
        """Take in a chunk of the tensor of this number."""
        wide = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        if self._memory.dtype != wide.dtype or len(self._memory) < len(wide):
            self._memory = torch.empty_like(wide)
        self._rows.setdefault(layer, []).append(_of_chunk(wide, self._memory[: len(wide)]))

    def merged(self) -> Tensor:
        """(tensors, 8), in the order in which they came."""
        nothing = tuple(no_values(1)[0].tolist())
        most = max(map(len, self._rows.values()))
        table = [[*rows, *[nothing] * (most - len(rows))] for rows in self._rows.values()]
        return merge_central_moments(torch.tensor(table, dtype=torch.float64).transpose(0, 1))


def _of_chunk(x: Tensor, memory: Tensor) -> Row:
    n, (low, high) = len(x), (v.item() for v in x.aminmax())
    largest = max(-low, high)
    scale = 1.0
    if 0 < largest < torch.inf and not SMALL < largest < BIG:
        scale = 2.0 ** math.frexp(largest)[1]  # by which x is divided without rounding
        x = x * (1 / scale) if 2**-126 <= scale <= 2**126 else (x.double() / scale).to(x.dtype)
    mean, m2, m3, m4 = _around(x, 0.0, memory)
    if 2 * mean * mean * n > m2:  # what is summed should not be far larger than what is asked for
        mean, m2, m3, m4 = _around(x, mean, memory)
    if low == high:
        m2 = m3 = m4 = 0.0  # their mean's rounding is no spread
    # by products: a power that is out of range would be an error
    s2 = scale * scale
    mean, m2 = mean * scale, m2 * s2
    squares = largest if largest == torch.inf else m2 + n * mean * mean
    return n, low, high, mean, m2, m3 * s2 * scale, m4 * s2 * s2, squares


def _around(x: Tensor, shift: float, memory: Tensor) -> tuple[float, float, float, float]:
    """Mean, M2, M3 and M4 from the sums of powers of x - shift."""
    n, x = len(x), x - shift if shift else x
    square = torch.mul(x, x, out=memory)
    s1, s2 = x.sum().item(), square.sum().item()
    s3, s4 = torch.dot(square, x).item(), torch.dot(square, square).item()
    mean = s1 / n
    m2 = s2 - s1 * mean
    m3 = s3 - 3 * mean * s2 + 2 * s1 * mean**2
    return shift + mean, m2, m3, s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * s1 * mean**3


def _of_device(x: Tensor) -> Tensor:
    """(8,) of a 1-d tensor, in double precision and without a branch on what is found."""
    parts = []
    for chunk in x.split(TOGETHER):
        wide = chunk.double()
        low, high = wide.aminmax()
        d = wide - wide.mean()
        d = torch.where(low == high, 0.0, d)
        square = d.square()
        sums = [square.sum(), torch.dot(square, d), torch.dot(square, square), torch.dot(wide, wide)]
        parts.append(torch.stack([wide.new_full((), len(wide)), low, high, wide.mean(), *sums]))
    return merge_central_moments(torch.stack(parts))
