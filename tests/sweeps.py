"""How far the slow sweeps go: ``NORMZOO_SWEEPS=full make test-slow`` takes each to its end."""

import itertools
import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

FULL = os.environ.get("NORMZOO_SWEEPS") == "full"
EXAMPLES = 5000 if FULL else 250


def slow(*values: Any, id: str | None = None) -> Any:
    """A parameter set that ``make test`` leaves out, as another one stands for its class."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def cells(*axes: Iterable[Any], fast: Collection[tuple[Any, ...]]) -> list[Any]:
    """All combinations of the axes' values, of which ``make test`` holds those in ``fast``."""
    combinations = list(itertools.product(*axes))
    assert set(fast) <= set(combinations)
    return [values if values in fast else slow(*values) for values in combinations]


def few(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values, of which ``make test`` holds those in ``fast``."""
    values = list(values)
    assert set(fast) <= set(values)
    return [value if value in fast else slow(value) for value in values]
