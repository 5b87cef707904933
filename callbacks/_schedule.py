"""When to sample: predicates of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], bool]


def every(n: int) -> Schedule:
    """True at steps 0, n, 2n, ...

    Raises:
        ValueError: for n below 1.

    Example:
        >>> [step for step in range(7) if every(3)(step)]
        [0, 3, 6]
    """
    if n < 1:
        raise ValueError(f"every_n_steps must be at least 1, not {n}")
    return lambda step: step % n == 0
