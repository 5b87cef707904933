"""Logged metrics as a tidy frame, from the files of Lightning's CSVLogger and TensorBoardLogger."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from normzoo.report.event_files import PATTERN, Events, read_events
from normzoo.report.files import text_of_file
from normzoo.report.run import RunError

CSV = "metrics.csv"
_TIMES = ("step", "epoch")  # columns beside the metrics
_PLACEHOLDER = "hp_metric"  # Lightning logs -1 under this name if nothing else is logged with hyperparameters


def tidy(rows: Iterable[Mapping[str, float]]) -> pd.DataFrame:
    """The frame ``step``, ``epoch``, ``metric``, ``value`` of rows of numbers, which have a ``step`` each.

    The rows of a metric are together, in their order.

    Example:
        >>> tidy([{"step": 0, "loss": 2.0}, {"step": 1, "epoch": 0, "loss": 1.5, "acc": 0.5}]).values.tolist()
        [[0, nan, 'loss', 2.0], [1, 0.0, 'loss', 1.5], [1, 0.0, 'acc', 0.5]]
    """
    columns: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        step, epoch = int(row["step"]), row.get("epoch", np.nan)
        for name, value in row.items():
            if name not in _TIMES:
                columns.setdefault(name, []).append((step, epoch, value))
    return _frame(columns)


def _frame(columns: Mapping[str, Sequence[tuple[int, float, float]]]) -> pd.DataFrame:
    rows = [row for values in columns.values() for row in values]
    counts = [len(values) for values in columns.values()]
    return pd.DataFrame(
        {
            "step": np.array([step for step, _, _ in rows], dtype=np.int64),
            "epoch": np.array([epoch for _, epoch, _ in rows], dtype=np.float64),
            "metric": pd.Series(np.repeat(np.array([*columns], dtype=object), counts), dtype="str"),
            "value": np.array([value for _, _, value in rows], dtype=np.float64),
        }
    )


def read_csv(path: Path) -> pd.DataFrame:
    """The metrics in a file of CSVLogger; a last line without an end was being written when the process was killed.

    Raises:
        RunError: if it is damaged; the message names the line.
    """
    text = text_of_file(path) if path.parent.is_dir() else None
    if not text or "\n" not in text:
        return tidy([])
    lines = csv.reader(io.StringIO(text[: text.rindex("\n") + 1], newline=""), strict=True)
    rows: list[dict[str, float]] = []
    texts: dict[str, int] = {}  # columns in which a value is no number -> its line
    try:
        header = next(lines)
        if "step" not in header or len(set(header)) < len(header):
            raise RunError(f"{path} is damaged: line 1 is not a header of different columns with a step among them")
        for line in lines:
            if len(line) != len(header):
                raise RunError(
                    f"{path} is damaged: line {lines.line_num} has {len(line)} values for {len(header)} columns"
                )
            numbers = {name: _number(value) for name, value in zip(header, line, strict=True) if value}
            step = numbers.get("step")
            if step is None or not 0 <= step < 2**63 or step != int(step):
                raise RunError(f"{path} is damaged: the step in line {lines.line_num} is not a whole number")
            for name in (name for name, value in numbers.items() if value is None):
                texts.setdefault(name, lines.line_num)
            rows.append({name: value for name, value in numbers.items() if value is not None})
    except (csv.Error, StopIteration) as error:
        raise RunError(f"{path} is damaged: line {lines.line_num} is not CSV") from error
    for name, number in texts.items():
        if any(name in row for row in rows):
            raise RunError(f"{path} is damaged: the value of {name!r} in line {number} is not a number")
    return tidy(rows)


def event_paths(folder: Path) -> list[Path]:
    """TensorBoard's event files right in a folder."""
    return sorted(path for path in folder.glob(PATTERN) if path.is_file())


def read_event_files(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The scalars in a folder's event files, with those of ``add_scalars`` right below it; and what is damaged.

    A run that went on writes a file of its own: values of earlier files at the steps of a metric that a later one has
    again, and after these, are left out. The epoch is that which Lightning logs beside other metrics at the same step.
    """
    problems: list[str] = []
    series: dict[str, list[tuple[int, float]]] = {}
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and event_paths(path))]:
        files = []
        for path in event_paths(place):
            try:
                files.append(read_events(path))
            except OSError as error:
                problems.append(f"{path} cannot be read: {error.strerror}")
        problems += [f"{events.path} is damaged: {events.damage}" for events in files if events.damage]
        for tag, values in _series(files).items():
            name = tag if place == folder else _of_scalars(tag, place.name)
            series.setdefault(name, values)
    epochs = dict(series.pop("epoch", []))
    if {value for _, value in series.get(_PLACEHOLDER, [])} == {-1.0}:
        del series[_PLACEHOLDER]
    columns = {
        name: [(step, epochs.get(step, np.nan), value) for step, value in values] for name, values in series.items()
    }
    return _frame(columns), problems


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The metrics of several files of one run; one that an earlier frame has is taken from there."""
    kept: list[pd.DataFrame] = []
    for frame in frames:
        known = {name for other in kept for name in other["metric"].unique()}
        kept.append(frame[~frame["metric"].isin(known)])
    filled = [frame for frame in kept if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else tidy([])


def _series(files: Sequence[Events]) -> dict[str, list[tuple[int, float]]]:
    """The values of each tag over files of one run, by step."""
    series: dict[str, list[tuple[int, float]]] = {}
    for events in sorted(files, key=lambda events: events.start):
        of_file: dict[str, list[tuple[int, float]]] = {}
        for tag, step, value in events.scalars:
            of_file.setdefault(tag, []).append((step, value))
        for tag, values in of_file.items():
            start = min(step for step, _ in values)
            series[tag] = [row for row in series.get(tag, []) if row[0] < start] + values
    return series


def _of_scalars(tag: str, folder: str) -> str:
    """The name of a curve that ``add_scalars(tag, {name: value})`` writes into a folder ``TAG_NAME`` of its own."""
    prefix = tag.replace("/", "_") + "_"
    return f"{tag}/{folder.removeprefix(prefix)}" if folder.startswith(prefix) else f"{folder}/{tag}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
