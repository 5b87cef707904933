"""The tensors of a batch by their paths, and the samples that it can be divided into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normzoo.callbacks._run.parts import IndivisibleError, rows_of


class Division(NamedTuple):
    """How a batch is divided into samples.

    Attributes:
        samples: how many it has.
        why_not: why it cannot be divided, for people; empty if it can.
        in_lists: whether lists and tuples have a sample at each place, too, as those of images of different sizes.
    """

    samples: int
    why_not: str = ""
    in_lists: bool = False

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """The samples of the batch from ``start`` to before ``stop``."""
        return _rows(batch, self.samples, slice(start, stop), self.in_lists)


def division(batch: Any) -> Division:
    """How a batch is divided: by the first dimension that all tensors share, or else by lists of as many samples.

    Example:
        >>> division((torch.zeros(4, 3), {"label": torch.zeros(4), "name": list("abcd")})).samples
        4
        >>> division((torch.zeros(4, 3), torch.zeros(5))).why_not
        'a tensor of shape (5,) in a batch of 4 samples does not have a row for each sample'
    """
    tensors = [value for _, value in tensor_leaves(batch) if value.ndim]
    if not tensors:
        return Division(0, "the batch has no tensor with a dimension of samples")
    lists = _lists_below(batch)
    candidates = [(len(tensors[0]), False), *((len(of_samples), True) for of_samples in lists)]
    if any(_is_of_numbers(of_samples) for of_samples in lists):  # one for each sample, whatever other tensors are
        candidates = [*candidates[1:], candidates[0]]
    why_not = ""
    for samples, in_lists in candidates:
        try:
            _rows(batch, samples, slice(0, 1), in_lists)
        except IndivisibleError as error:
            why_not = why_not or f"{error} does not have a row for each sample"
            continue
        if samples:
            return Division(samples, "", in_lists)
        why_not = "the batch is empty"
    return Division(0, why_not)


def tensor_leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The dense tensors and arrays of numbers in a batch, as tensors, by paths such as ``batch[0]["image"]``."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf" and batch.dtype.itemsize <= 8:
        yield path, torch.from_numpy(np.array(batch, dtype=batch.dtype.newbyteorder("=")))
    elif isinstance(batch, Tensor):
        if batch.layout == torch.strided and not batch.is_nested and not batch.is_quantized:
            yield path, batch.detach()
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensor_leaves(value, f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensor_leaves(getattr(batch, field.name, None), f"{path}.{field.name}")
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for index, value in enumerate(batch):
            yield from tensor_leaves(value, f"{path}[{index}]")


def _rows(batch: Any, samples: int, part: slice, in_lists: bool) -> Any:
    if not (in_lists and isinstance(batch, list | tuple)) or _is_of_mappings(batch):
        return rows_of(batch, samples, part, in_lists)
    inside = [rows_of(value, samples, part, in_lists) for value in batch]  # the outermost one has parts of all samples
    return type(batch)(*inside) if hasattr(batch, "_fields") else type(batch)(inside)


def _is_of_mappings(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and bool(batch) and all(isinstance(value, Mapping) for value in batch)


def _lists_below(batch: Any) -> list[Sequence[Any]]:
    """Lists and tuples of tensors in the outermost container, or that itself if it is one of mappings."""
    if _is_of_mappings(batch):
        return [batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        inside = [getattr(batch, field.name, None) for field in dataclasses.fields(batch)]
    elif isinstance(batch, Mapping):
        inside = list(batch.values())
    else:
        inside = list(batch) if isinstance(batch, list | tuple) else []
    lists = [value for value in inside if isinstance(value, list | tuple)]
    return [value for value in lists if any(True for _ in tensor_leaves(value))]


def _is_of_numbers(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(isinstance(value, Tensor) and not value.ndim for value in values)
