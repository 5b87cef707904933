"""Small results on their way to the host, put together over all ranks; and the share of each rank in measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normzoo.callbacks._run.facts import rank_and_ranks
from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import COLUMNS, merge_central_moments, no_values

_WORDS = 2 * COLUMNS  # int32 in a row of float64
REDUCTIONS = ("sum", "max", "min", "gather")


class Reading:
    """A small tensor on its way to the host, reduced over ranks if asked, to be read a step later.

    Args:
        value: a tensor of this call's own; it is overwritten by the reduction.
        reduce: ``"sum"``, ``"max"`` or ``"min"`` over ranks; ``"gather"``, those of all ranks along a new first
            dimension, which there is in one process as well; or None to leave each rank its own. Every rank must
            construct alike.
    """

    def __init__(self, value: Tensor, reduce: str | None = None) -> None:
        self._work: dist.Work | None = None
        self._event: torch.cuda.Event | None = None
        ranks = rank_and_ranks()[1]
        if reduce == "gather":
            own, value = value, value.unsqueeze(0)
            if ranks > 1:
                value = own.new_empty(ranks, *own.shape)
                self._work = dist.all_gather(list(value), own, async_op=True)  # into the rows
        elif reduce is not None and dist.is_available() and dist.is_initialized():
            self._work = dist.all_reduce(value, op=getattr(dist.ReduceOp, reduce.upper()), async_op=True)
        self._value = value
        if value.is_cuda:
            if self._work is not None:
                self._work.wait()  # orders the streams, does not block the host
                self._work = None
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value = host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The value on the host; waits if it has not arrived."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return self._value


class NamedReading:
    """Several small tensors as one :class:`Reading`, so that they take one reduction.

    They come back in the dtypes in which they were given, truth values as whole numbers, of which a sum is a count.
    Whole numbers beside floating-point ones are exact up to 2^53.
    """

    def __init__(self, values: Mapping[str, Tensor], reduce: str | None) -> None:
        given = {name: v.detach().long() if v.dtype == torch.bool else v.detach() for name, v in values.items()}
        self._shapes = {name: value.shape for name, value in given.items()}
        self._dtypes = [value.dtype for value in given.values()]
        flat = [value.flatten() for value in given.values()]
        if len({dtype.is_floating_point for dtype in self._dtypes}) > 1:
            flat = [value.to(torch.promote_types(value.dtype, torch.float64)) for value in flat]
        self._reading = Reading(torch.cat(flat), reduce)

    def read(self) -> dict[str, Tensor]:
        """The values on the host, with the first dimension that gathering adds."""
        flat = self._reading.read()
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = flat.split(sizes, dim=-1) if len(sizes) > 1 else (flat,)
        return {
            name: part.reshape((*flat.shape[:-1], *shape)).to(dtype)
            for (name, shape), dtype, part in zip(self._shapes.items(), self._dtypes, parts, strict=True)
        }


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds a part."""
    return hasattr(t, "device_mesh")


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """For each tensor the rank that measures it: the largest first, each to the rank with the least to do.

    Example:
        >>> owners([10, 50, 40, 5], ranks=2)
        [1, 0, 1, 0]
    """
    load = [0] * ranks
    found = [0] * len(sizes)
    if ranks == 1:
        return found
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = load.index(min(load))
        load[found[i]] += sizes[i]
    return found


def own_parts(tensors: Sequence[Tensor], every_rank: bool = False) -> list[Tensor | None]:
    """What this rank measures of each tensor, None for nothing: together the ranks measure every value once.

    Args:
        tensors: the same on all ranks, or shards (DTensor).
        every_rank: each rank has tensors of its own, all of which count.

    Raises:
        ValueError: for a DTensor whose values are still to be summed over ranks.
    """
    rank, ranks = rank_and_ranks()
    whole = [i for i, t in enumerate(tensors) if not is_sharded(t)]
    rank_of = dict(zip(whole, owners([tensors[i].numel() for i in whole], ranks), strict=True))
    parts: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        part = _shard(t) if i not in rank_of else t if every_rank or rank_of[i] == rank else None
        parts.append(part if part is not None and part.numel() else None)
    return parts


def _shard(t: Tensor) -> Tensor | None:
    """The local values of a DTensor; of ranks with the same ones, the first has them."""
    place = t.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if place is None:
        return None
    for placement, coordinate in zip(t.placements, place, strict=True):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise ValueError(f"a DTensor placed as {t.placements} is not reduced yet")  # type: ignore[attr-defined]
        if placement.is_replicate() and coordinate:
            return None
    return t.to_local()  # type: ignore[attr-defined]


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device, as a copy from ordinary memory would."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class SharedHistograms:
    """Histograms and moments of parts of tensors, on their way to the host, all ranks' put together.

    Args:
        found: counts, (measured, buckets) int64, and moments, (measured, 8) float64, of what this rank has; or None.
        measured: for each of their rows the number of its tensor.
        sizes: numbers of values of all tensors. Every rank must construct alike.
        mantissa_bits: of the histograms.
        every_rank: several ranks may have measured the same tensor.
        device: where collectives run.
    """

    def __init__(
        self,
        found: tuple[Tensor, Tensor] | None,
        measured: Sequence[int],
        sizes: Sequence[int],
        mantissa_bits: int,
        every_rank: bool,
        device: torch.device,
    ) -> None:
        rank, ranks = rank_and_ranks()
        self._complete = found if device.type == "cpu" and ranks == 1 and len(measured) == len(sizes) else None
        if self._complete is not None:  # nothing to put together, nothing to wait for
            return
        self._slots = ranks if every_rank else 1
        slot = rank if every_rank else 0
        # int32, unless a bucket could overflow. The moments' bits go along: a sum with zeros leaves bits as they are
        wide = max(sizes) >= 2**31
        dtype, words = (torch.int64, _WORDS // 2) if wide else (torch.int32, _WORDS)
        self._buckets = buckets = Layout(mantissa_bits).size
        packed = torch.zeros(len(sizes), buckets + words * self._slots, dtype=dtype, device=device)
        if found is not None:
            counts, moments = found
            rows = _to_device(torch.tensor(measured), device)
            packed[rows, :buckets] = counts.to(dtype)
            at = buckets + words * slot
            packed[rows, at : at + words] = moments.view(dtype)
        self._reading = Reading(packed, "sum")

    def read(self) -> tuple[Tensor, Tensor]:
        """(tensors, buckets) int64 and (tensors, 8) on the host; waits if they have not arrived."""
        if self._complete is not None:
            return self._complete
        packed = self._reading.read()
        counts = packed[:, : self._buckets].long()
        moments = (
            packed[:, self._buckets :]
            .clone(memory_format=torch.contiguous_format)
            .view(torch.float64)
            .view(len(packed), self._slots, COLUMNS)
        )
        # A rank that did not measure a tensor left zeros, which say that it had no values
        empty = moments[..., :1] == 0
        parts = torch.where(empty, no_values(1), moments).transpose(0, 1)
        return counts, merge_central_moments(parts) if self._slots > 1 else parts[0]
