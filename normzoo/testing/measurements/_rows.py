"""How the rows of two fits are compared."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import pandas as pd

from normzoo.testing._compare import BrokenError


def same_rows(what: str, got: pd.DataFrame, want: pd.DataFrame, tolerance: float = 0.0) -> None:
    """Break unless two records hold the same rows.

    Args:
        what: which rows, for messages.
        got: the rows that came out.
        want: the rows that were expected.
        tolerance: how far numbers may be off, as a share of the largest magnitude in their column; 0 for equality bit
            for bit.
    """
    steps = [sorted(set(frame["step"])) for frame in (got, want)]
    if steps[0] != steps[1]:
        raise BrokenError(f"{what}: rows of the steps {steps[0]} came out, {steps[1]} were expected")
    if len(got) != len(want):
        raise BrokenError(f"{what}: {len(got)} rows came out, {len(want)} were expected")
    for column in want.columns:
        size = max((_size(value) for value in want[column]), default=0.0)
        for place, (a, b) in enumerate(zip(got[column], want[column], strict=True)):
            if not _alike(a, b, tolerance * size):
                raise BrokenError(
                    f"{what}: {column} at step {want['step'].iloc[place]}, row {place} of {len(want)}: {_text(a)} came "
                    f"out, {_text(b)} was expected" + (f"; allowed {tolerance * size:.3g}" if tolerance else "")
                )


def same_finite(what: str, got: pd.DataFrame, want: pd.DataFrame) -> None:
    """Break unless the rows are of the same steps, and no number is NaN or infinite that is finite in the others."""
    for step in sorted({*got["step"], *want["step"]}):
        if (count := int((got["step"] == step).sum())) != (expected := int((want["step"] == step).sum())):
            raise BrokenError(f"{what}: {count} rows of step {step} came out, {expected} were expected")
    for column in want.columns:
        for a, b, step in zip(got[column], want[column], want["step"], strict=True):
            if isinstance(b, float | np.ndarray) and not np.isfinite(a).all() and np.isfinite(b).all():
                raise BrokenError(
                    f"{what}: {column} at step {step}: {_text(a)} came out, where without that step it is {_text(b)}"
                )


def of_steps(rows: pd.DataFrame, *steps: int) -> pd.DataFrame:
    """The rows of some steps."""
    return rows[rows["step"].isin(steps)].reset_index(drop=True)


def _size(value: Any) -> float:
    """The largest finite magnitude; 0 for what is no number."""
    if isinstance(value, np.ndarray):
        finite = value[np.isfinite(value)]
        return float(np.abs(finite).max()) if finite.size else 0.0
    return abs(float(value)) if isinstance(value, numbers.Real) and math.isfinite(value) else 0.0


def _alike(a: Any, b: Any, allowed: float) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape):
            return False
        return bool(np.isclose(a, b, rtol=0, atol=allowed, equal_nan=True).all())
    if isinstance(a, float) and isinstance(b, float):  # as numpy's float64 is
        return bool(a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= allowed)
    return bool(a == b) or bool(pd.isna(a) and pd.isna(b))


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return np.array2string(value, threshold=8, max_line_width=10_000)
    return f"{value:.9g}" if isinstance(value, float) else repr(value)
