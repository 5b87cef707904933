"""NumPy's dtypes, scalars and arrays as text and bytes. Without torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_NATIVE = frozenset(np.dtype(name).str for name in ("?", *"bhilq", *"BHILQ", *"efd"))  # that torch has as well


def has_bytes(dtype: np.dtype[Any]) -> bool:
    """Whether values of a dtype are nothing but their bytes: no Python objects, no structures."""
    return not dtype.hasobject and dtype.fields is None and dtype.subdtype is None and dtype.kind in "biufcmMSU"


def is_native(dtype: np.dtype[Any]) -> bool:
    """Whether torch has the dtype too, in this order of bytes."""
    return dtype.str in _NATIVE


def dtype_of(text: Any) -> np.dtype[Any]:
    """The dtype of such a text as ``"<f4"``.

    Raises:
        ValueError: if there is none, or none whose values are nothing but their bytes.
    """
    try:
        dtype = np.dtype(str(text))
    except TypeError as error:
        raise ValueError(f"{text!r} is not a dtype of NumPy") from error
    if not has_bytes(dtype):
        raise ValueError(f"{text!r} is not a dtype of plain values")
    return dtype


def from_bytes(data: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """A writable array of these bytes.

    Raises:
        ValueError: if there are not as many bytes as values need.
    """
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not an array of {dtype} and shape {shape}")
    array: np.ndarray = np.ndarray(shape, dtype, bytearray(data))
    return array
