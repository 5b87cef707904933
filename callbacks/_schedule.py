"""When to sample: predicates of the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """True at steps 0, n, 2n, ...

    A class rather than a closure, so that callbacks can be pickled for spawned processes.

    Raises:
        ValueError: for n below 1.

    Example:
        >>> [step for step in range(7) if Every(3)(step)]
        [0, 3, 6]
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {self.n}")

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return step % self.n == 0
