"""Passes in float32 of a module that computes in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)


class Widened(TorchDispatchMode):
    """Inside, each cast to half precision, and each tensor that is made in half precision, is of float32 instead.

    That is, also those that autocast makes, or a module by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with float32 in the place of half precision."""
        args, kwargs = tree_map(_wide, args), tree_map(_wide, kwargs or {})
        return func(*args, **kwargs)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside, a module has float32 in the place of half precision, in its tensors and in what it computes."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in HALF]
    dtypes = [t.dtype for t in tensors]
    for t in tensors:
        t.grad = None
        t.data = t.data.float()
    try:
        with Widened():
            yield
    finally:
        for t, dtype in zip(tensors, dtypes, strict=True):
            t.grad = None
            t.data = t.data.to(dtype)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    if isinstance(value, Tensor) and value.dtype in HALF:  # of the batch, or a constant that the module keeps
        return value.float()
    return value
