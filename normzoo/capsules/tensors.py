"""Tensors and arrays as dense tensors that safetensors can hold, and what else is to be known of them, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normzoo._errors import one_line
from normzoo.capsules.arrays import dtype_of, from_bytes, is_native

DTYPES = {  # as safetensors 0.4.5 names them, largest values first
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AS_BYTES = {  # stored as U8
    torch.complex128,
    torch.complex64,
    torch.complex32,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
}
Parts = tuple[Tensor, dict[str, Any]]


def why_not(tensor: Tensor) -> str | None:
    """Why a tensor's values cannot be stored; None if they can."""
    name = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if torch.nn.parameter.is_lazy(tensor):
        return f"{name} without values yet"
    tensor = _own_part(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        return f"{name}, a class that wraps other tensors"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"{name} of the layout {tensor.layout}{', nested' if tensor.is_nested else ''}"
    if tensor.dtype not in DTYPES and tensor.dtype not in _AS_BYTES:
        return f"{name} of {tensor.dtype}"
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":
        return f"{name} without values, on the meta device"
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1 if tensor.numel() else 0
    if end * tensor.dtype.itemsize > storage.nbytes() or (tensor.numel() and not storage.data_ptr()):
        return f"{name} whose memory is freed"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh")


def _own_part(tensor: Tensor) -> Tensor:
    """Of a DTensor the part of this rank, any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def unreadable(device: torch.device) -> str | None:
    """Why no tensor on a device can be read, as after a failed assertion in one of its kernels; None if it can."""
    try:
        torch.ones(1, device=device).cpu()
    except RuntimeError as error:
        return f"a tensor on {device}, which cannot be read: {one_line(error, longest=120)}"
    return None


def parts(tensor: Tensor) -> Parts:
    """A dense tensor that has each value once, in the order of memory, and how the tensor is made of it.

    Of a DTensor the part of this rank. The values are not copied, unless safetensors has not their dtype.

    Args:
        tensor: one that :func:`why_not` has nothing against.

    Returns:
        the dense tensor; and, where they say anything, ``order``, the dimensions of ``tensor`` by their strides;
        ``strides``, if those of dimensions of size 1 are not the usual ones; ``shape``, if it repeats values;
        ``dtype``, if the dense tensor has their bytes; ``requires_grad``; and ``placements`` and ``global_shape`` of a
        DTensor.
    """
    about: dict[str, Any] = {}
    if tensor.requires_grad:
        about["requires_grad"] = True
    if is_sharded(tensor):
        about["placements"] = [str(placement) for placement in tensor.placements]  # type: ignore[attr-defined]
        about["global_shape"] = list(tensor.shape)
    dense = _own_part(tensor).detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    if dense.numel():
        shape, strides = list(dense.shape), dense.stride()
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            if stride == 0 and size > 1:
                dense = dense.narrow(dim, 0, 1)
                about["shape"] = shape
        order = sorted(range(dense.dim()), key=lambda dim: -strides[dim])
        if order != sorted(order):
            about["order"] = order
            dense = dense.permute(order)
        if "shape" not in about and _fit(own := _dense_strides(shape, order), strides, shape) and own != list(strides):
            about["strides"] = list(strides)  # kernels go by those of dimensions of size 1, too
    if dense.dtype in _AS_BYTES:
        about |= {"dtype": str(dense.dtype).removeprefix("torch."), "dense_shape": list(dense.shape)}
        dense = _flat_bytes(dense)
    return dense, about


def _dense_strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """The strides of a tensor without gaps whose dimensions are in that order in memory, the last one the densest."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return strides


def _fit(usual: Sequence[int], strides: Any, shape: Sequence[int]) -> bool:
    """Whether strides are the usual ones but for dimensions of size 1, so that no memory beyond the tensor is read."""
    return (
        isinstance(strides, list | tuple)
        and len(strides) == len(shape)
        and all(type(stride) is int and 0 <= stride < 2**62 for stride in strides)
        and all(size == 1 or a == b for a, b, size in zip(usual, strides, shape, strict=True))
    )


def _flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's values, in order, as a tensor of uint8; a copy only if there are gaps between them."""
    if tensor.dtype.itemsize == 1:  # torch cannot allocate float4 while algorithms are deterministic
        tensor = tensor.view(torch.uint8)
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # also where 1 is not the stride


def joined(dense: Tensor, about: Mapping[str, Any]) -> Tensor:
    """The tensor of which :func:`parts` were taken; of a DTensor the part of one rank.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: if ``about`` does not go with the dense tensor.
    """
    tensor = dense.detach()  # requires_grad is that of one of those that share the values
    if "dtype" in about:
        dtype = _torch_dtype(about["dtype"])
        tensor = tensor.view(dtype).reshape(about["dense_shape"])
    if "order" in about:
        order = about["order"]
        tensor = tensor.permute([order.index(dim) for dim in range(tensor.dim())])
    if "shape" in about:
        tensor = tensor.expand(about["shape"])
    if "strides" in about:
        strides = about["strides"]
        if not _fit(tensor.stride(), strides, tensor.shape):
            raise ValueError(f"strides {strides} are none of a tensor of the shape {tuple(tensor.shape)}")
        tensor = tensor.as_strided(tensor.shape, strides)
    return tensor.requires_grad_() if about.get("requires_grad") else tensor


def _torch_dtype(name: Any) -> torch.dtype:
    """The dtype of such a name as ``"float32"``."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of torch")
    return dtype


def array_parts(array: np.ndarray) -> Parts:
    """As :func:`parts`, of an array of values that are nothing but their bytes."""
    if is_native(array.dtype):
        array = np.asarray(array, order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy()), {}
    about = {"dtype": array.dtype.str, "dense_shape": list(array.shape)}
    return bytes_tensor(array.tobytes()), about


def array_joined(dense: Tensor, about: Mapping[str, Any]) -> np.ndarray:
    """As :func:`joined`, of an array."""
    if "dtype" not in about:
        array: np.ndarray = dense.numpy()
        return array
    return from_bytes(data_of(dense), dtype_of(about["dtype"]), tuple(about["dense_shape"]))


def bytes_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor of uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def alias(dense: Tensor) -> tuple[Any, ...]:
    """What tensors of the same values in the same memory have in common."""
    place = (dense.device, dense.data_ptr(), dense.stride()) if dense.numel() else ()
    return dense.dtype, dense.shape, *place


def data_of(dense: Tensor) -> bytes | memoryview:
    """The bytes of a tensor's values, copied to the host, in order."""
    host = dense.cpu()
    return _flat_bytes(host).numpy().data if host.numel() else b""


def plain_object(tag: str, text: Any) -> torch.dtype | torch.device | torch.Size:
    """The object of torch of such a tag and text as ``"$device"`` and ``"cuda:0"``."""
    makers: dict[str, Callable[[Any], Any]] = {"$dtype": _torch_dtype, "$device": torch.device, "$size": torch.Size}
    made: torch.dtype | torch.device | torch.Size = makers[tag](text)
    return made


def leaf(tag: str, about: Mapping[str, Any], load: Callable[[str], Tensor]) -> Any:
    """The tensor, array or bytes of an object of a skeleton, whose dense tensor is loaded by its name."""
    dense = load(about[tag])
    if tag == "$bytes":
        return bytes(data_of(dense))
    return array_joined(dense, about) if tag == "$array" else joined(dense, about)
