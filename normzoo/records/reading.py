"""Records as data frames."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from normzoo.records.schema import FIGURES, MEANING, VERSION, read_figures
from normzoo.records.segments import Contents, RecordError, read_segment, segment_paths


def load_run(path: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """The records of a run: quantity -> data frame, rows in step order.

    Curves are 1-d arrays; histograms are arrays of rows (bucket, count). A batch that was cut off when a process was
    killed is left out, and so are rows that a run resumed at an earlier step has written again. ``frame.attrs`` holds
    ``quantity``, ``meaning`` (column -> what it is), ``segments`` (files read), ``broken_batches`` and
    ``superseded_rows`` (what was left out), ``versions`` (of normzoo, that wrote it), ``figures``, what the measurement
    asks to be drawn, and ``says_figures``, whether the record says so, unlike those of earlier versions. Of a process
    that was killed before it had written which columns there are, the frame has the column ``step`` alone.

    Args:
        path: a run folder, or the folder that the callbacks write to (the first logger's, or ``dirpath``), or one with
            runs in ``normzoo_logs/version_N``, where callbacks without a logger write: of these the newest is read.

    Raises:
        FileNotFoundError: if there is no such folder, or no records in it.
        RecordError: (a ValueError) if a file is not a record, or was damaged after it was written.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give a run's folder")
    frames = read_records(folder) or _newest_run(folder / "normzoo_logs")
    if not frames:
        raise FileNotFoundError(
            f"no records (QUANTITY-NNN.arrows) in {folder} or {folder / 'metrics'}; the callbacks write them into the "
            "folder of the Trainer's first logger, into their dirpath, or without either into normzoo_logs/version_N"
        )
    return frames


def _newest_run(folder: Path) -> dict[str, pd.DataFrame]:
    """The records in ``version_N`` with the largest N that has any."""
    versions = {
        int(m[1]): m[0] for path in folder.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", path.name))
    }
    runs = (read_records(folder / versions[number]) for number in sorted(versions, reverse=True))
    return next((frames for frames in runs if frames), {})


def read_records(folder: Path) -> dict[str, pd.DataFrame]:
    """As :func:`load_run`, but without records there are no frames."""
    paths = segment_paths(folder)
    if not paths and (folder / "metrics").is_dir():
        paths = segment_paths(folder / "metrics")
    read = {name: [read_segment(p) for p in segments] for name, segments in paths.items()}
    return {name: _frame(name, segments) for name, segments in read.items()}


def _frame(name: str, segments: Sequence[Contents]) -> pd.DataFrame:
    written = [s for s in segments if s.schema is not None]
    tables: list[pa.Table] = []
    superseded, limit = 0, math.inf
    for segment in reversed(written):
        table = pa.Table.from_batches(segment.batches, segment.schema)
        kept = table.filter(pc.less(table["step"], limit))
        superseded += table.num_rows - kept.num_rows
        tables.insert(0, kept)
        limit = min(limit, segment.start_step)
    try:
        joined = pa.concat_tables(tables or [pa.table({"step": pa.array([], pa.int64())})], promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        files = f"{written[0].path} to {written[-1].path.name}"
        raise RecordError(f"{files} do not go together, columns have changed their types: {error}") from error
    frame = pd.DataFrame({field.name: _values(joined[field.name]) for field in joined.schema})
    frame = frame.sort_values("step", kind="stable", ignore_index=True)
    frame.attrs = {
        "quantity": name,
        "meaning": {f.name: f.metadata[MEANING.encode()].decode() for f in joined.schema if f.metadata},
        "figures": read_figures(written[-1].metadata) if written else [],
        "says_figures": any(FIGURES in s.metadata for s in written[-1:]),
        "segments": len(segments),
        "broken_batches": sum(s.broken for s in segments),
        "superseded_rows": superseded,
        "versions": sorted({s.metadata[VERSION] for s in written}),
    }
    return frame


def _values(column: pa.ChunkedArray) -> Any:
    if pa.types.is_list(column.type):
        return pd.Series([item for chunk in column.chunks for item in _items(chunk)], dtype=object)
    return column.to_pandas()


def _items(lists: pa.ListArray) -> Iterable[Any]:
    """The lists of a column as arrays of their own; structs become rows."""
    values = lists.flatten()
    if pa.types.is_struct(values.type):
        fields = [values.field(i).to_numpy(zero_copy_only=False) for i in range(values.type.num_fields)]
        flat = np.stack(fields, axis=1).astype(np.int64)
    else:
        flat = values.to_numpy(zero_copy_only=False)
    lengths, there = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), lists.is_valid().to_pylist()
    items = np.split(flat, np.cumsum(lengths)[:-1]) if len(lists) else []
    return [item if valid else None for item, valid in zip(items, there, strict=True)]
