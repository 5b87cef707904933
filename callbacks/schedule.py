"""When to sample: predicates of the optimizer step.

Functions of the step alone, so that a resumed run samples where an uninterrupted one does; classes rather than
closures, so that callbacks can be pickled for spawned processes.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Protocol, TypeGuard


class Schedule(Protocol):
    """Whether to sample at a step: any function of it, the same on all ranks."""

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""


def as_schedule(value: int | Schedule, name: str = "every_n_steps") -> Schedule:
    """The schedule that an argument means: itself, or :class:`Every` for a whole number.

    Raises:
        ValueError: for numbers below 1.
        TypeError: for anything else; ``name`` is what the message calls it.
    """
    if isinstance(value, type) or not (callable(value) or is_whole(value)):
        raise TypeError(
            f"{name} must be a whole number or a schedule such as LogSpaced(20), a function of the step, not {value!r}"
        )
    if callable(value):
        return value
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return Every(value)


@dataclass(frozen=True)
class Every(Schedule):
    """True at steps 0, n, 2n, ...

    Raises:
        ValueError: for n below 1 or not whole.

    Example:
        >>> [step for step in range(7) if Every(3)(step)]
        [0, 3, 6]
    """

    n: int

    def __post_init__(self) -> None:
        _check("n", self.n, 1)

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return step % self.n == 0


@dataclass(frozen=True)
class Warmup(Schedule):
    """False before step ``start``, then what ``inner`` says of the same step.

    Args:
        start: the first step that can be sampled.
        inner: a schedule, or n for every n-th step.

    Raises:
        ValueError: for a start below 0 or not whole, or an ``inner`` below 1.

    Example:
        >>> [step for step in range(20) if Warmup(5, Every(4))(step)]
        [8, 12, 16]
    """

    start: int
    inner: int | Schedule = 1

    def __post_init__(self) -> None:
        _check("start", self.start, 0)
        object.__setattr__(self, "inner", as_schedule(self.inner, "inner"))

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return step >= self.start and self.inner(step)  # type: ignore[operator]


@dataclass(frozen=True)
class LogSpaced(Schedule):
    """True at step 0 and at 10^(k/per_decade), rounded, for k = 0, 1, 2, ...: dense at the start, sparse later.

    Every step is sampled up to about 0.43 ``per_decade``; after that there are ``per_decade`` samples each time that
    the step grows tenfold.

    Raises:
        ValueError: for ``per_decade`` below 1 or not whole.

    Example:
        >>> [step for step in range(200) if LogSpaced(5)(step)]
        [0, 1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100, 158]
    """

    per_decade: int = 20

    def __post_init__(self) -> None:
        _check("per_decade", self.per_decade, 1)

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        if step < 1:
            return step == 0
        first = math.ceil(self.per_decade * math.log10(step - 0.5))  # k of the first point that rounds to step or more
        return any(round(10 ** (k / self.per_decade)) == step for k in (first - 1, first, first + 1))


def is_whole(value: object) -> bool:
    """Whether it is a whole number, and neither True nor False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, and neither True nor False."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(name: str, value: object, least: int) -> None:
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
