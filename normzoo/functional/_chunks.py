"""Work on many tensors on a CPU, in chunks that stay in cache and on several threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Work = Sequence[tuple[int, Tensor]]

# Elements from which a tensor is cut up; smaller ones are better taken together.
LARGE = 2**13
# Elements of a chunk: of one thread those that stay in its cache; of several more, since each operation of one waits
# for the interpreter's lock, which the others hold between theirs.
ALONE, TOGETHER = 2**17, 2**19
# Elements from which threads pay, and how many: more would wait for the interpreter's lock.
PARALLEL, THREADS = 2**20, 8


def flattened(x: Tensor) -> Tensor:
    """The values, (n,), in any order, if possible without a copy."""
    x = x.detach()
    dense = x if x.is_contiguous() else x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    return dense.reshape(-1)


def in_chunks(tensors: Work, do: Callable[[Work], Result]) -> list[Result]:
    """What ``do`` makes of shares of the chunks that the numbered tensors are cut into.

    Args:
        tensors: pairs of a number and a 1-d tensor on the CPU.
        do: called with pairs of the number and a chunk, in order; torch releases the interpreter's lock inside each
            operation, so that the threads of several calls run at once.

    Returns:
        the results in the order of the tensors, one for each of the threads used.
    """
    threads = available_threads() if sum(x.numel() for _, x in tensors) >= PARALLEL else 1
    work = [(number, chunk) for number, x in tensors for chunk in x.split(TOGETHER if threads > 1 else ALONE)]
    threads = min(threads, len(work))
    if threads < 2:
        return [do(work)]
    shares = [work[len(work) * i // threads : len(work) * (i + 1) // threads] for i in range(threads)]
    with _one_thread_each(), ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(do, share) for share in shares[1:]]
        first = do(shares[0])
        return [first, *(other.result() for other in others)]


def available_threads() -> int:
    """How many threads may work at once."""
    return min(torch.get_num_threads(), THREADS)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, operations of this thread, and of those that start here, have no threads of torch's own below them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
