"""Batches in host memory, and checksums of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.ranks import Reading

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.device, torch.dtype)


class HostTensor(NamedTuple):
    """A tensor of a batch in host memory, and where it was."""

    value: Tensor
    device: torch.device
    requires_grad: bool

    def back(self) -> Tensor:
        """A copy where it was, which is a leaf."""
        on_cpu = self.device.type == "cpu"
        copied = self.value.clone() if on_cpu else self.value.to(self.device, non_blocking=True)
        return copied.requires_grad_(self.requires_grad)


def host_copy(batch: Any) -> Any:
    """A copy of a batch with a :class:`HostTensor` for each tensor; None if it holds objects that cannot be copied."""
    if not all(isinstance(value, (Tensor, np.ndarray, *_PLAIN)) for value in leaves(batch)):
        return None
    try:
        return apply_to_collection(batch, (Tensor, np.ndarray), _copied)
    except (AttributeError, TypeError, ValueError):  # of containers that are not made from what they hold
        return None


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    tensor = value.detach()
    if not tensor.is_cuda or tensor.layout != torch.strided:
        return HostTensor(tensor.cpu() if tensor.is_cuda else tensor.clone(), tensor.device, value.requires_grad)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return HostTensor(host.copy_(tensor, non_blocking=True), tensor.device, value.requires_grad)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor the sum of its values' bits, modulo 2^64, as 16 hexadecimal digits."""
    return {name: hexadecimal(bit_sum(local_values(t.detach()))) for name, t in tensors.items()}


def bit_sum(x: Tensor) -> Tensor:
    """The sum of the bits of all values, read as whole numbers, modulo 2^64: (), int64.

    It does not depend on the order of the values; a change of a single bit changes it.

    Example:
        >>> bit_sum(torch.tensor([1.0, 2.0])).item() == 0x3F800000 + 0x40000000
        True
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    x = x.values() if x.is_nested else x
    x = torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x.resolve_neg()
    x = x.to_dense() if x.layout != torch.strided else x
    return x.view(kinds[x.element_size()]).sum(dtype=torch.int64)


def leaves(value: Any) -> Iterator[Any]:
    """What is in a batch beside containers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, f.name, None) for f in fields(value)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for element in value:
            yield from leaves(element)
    else:
        yield value


def nbytes(value: Any) -> int:
    """The memory that a part of a batch takes, if it is a tensor or an array."""
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return value.numel() * value.element_size()
    return getattr(value, "nbytes", 0)


def batch_checksums(batch: Any) -> list[Reading]:
    """The checksum of each tensor of a batch, on its way to the host."""
    tensors = [value for value in leaves(batch) if isinstance(value, Tensor) and value.numel()]
    return [Reading(bit_sum(tensor.detach())) for tensor in tensors]


def hexadecimal(value: Tensor) -> str:
    """A checksum as 16 hexadecimal digits."""
    return f"{int(value) % 2**64:016x}"
