"""A GPU that is not there: tensors that claim to be on it, and an error for whatever would wait for it.

Fake tensors have shapes, dtypes and devices and no values, so what is read of them on the host raises by itself
(``.item()``, ``bool()``, ``nonzero()``). A copy that blocks, in either direction, does not: a dispatch mode sees it.
Backward passes need the driver, and are not to be had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = (DataDependentOutputException, DynamicOutputShapeException)  # what fake tensors raise when they are read


class BlockingCopyError(AssertionError):
    """A copy between host and GPU for which the host waits."""


class _Copies(TorchDispatchMode):
    """Refuses copies between devices that block; of non-blocking ones to the GPU the source has to be pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            devices = {source.device.type, result.device.type}
            if len(devices) > 1 and blocking:
                raise BlockingCopyError(f"{name} from {source.device} to {result.device} blocks")
        return result


fake_cuda = FakeTensorMode  # in which tensors can be made on the device "cuda"
no_waiting = _Copies  # within it: in which a copy that blocks is an error


def on_gpu(*shape: int, requires_grad: bool = False) -> Tensor:
    """A tensor that claims to be on a GPU."""
    return torch.randn(shape, device="cuda", requires_grad=requires_grad)
