"""The tensors of a batch by their paths, and the samples that it can be divided into."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
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

    def without(self, batch: Any, rows: Collection[int]) -> Any:
        """The samples of the batch but some."""
        return _rows(batch, self.samples, [i for i in range(self.samples) if i not in rows], self.in_lists)


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


class Leaf(NamedTuple):
    """A dense tensor of a batch, or an array of numbers as a tensor.

    Attributes:
        path: where it is, such as ``batch[0]["image"]``; ``[i]`` is the place in a list that has one for each sample.
        tensor: detached.
        row: that place, of a tensor of a single sample; else None.
    """

    path: str
    tensor: Tensor
    row: int | None


def tensor_leaves(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The paths and tensors of a batch."""
    for leaf in leaves(batch, Division(0)):
        yield leaf.path, leaf.tensor


def leaves(batch: Any, divided: Division) -> Iterator[Leaf]:
    """The dense tensors of a batch, of lists that have a place for each sample with these places."""
    samples = divided.samples if divided.in_lists else 0
    return _leaves(batch, samples, "batch", None)


def _leaves(value: Any, samples: int, path: str, row: int | None) -> Iterator[Leaf]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        yield Leaf(path, torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="))), row)
    elif isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_nested and not value.is_quantized:
            yield Leaf(path, value.detach(), row)
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            label = f'["{key}"]' if isinstance(key, str) else f"[{key!r}]"
            yield from _leaves(inside, samples, f"{path}{label}", row)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), samples, f"{path}.{field.name}", row)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        is_list = isinstance(value, list | tuple) and row is None and (path != "batch" or _is_of_mappings(value))
        if is_list and samples and len(value) == samples:
            for index, inside in enumerate(value):
                yield from _leaves(inside, samples, f"{path}[i]", index)
        else:
            for index, inside in enumerate(value):
                yield from _leaves(inside, samples, f"{path}[{index}]", row)


def _rows(batch: Any, samples: int, part: slice | Sequence[int], in_lists: bool) -> Any:
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
