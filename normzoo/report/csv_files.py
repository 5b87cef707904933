"""The data frames of runs as CSV files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normzoo.report.frames import Runs


def write_csv(runs: Runs, folder: Path) -> list[Path]:
    """Write ``runs.csv``, ``metrics.csv`` and ``records/NAME.csv``, the frames of :func:`normzoo.load_runs`.

    Floats are written with as many digits as tell them apart, so that ``pandas.read_csv(path,
    float_precision="round_trip")`` reads the same bits. NaN and what is missing is empty, infinities are ``inf``.
    A curve or histogram in a cell is written as JSON, ``[0.0, 0.5]``, with ``NaN`` and ``Infinity`` in it.

    Args:
        runs: at least one.
        folder: is made if it is not there; other files in it stay.

    Returns:
        the files.

    Raises:
        OSError: if one cannot be written; what was there before is then still there.
    """
    frames = {"runs": runs.runs, "metrics": runs.metrics}
    frames |= {f"records/{name}": frame for name, frame in runs.records.items()}
    paths = []
    for name, frame in frames.items():
        path = folder / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(frame, path)
        paths.append(path)
    return paths


def _write(frame: pd.DataFrame, path: Path) -> None:
    partial = path.with_name(path.name + ".part")
    flat = pd.DataFrame({name: _flat(frame[name]) for name in frame})
    try:
        flat.to_csv(partial, index=False, encoding="utf-8", errors="backslashreplace", lineterminator="\n")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _flat(values: pd.Series) -> pd.Series:
    """A column of text and numbers: arrays as JSON, narrow floats as wide ones of the same value."""
    if values.dtype == np.float32 or values.dtype == np.float16:
        return values.astype(np.float64)
    return values.map(_cell) if values.dtype == object else values


def _cell(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
