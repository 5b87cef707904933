"""Histograms and central moments of tensors on a CPU in one pass over memory, by loops that Numba compiles.

The loops run without the interpreter's lock, in as many threads as torch is set to use, which are kept for the next
call: starting them takes a millisecond. A fork starts its own; a threading layer of Numba's would not outlive it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import torch
from torch import Tensor

from normzoo.functional._chunks import flattened
from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import COLUMNS, merge_central_moments, no_values

# Values in all from which the pass is worth the second that importing Numba takes.
WORTHWHILE = 2**18
# Values that a thread takes at a time; a piece is counted in 32 bits.
PIECE = 2**19
DTYPES = (torch.float32, torch.float64)
_INTEGERS = {torch.float32: np.uint32, torch.float64: np.uint64}

Kernel = Callable[..., bool]


@cache
def available() -> bool:
    """Whether Numba can be imported, and compiles."""
    try:
        import numba
    except ImportError:
        return False
    return not getattr(numba.config, "DISABLE_JIT", 0)


def is_worthwhile(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are measured by :func:`one_pass`: those that can be are large enough, and Numba is there."""
    return sum(t.numel() for t in tensors if t.device.type == "cpu" and t.dtype in DTYPES) >= WORTHWHILE and available()


def prepare(tensors: Iterable[Tensor]) -> None:
    """Load the kernels for tensors such as these, if :func:`one_pass` will measure them."""
    tensors = list(tensors)
    if is_worthwhile(tensors):
        for dtype in {t.dtype for t in tensors if t.dtype in DTYPES}:
            kernel(dtype)


def one_pass(tensors: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor, list[int]]:
    """Histograms, exact, and central moments, summed in float64, of tensors on a CPU.

    Args:
        tensors: float32 or float64, not empty, of any shapes.
        layout: of the histograms.

    Returns:
        (len(tensors), layout.size) int64 counts; (len(tensors), 8) float64 moments; and the numbers of the tensors
        whose moments have to be computed otherwise, as they have values that are not finite, or float64 values whose
        fourth powers are not in range.
    """
    counts = np.empty((len(tensors), layout.size), dtype=np.int64)
    flat = [flattened(x).numpy(force=True) for x in tensors]
    pieces = [
        (layer, tensors[layer].dtype, x[start : start + PIECE])
        for layer, x in enumerate(flat)
        for start in range(0, len(x), PIECE)
    ]
    several = [i for i, (layer, _, _) in enumerate(pieces) if tensors[layer].numel() > PIECE]
    tables = dict(zip(several, np.empty((len(several), layout.size), dtype=np.int64), strict=True))
    rows = np.empty((len(pieces), COLUMNS))
    regular = np.empty(len(pieces), dtype=bool)
    kernels = {dtype: kernel(dtype) for dtype in {x.dtype for x in tensors}}
    # The largest first, so that all threads end at about the same time
    to_do = iter(sorted(range(len(pieces)), key=lambda i: -len(pieces[i][2])))

    def work() -> None:
        for i in to_do:  # which the threads share: each piece is taken once
            layer, dtype, x = pieces[i]
            table = tables.get(i, counts[layer])
            bits = x.view(_INTEGERS[dtype])
            regular[i] = kernels[dtype](
                x, bits, layout.mantissa_bits, layout.infinity, layout.nan, layout.overflow, table, rows[i]
            )

    _in_threads(work, sum(t.numel() for t in tensors))
    layers = np.array([layer for layer, _, _ in pieces])
    counts[layers[several]] = 0
    for i, table in tables.items():
        counts[layers[i]] += table
    others = sorted({int(layer) for layer in layers[~regular]})
    return torch.from_numpy(counts), _merged(torch.from_numpy(rows), layers), others


def _in_threads(work: Callable[[], None], size: int) -> None:
    """Do the work in this thread, and at the same time in as many others as torch may use and the size is worth."""
    others = min(torch.get_num_threads(), size // PIECE + 1) - 1
    if not others:
        work()
        return
    running = [_threads(others).submit(work) for _ in range(others)]
    try:
        work()
    finally:
        wait(running)
    for each in running:
        each.result()


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    """So many threads, which wait for work until the process ends."""
    return ThreadPoolExecutor(number, thread_name_prefix="normzoo")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _merged(rows: Tensor, layers: np.ndarray) -> Tensor:
    """(layers, 8) from (pieces, 8) and the layer of each piece, in rising order."""
    per_layer = np.bincount(layers)
    number = np.arange(len(layers)) - np.repeat(per_layer.cumsum() - per_layer, per_layer)
    table = no_values(len(per_layer)).repeat(int(per_layer.max()), 1, 1)
    table[torch.from_numpy(number), torch.from_numpy(layers)] = rows
    return merge_central_moments(table) if len(table) > 1 else table[0]


@cache
def kernel(dtype: torch.dtype) -> Kernel:
    """The compiled loop for tensors of float32 or float64."""
    from normzoo.functional import _kernels

    return _kernels.of_float32() if dtype == torch.float32 else _kernels.of_float64()
