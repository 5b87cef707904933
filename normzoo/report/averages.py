"""Means and bands over the seeds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def over_seeds(curves: Sequence[tuple[Sequence[Any] | np.ndarray, Sequence[float] | np.ndarray]]) -> pd.DataFrame:
    """Mean, spread and range over seeds at each ``x``, of those that have a value there.

    A seed that ended early, or has no value at an ``x``, is not among those there: ``n`` says of how many a row is.

    Args:
        curves: ``x`` and ``y`` of each seed; several values of a seed at one ``x`` count as one, their mean. NaN is no
            value.

    Returns:
        a row for each ``x``, numbers in ascending order, with ``x``, ``mean``, ``spread`` (standard deviation with
        n - 1; NaN of one seed), ``low``, ``high`` and ``n``. Where no seed has a value ``n`` is 0, the rest NaN.
    """
    places = [x if isinstance(x, np.ndarray) else [*x] for x, _ in curves]
    values = [np.asarray(y, dtype=float) for _, y in curves]
    seeds = (pd.DataFrame({"x": x, "y": y, "seed": n}) for n, (x, y) in enumerate(zip(places, values, strict=True)))
    rows = pd.concat(seeds, ignore_index=True)
    if rows.duplicated(["x", "seed"]).any():
        rows = rows.groupby(["x", "seed"], sort=False)["y"].mean().reset_index()
    table = rows.groupby("x", sort=pd.api.types.is_numeric_dtype(rows["x"]))["y"]
    columns = {"mean": "mean", "spread": "std", "low": "min", "high": "max", "n": "count"}
    return table.agg(**columns).reset_index()
