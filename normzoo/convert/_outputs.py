"""Comparing what a model, or its layers, computed in two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 4096


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in containers and in the attributes of objects, such as the outputs of detectors, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif not isinstance(value, type | nn.Module) and hasattr(value, "__dict__") and not callable(value):
        inner = vars(value).values()
    for element in inner:
        yield from tensors_in(element, seen)


def floating(value: Any) -> list[Tensor]:
    """Copies of the floating-point tensors in a model's outputs."""
    return [t.detach().clone() for t in tensors_in(value) if t.is_floating_point()]


def comparable(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether two runs returned tensors of the same shapes, and some values."""
    return [t.shape for t in before] == [t.shape for t in now] and any(t.numel() for t in before)


def sampled(y: Tensor) -> Tensor:
    """At most 4,096 values of a tensor, at positions that depend on its size alone."""
    flat = y.detach().reshape(-1)
    if flat.numel() <= _SAMPLED:
        return flat.clone()
    generator = torch.Generator().manual_seed(flat.numel())
    return flat[torch.randint(flat.numel(), (_SAMPLED,), generator=generator).to(flat.device)]
