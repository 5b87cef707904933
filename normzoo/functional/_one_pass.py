"""Histograms and central moments of tensors on a CPU in one pass over memory, by loops that Numba compiles.

The loops run without the interpreter's lock, in as many threads as torch is set to use, which are kept for the next
call: starting them takes a millisecond. A fork starts its own; a threading layer of Numba's would not outlive it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import COLUMNS

# Values in all from which the pass is worth the second that importing Numba takes.
WORTHWHILE = 2**18
# Values that a thread takes at a time; a piece is counted in 32 bits.
PIECE = 2**20
# Tensors of up to so many values share one call of a kernel, which takes as long as counting thousands of values.
SMALL = 2**12
# Small tensors to a call, so that several threads have some.
TOGETHER = 2**6
DTYPES = (torch.float32, torch.float64)
_SUBNORMAL = 5e-324  # equal to 0 where the processor flushes subnormal numbers
_INTEGERS = {torch.float32: np.uint32, torch.float64: np.uint64}

Kernel = Callable[..., None]


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
        merging()


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
    jobs = _jobs([x.numpy(force=True).ravel("K") for x in tensors], counts)  # in the order of memory, if possible
    starts = np.cumsum([0, *(len(job.layers) for job in jobs)]).tolist()
    rows, regular = np.empty((starts[-1], COLUMNS)), np.empty(starts[-1], dtype=bool)
    places = layout.mantissa_bits, layout.infinity, layout.nan, layout.overflow
    kernels = {dtype: kernel(dtype) for dtype in {x.dtype for x in tensors}}
    to_do = iter([(job, slice(*ends)) for job, ends in zip(jobs, pairwise(starts), strict=True)])

    def work() -> None:
        for job, own in to_do:  # an iterator of a list, which threads can share: each job is taken once
            dtype = tensors[job.layers[0]].dtype
            pieces = np.array(job.ends, dtype=np.int64), np.array(job.places, dtype=np.int64)
            found = job.counts, rows[own], regular[own]
            kernels[dtype](job.values, job.values.view(_INTEGERS[dtype]), *pieces, *places, *found)

    _in_threads(work, sum(x.numel() for x in tensors))
    for job in jobs:
        if job.counts is not counts:
            counts[job.layers] += job.counts
    layers = np.array([layer for job in jobs for layer in job.layers], dtype=np.int64)
    moments = np.empty((len(tensors), COLUMNS))
    merging()(rows, layers, moments)
    return torch.from_numpy(counts), torch.from_numpy(moments), sorted({int(layer) for layer in layers[~regular]})


class _Job(NamedTuple):
    """Pieces of tensors that one call of a kernel measures."""

    layers: list[int]  # the number of the tensor of each piece
    values: np.ndarray  # of all pieces, one after the other
    ends: list[int]  # where each piece ends
    counts: np.ndarray  # (..., buckets), in which they are counted
    places: list[int]  # the row for each piece


def _jobs(tensors: Sequence[np.ndarray], counts: np.ndarray) -> list[_Job]:
    """The jobs for 1-d tensors, the largest first, so that all threads end at about the same time.

    A tensor is counted in its row of ``counts``; the pieces of a large one after the first have tables of their own.
    """
    jobs: list[_Job] = []
    small: dict[np.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if len(x) <= SMALL:
            small.setdefault(x.dtype, []).append(i)
            continue
        for start in range(0, len(x), PIECE):
            values = x[start : start + PIECE]
            table, place = (np.empty_like(counts[:1]), 0) if start else (counts, i)
            jobs.append(_Job([i], values, [len(values)], table, [place]))
    for alike in small.values():
        for start in range(0, len(alike), TOGETHER):
            layers = alike[start : start + TOGETHER]
            ends = np.cumsum([len(tensors[i]) for i in layers]).tolist()
            jobs.append(_Job(layers, np.concatenate([tensors[i] for i in layers]), ends, counts, layers))
    return sorted(jobs, key=lambda job: -len(job.values))


def _in_threads(work: Callable[[], None], size: int) -> None:
    """Do the work in this thread, and at the same time in as many others as torch may use and the size is worth."""
    others = min(torch.get_num_threads(), size // PIECE + 1) - 1
    if not others:
        work()
        return
    threads = _threads(others, flushes=_SUBNORMAL == 0)
    running = [threads.submit(work) for _ in range(others)]
    try:
        work()
    finally:
        wait(running)
    for each in running:
        each.result()


@cache
def _threads(number: int, flushes: bool) -> ThreadPoolExecutor:
    """So many threads, which wait for work until the process ends.

    A thread takes subnormal numbers for 0 if the one that started it did (`torch.set_flush_denormal`), as ``flushes``
    tells, and goes on so: a caller has threads that do as it does.
    """
    return ThreadPoolExecutor(number, thread_name_prefix="normzoo")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


@cache
def kernel(dtype: torch.dtype) -> Kernel:
    """The compiled loop for tensors of float32 or float64."""
    from normzoo.functional import _kernels

    return _kernels.of_float32() if dtype == torch.float32 else _kernels.of_float64()


def is_loaded() -> bool:
    """Whether this process has loaded kernels, so that Numba's functions are at hand."""
    return kernel.cache_info().currsize > 0


@cache
def merging() -> Callable[..., None]:
    """The compiled function that merges moments of pieces into those of layers."""
    from normzoo.functional import _kernels

    return _kernels.merging()
