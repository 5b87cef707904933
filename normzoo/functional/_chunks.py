"""Tensors on a CPU cut into chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

Work = Sequence[tuple[int, Tensor]]

# Elements from which a tensor is worked on by itself; smaller ones are better taken together.
LARGE = 2**13
# Elements of a chunk: few enough for the cache, enough for torch's own threads. Threads of ours were no faster: they
# wait for the interpreter's lock, and for processors on which torch's still spin.
CHUNK = 2**19


def flattened(x: Tensor) -> Tensor:
    """The values, (n,), in any order, if possible without a copy."""
    x = x.detach()
    dense = x if x.is_contiguous() else x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    return dense.reshape(-1)


def by_size(tensors: Sequence[Tensor]) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
    """The values of each tensor with its number: of the small ones, and of those that are worked on by themselves.

    On other devices than the CPU all are small: nothing is gained by cutting them up.

    Raises:
        ValueError: if one is not floating point.
    """
    if wrong := next((x.dtype for x in tensors if not x.is_floating_point()), None):
        raise ValueError(f"a histogram counts floating point values, not {wrong}")
    small: list[tuple[int, Tensor]] = []
    large: list[tuple[int, Tensor]] = []
    for number, x in enumerate(tensors):
        (large if x.numel() >= LARGE and x.device.type == "cpu" else small).append((number, flattened(x)))
    return small, large


def chunks(tensors: Work) -> Iterator[tuple[int, Tensor]]:
    """The numbered 1-d tensors in pieces, in order."""
    for number, x in tensors:
        for chunk in x.split(CHUNK):
            yield number, chunk
