"""Signed histograms whose buckets are a float's sign, exponent and leading mantissa bits.

A value's bucket is read off its bits, so no range has to be chosen, and histograms add up over layers, ranks and
time. With m mantissa bits there are 2^m buckets to each power of two. First come the non-negative values by magnitude,
from bucket 2^(8+m) on the negative ones by magnitude; a bucket is the leading 9 + m bits of the value as a float32.
Apart are counted

- ``0``: zeros, of either sign;
- ``2^(8+m)``, the bits of -0: *tiny* values of either sign, not zero but below 2^-(126+m) in magnitude: subnormal
  float32 numbers, and float64 values below float32's range;
- ``255 * 2^m`` and ``2^(8+m) + 255 * 2^m``, the bits of +infinity and -infinity: these;
- three more, for NaN and for float64 values of 2^128 and more in magnitude, positive and negative. They follow the
  bucket of +infinity; for m < 2, where there is no room, they follow all others.

Other subnormal float32 numbers, from 2^-(126+m) to 2^-126, have the buckets of their bits. Half precision is widened
and float64 truncated, so that each value is in the bucket that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo.functional._chunks import CHUNK, Work, by_size, chunks

# Elements on a GPU, or in small tensors, whose buckets are held in memory at a time.
TOGETHER = 2**22


@dataclass(frozen=True)
class Layout:
    """Where a histogram with m mantissa bits counts what.

    Example:
        >>> Layout(3).size, Layout(3).nan, Layout(0).size, Layout(0).nan
        (4096, 2041, 515, 512)
    """

    mantissa_bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.mantissa_bits <= 7:
            raise ValueError(f"mantissa_bits must be from 0 to 7, not {self.mantissa_bits}")

    @property
    def half(self) -> int:
        """2^(8+m): the buckets of one sign, and the bucket of tiny values."""
        return 1 << (8 + self.mantissa_bits)

    @property
    def infinity(self) -> int:
        """The bucket of +infinity, and the number of finite magnitude buckets; -infinity has this + half."""
        return 255 << self.mantissa_bits

    @property
    def nan(self) -> int:
        """The bucket of NaN; the next two are those of float64 values beyond float32's range."""
        return self.infinity + 1 if self.mantissa_bits >= 2 else 2 * self.half

    @property
    def overflow(self) -> int:
        """The bucket of values of 2^128 and more; the next is that of -2^128 and less."""
        return self.nan + 1

    @property
    def size(self) -> int:
        """How many buckets there are: 2^(9+m), and 3 more for m < 2."""
        return 2 * self.half + (0 if self.mantissa_bits >= 2 else 3)


def bucket_counts(x: Tensor, mantissa_bits: int = 3) -> Tensor:
    """Count the values of ``x`` in each bucket; on a GPU, without reading anything back to the host.

    Args:
        x: any shape, float16, bfloat16, float32 or float64; each is counted exactly.
        mantissa_bits: m, from 0 to 7.

    Returns:
        (2^(9+m),) int64 on the device of ``x``; three more for m < 2.

    Raises:
        ValueError: if ``x`` is not floating point, or m out of range.

    Example:
        >>> bucket_counts(torch.tensor([1.0, 1.1, -1.0, 0.0]), mantissa_bits=3).nonzero().flatten().tolist()
        [0, 1016, 3064]
    """
    return bucket_counts_all([x], mantissa_bits)[0]


def bucket_counts_all(tensors: Sequence[Tensor], mantissa_bits: int = 3) -> Tensor:
    """:func:`bucket_counts` of many tensors on one device, in one pass over all of them.

    On a CPU, large tensors are counted in chunks that stay in cache, and small ones together.

    Args:
        tensors: one or more, floating point, of any shapes.
        mantissa_bits: m, from 0 to 7.

    Returns:
        (len(tensors), 2^(9+m)) int64 on their device; three more columns for m < 2.

    Raises:
        ValueError: for no tensor, one that is not floating point, or m out of range.

    Example:
        >>> bucket_counts_all([torch.ones(2, 3), torch.zeros(5)]).sum(1).tolist()
        [6, 5]
    """
    layout = Layout(mantissa_bits)
    if not tensors:
        raise ValueError("there must be at least one tensor to count")
    small, large = by_size(tensors)
    counts = torch.zeros(len(tensors), layout.size, dtype=torch.int64, device=tensors[0].device)
    if large:
        counter = ChunkCounter(counts, layout)
        for layer, chunk in chunks(large):
            counter.add(layer, chunk)
        separate_special(large, counts, layout)
    count_small(small, counts, layout)
    return counts


def count_small(tensors: Work, counts: Tensor, layout: Layout) -> None:
    """Add numbered 1-d tensors to rows of ``counts``, many at a time, reading nothing back to the host."""
    for group in _groups(tensors):
        _count(group, counts, layout)


def _bits(x: Tensor, mantissa_bits: int) -> Tensor:
    """The bits, int32, of the values as float32; of float64 no more than the leading mantissa bits, not rounded."""
    if x.dtype != torch.float64:
        return x.float().view(torch.int32)
    cut = (x.view(torch.int64) & -(1 << (52 - mantissa_bits))).view(torch.float64)
    bits = cut.float().view(torch.int32)
    # What is subnormal as a float32 is 0 after the conversion if the processor is told to flush; so it is scaled before
    scale = 126 + mantissa_bits
    whole = (cut.abs() * 2.0**scale).clamp_(max=1 << mantissa_bits).int() << (23 - mantissa_bits)
    return torch.where(cut.abs() < 2.0**-126, whole | (bits & -(2**31)), bits)


def _bits_but_sign(x: Tensor) -> Tensor:
    """0 for zeros of either sign only; a processor that flushes subnormal numbers compares them as equal to zero."""
    return x.view(torch.int64) << 1 if x.dtype == torch.float64 else x.float().view(torch.int32) << 1


class ChunkCounter:
    """Adds chunks on a CPU to rows of ``counts`` by their leading bits.

    Infinity, NaN and overflow are then still together: :func:`separate_special` tells them apart.
    """

    def __init__(self, counts: Tensor, layout: Layout) -> None:
        self._layout = layout
        self._rows = counts[:, : 2 * layout.half].unbind()
        # Counting is faster the narrower the numbers
        self._memory = torch.empty(CHUNK, dtype=torch.int16 if layout.half < 2**15 else torch.int32)

    def add(self, layer: int, chunk: Tensor) -> None:
        """Count a 1-d chunk of the tensor of this number."""
        layout, memory = self._layout, self._memory[: chunk.numel()]
        bits = _bits(chunk, layout.mantissa_bits)
        bucket = torch.bitwise_right_shift(bits, 23 - layout.mantissa_bits, out=memory)
        found = torch.bincount(bucket.bitwise_and_(2 * layout.half - 1), minlength=2 * layout.half)
        if small := sum(found[:: layout.half].tolist()):  # zero and tiny values share leading bits
            found[0] = zeros = len(chunk) - torch.count_nonzero(_bits_but_sign(chunk))
            found[layout.half] = small - zeros
        self._rows[layer].add_(found)


def separate_special(tensors: Work, counts: Tensor, layout: Layout) -> None:
    """Tell infinity, NaN and overflow apart, in the layers that hold any."""
    half, top = layout.half, layout.infinity
    special = counts[:, : 2 * half].unflatten(1, (2, half))[:, :, top:]
    found = special.sum((1, 2)).tolist()
    for layer, x in tensors:
        if found[layer]:
            row = counts[layer]
            special[layer] = 0
            kinds = torch.stack([_special(c) for c in x.split(CHUNK)]).sum(0)
            row[top], row[half + top], row[layout.overflow], row[layout.overflow + 1] = kinds.unbind()
            row[layout.nan] = found[layer] - kinds.sum()


def _special(x: Tensor) -> Tensor:
    """How many are +infinity, -infinity, and finite from 2^128 and to -2^128."""
    infinite = [(x == math.inf).sum(), (x == -math.inf).sum()]
    if x.dtype != torch.float64:
        return torch.stack([*infinite, *torch.zeros_like(infinite[0]).expand(2)])
    return torch.stack([*infinite, (x >= 2.0**128).sum() - infinite[0], (x <= -(2.0**128)).sum() - infinite[1]])


def _groups(tensors: Work) -> Iterator[list[tuple[int, Tensor]]]:
    """Pieces of one dtype to count together, of a size that bounds the temporaries."""
    by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    room = dict.fromkeys((x.dtype for _, x in tensors), TOGETHER)
    for layer, x in tensors:
        for chunk in x.split(TOGETHER):
            room[x.dtype] -= chunk.numel()
            if room[x.dtype] < 0 and x.dtype in by_dtype:
                yield by_dtype.pop(x.dtype)
                room[x.dtype] = TOGETHER - chunk.numel()
            by_dtype.setdefault(x.dtype, []).append((layer, chunk))
    yield from by_dtype.values()


def _count(group: list[tuple[int, Tensor]], counts: Tensor, layout: Layout) -> None:
    """Add tensors of one dtype to rows of ``counts``, reading nothing back; bincount on a GPU reads its maximum."""
    bucket = _bucket(torch.cat([x for _, x in group]), layout)
    of_layers = bucket.split([x.numel() for _, x in group])
    _ADD([(layer, of_layer) for (layer, _), of_layer in zip(group, of_layers, strict=True)], bucket, counts)


def add_by_scatter(of_layers: Work, together: Tensor, counts: Tensor) -> None:
    """Count by ``scatter_add_``, in one call: an atomic addition for each value, exact for any number of them.

    Args:
        of_layers: for each row of ``counts`` that is added to its number, and (n,) int64 buckets; overwritten.
        together: the memory of all these.
        counts: (layers, buckets) int64, on the same device.
    """
    torch._foreach_add_([bucket for _, bucket in of_layers], [layer * counts.shape[1] for layer, _ in of_layers])
    counts.view(-1).scatter_add_(0, together, torch.ones_like(together))


def add_by_histc(of_layers: Work, together: Tensor, counts: Tensor) -> None:
    """As :func:`add_by_scatter`, by ``torch.histc`` of the buckets' numbers in a fixed range, one call for each layer.

    ``histc`` counts in the dtype of its input. A float32 is exact up to 2^24, so that layers of more values are counted
    in float64, which is exact up to 2^53. The numbers of buckets are below 2^17, and each is in the middle of its bin,
    so that no rounding takes it to the next.
    """
    size = counts.shape[1]
    for layer, bucket in of_layers:
        numbers = bucket.to(torch.float32 if len(bucket) <= 2**24 else torch.float64)
        counts[layer] += torch.histc(numbers, size, min=-0.5, max=size - 0.5).long()


# How values are counted on a GPU, and small tensors on a CPU. Both functions give the same counts; which of them is
# faster on a GPU has not been measured.
_ADD = add_by_scatter


def _bucket(x: Tensor, layout: Layout) -> Tensor:
    """The bucket of each value, int64."""
    half, top = layout.half, layout.infinity
    bucket = (_bits(x, layout.mantissa_bits) >> (23 - layout.mantissa_bits)).bitwise_and_(2 * half - 1)
    magnitude = bucket & (half - 1)
    bucket = torch.where(magnitude == 0, half, bucket).masked_fill_(_bits_but_sign(x) == 0, 0)
    if x.dtype == torch.float64:
        beyond = torch.where(x > 0, layout.overflow, layout.overflow + 1).int()
        bucket = torch.where((magnitude >= top) & ~x.isinf(), beyond, bucket)
    return bucket.masked_fill_(x.isnan(), layout.nan).long()
