"""Segments: Arrow IPC streams that only grow, one for each start of a process, readable after any kill.

A sample is one record batch, appended in one write, so a killed process leaves at most one broken batch, the last.
Arrow's streams have no checksums; each message here carries one as metadata, which other readers pass over.
"""

from __future__ import annotations

import io
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from normzoo.records.schema import MEANING, QUANTITY, START_STEP, VERSION, Schema
from normzoo.records.seals import SEAL, UNSEALED, seal_of, sealed

_CHECK = "normzoo.check"
_STREAM = b"\xff\xff\xff\xff"  # what every message of an Arrow IPC stream begins with
# No threads beside those that train. Histograms take a third of the space if they are compressed, a few rows of numbers
# would take more. LZ4 takes a seventh of the time of Zstandard, and a third more space
_PLAIN = pa.ipc.IpcWriteOptions(use_threads=False)
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_WORTH_COMPRESSING = 2**12  # bytes of a sample that is not compressed
_WRONG_VALUE = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)
_NAME = re.compile(r"(\w+)-(\d{3,})\.arrows")


class RecordError(ValueError):
    """A file of a record is damaged, or is none; the message names it."""


class Segment:
    """A new file ``NAME-NNN.arrows`` in ``folder``, for a run that starts, or goes on, at ``start_step``.

    No file is held open, so that a segment can be copied and pickled with what owns it.
    """

    def __init__(self, folder: Path, record: Schema, start_step: int) -> None:
        schema = record.arrow(start_step)
        header = schema.with_metadata({**(schema.metadata or {}), _CHECK: UNSEALED}).serialize().to_pybytes()
        self.path = _create(folder, record.name, sealed(header))
        # What columns mean stands in the header alone: a stream of one sample is quicker to make without it
        self._schema = pa.schema([pa.field(f.name, f.type) for f in schema])
        self._start = self._schema.serialize().size
        self._columns = set(schema.names)
        self._integers = [f.name for f in schema if pa.types.is_integer(f.type)]
        self._pairs = [(i, f) for i, f in enumerate(self._schema) if _holds_pairs(f.type)]
        self._row = pa.struct([f for f in self._schema if not _holds_pairs(f.type)])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one sample, in one write that is with the operating system when this returns.

        Raises:
            ValueError: if a row has not the columns of the record, or a value is not of the column's type.
            OSError: if it could not be written; the file is then as before.
        """
        for row in rows:
            if row.keys() != self._columns:
                raise ValueError(
                    f"{self.path.name}: columns differ from the record's: {sorted(self._columns ^ set(row))}"
                )
        batch = self._batch(rows)
        large = batch.get_total_buffer_size() >= _WORTH_COMPRESSING
        message = self._message(batch, _COMPRESSED if large else _PLAIN)
        with self.path.open("r+b", buffering=0) as file:
            _write(file, sealed(message))

    def _message(self, batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions) -> bytes:
        sink = pa.BufferOutputStream()
        pa.ipc.new_stream(sink, self._schema, options=options).write_batch(batch, custom_metadata={_CHECK: UNSEALED})
        return sink.getvalue()[self._start :].to_pybytes()

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
        """The rows as columns: in one conversion, which is several times as fast as one for each column."""
        for name in self._integers:  # Arrow would round other numbers towards 0
            values = [row[name] for row in rows]
            if not {*map(type, values)} <= {int, type(None)}:
                wrong = [v for v in values if not (v is None or isinstance(v, numbers.Integral))]
                if wrong:
                    kind = self._schema.field(name).type
                    raise ValueError(f"{self.path.name}: column {name!r} is of the type {kind}, not {wrong[0]!r}")
        try:
            batch = pa.RecordBatch.from_struct_array(pa.array(rows, self._row))
        except _WRONG_VALUE:
            for field in self._row:
                self._column(field, [row[field.name] for row in rows])  # says which column it is
            raise
        if not self._pairs:
            return batch
        columns = batch.columns
        for place, field in self._pairs:
            columns.insert(place, self._column(field, [row[field.name] for row in rows]))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _column(self, field: pa.Field, values: list[Any]) -> pa.Array:
        try:
            return _array(values, field.type)
        except _WRONG_VALUE as error:
            raise ValueError(f"{self.path.name}: column {field.name!r} is of the type {field.type}: {error}") from error


@dataclass(frozen=True)
class Contents:
    """What a segment holds: its batches, and how many (0 or 1) were cut off as they were written.

    Without a schema if the process was killed before it had written that.
    """

    path: Path
    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = field(default_factory=list)
    broken: int = 0

    @property
    def metadata(self) -> dict[str, str]:
        """The schema's metadata; there must be a schema."""
        assert self.schema is not None
        return {key.decode(): value.decode() for key, value in self.schema.metadata.items()}

    @property
    def start_step(self) -> int:
        """The step from which on this segment takes the place of earlier ones; there must be a schema."""
        return int(self.metadata[START_STEP])


def segment_paths(folder: Path) -> dict[str, list[Path]]:
    """The segments in a folder, by quantity, in the order they were opened."""
    found = sorted(
        (match[1], int(match[2]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    )
    paths: dict[str, list[Path]] = {}
    for name, _, path in found:
        paths.setdefault(name, []).append(path)
    return paths


def read_segment(path: Path) -> Contents:
    """The whole batches of a segment.

    Raises:
        RecordError: if the file cannot be read or is no record, if a batch that is not the last is damaged, or if a
            batch stands in the file twice.
    """
    if not path.is_file():  # a pipe would never end
        raise RecordError(f"{path} is not a file, so not a record of normzoo")
    try:
        with pa.OSFile(str(path)) as file:
            data = file.read_buffer()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    source, schema = pa.BufferReader(data), None
    batches: list[pa.RecordBatch] = []
    earlier: dict[bytes, list[pa.Buffer]] = {}  # whole messages by their checksums
    while source.tell() < data.size:
        start = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except (pa.ArrowException, OSError, EOFError):
            message = None
        whole = data[start : source.tell()]
        if message is not None and (seal := seal_of(memoryview(whole))):
            expected = "schema" if schema is None else "record batch"
            place = "its schema" if schema is None else f"batch {len(batches)}"
            if message.type != expected or any(whole.equals(other) for other in earlier.setdefault(seal, [])):
                raise RecordError(f"{path} is damaged: what was written before stands at byte {start} again ({place})")
            earlier[seal].append(whole)
            if schema is None:
                schema = _checked_schema(pa.ipc.read_schema(message), path)
            else:
                batches.append(pa.ipc.read_record_batch(message, schema))
            continue
        rest = data[start:].to_pybytes()
        if schema is None and rest[:4] != _STREAM[: len(rest)]:
            raise RecordError(f"{path} is not an Arrow IPC stream, so not a record of normzoo")
        if schema is None and message is not None and not SEAL.search(rest):
            raise RecordError(f"{path} is an Arrow IPC stream, but not a record of normzoo")
        # What is cut off is the end of the file; anything after the damage says that it came later
        followed = source.tell() < data.size if message is not None else len(SEAL.findall(rest)) > 1
        if followed:
            what = f"batch {len(batches)}" if schema is not None else "its schema"
            raise RecordError(f"{path} is damaged: {what}, at byte {start} of {data.size}, is not what was written")
        return Contents(path, schema, batches, broken=1)
    return Contents(path, schema, batches, broken=int(schema is None))


def _checked_schema(schema: pa.Schema, path: Path) -> pa.Schema:
    """The schema, if it is that of the quantity that the file is named after."""
    name = _NAME.fullmatch(path.name)
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if name is None or about.get(QUANTITY) != name[1]:
        raise RecordError(
            f"{path} holds a record of {about.get(QUANTITY, 'something else')!r}, not of what it is named"
        )
    described = all(MEANING.encode() in (f.metadata or {}) for f in schema)
    if not (about.get(START_STEP, "").isdecimal() and VERSION in about and "step" in schema.names and described):
        raise RecordError(f"{path} is an Arrow IPC stream, but not a record of normzoo: its schema says too little")
    return schema


def _create(folder: Path, name: str, header: bytes) -> Path:
    """A new file with the next free number; another process may be taking numbers as well."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = segment_paths(folder).get(name, [])
    number = int(_NAME.fullmatch(taken[-1].name)[2]) + 1 if taken else 0  # type: ignore[index]
    while True:
        path = folder / f"{name}-{number:03d}.arrows"
        try:
            with path.open("xb", buffering=0) as file:
                _write(file, header)
        except FileExistsError:
            number += 1
            continue
        return path


def _write(file: io.FileIO, message: bytes) -> None:
    """Append a message, or leave the file as it was."""
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(message)
    try:
        while rest:  # a disk that fills up takes a part, and refuses the next
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column; lists of structs are given as arrays of rows, one column a field."""
    if not _holds_pairs(kind):
        return pa.array(values, kind)
    fields = [kind.value_type.field(i) for i in range(kind.value_type.num_fields)]
    arrays = [np.asarray(v, dtype=np.int64).reshape(-1, len(fields)) for v in values]
    offsets = np.cumsum([0, *(len(a) for a in arrays)]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.empty((0, len(fields)), dtype=np.int64)
    columns = [_whole_numbers(flat[:, i], f.type) for i, f in enumerate(fields)]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=fields), type=kind)


def _whole_numbers(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The int64 values, (n,), in a type that may hold fewer."""
    array = pa.array(np.ascontiguousarray(values))
    return array if array.type == kind else array.cast(kind)  # a cast takes time even where it has nothing to do


def _holds_pairs(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
