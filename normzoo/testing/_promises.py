"""What a check is, and the decorator that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast


class Check(Protocol):
    """A function of what is checked whose docstring states the promise.

    Attributes:
        slow: whether it takes seconds rather than fractions of one.
    """

    __name__: str
    slow: bool

    def __call__(self, subject: Any, /) -> None:
        """Raise ``BrokenError`` or ``NotApplicableError``, or keep silent."""


def promise(*, slow: bool = False) -> Callable[[Callable[[Any], None]], Check]:
    """Decorator that makes a function a check."""

    def decorate(function: Callable[[Any], None]) -> Check:
        check = cast(Check, function)
        check.slow = slow
        return check

    return decorate


def text_of(check: Check) -> str:
    """The promise in words: the docstring on one line."""
    return " ".join((check.__doc__ or "").split())
