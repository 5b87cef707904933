"""The environment variable that asks for measurements in a script that has none, and where it is not listened to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "NORMZOO"
_listened_to = True


def value() -> str:
    """The variable's value; empty if it is not set, and inside of :func:`no_measurements_added`."""
    return os.environ.get(VARIABLE, "").strip() if _listened_to else ""


@contextmanager
def no_measurements_added() -> Iterator[None]:
    """Inside, the variable is not listened to: for Trainers that replay a run, or that check a measurement."""
    global _listened_to
    before, _listened_to = _listened_to, False
    try:
        yield
    finally:
        _listened_to = before
