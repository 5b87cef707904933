"""Evidence of a replay on disk: ``evidence.json``, ``findings.json`` and ``records/`` in ``CAPSULE/replay``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normzoo._files import write_whole
from normzoo.causes.finding import EvidenceError, Findings, read_json
from normzoo.records.schema import Schema
from normzoo.records.segments import Segment

FILE, RECORDS = "evidence.json", "records"
KEYS: dict[str, type] = {
    "about": dict,
    "same": dict,
    "course": dict,
    "data_or_state": dict,
    "inputs": list,
    "samples": dict,
    "parameters": dict,
    "fractions": dict,
    "first_bad": dict,
    "norm_layers": list,
    "trials": dict,
    "passes": dict,
    "seconds": dict,
}
"""The keys of the evidence, and of which type each value is where it is not None."""


def write_evidence(
    folder: Path,
    evidence: Mapping[str, Any],
    records: Iterable[tuple[Schema, Sequence[Mapping[str, Any]]]] = (),
    findings: Findings | None = None,
) -> None:
    """Write a replay, whole or not at all; an earlier one in the same place is replaced.

    Args:
        folder: ``CAPSULE/replay``.
        evidence: plain data; numbers of NumPy and others with ``item()`` become plain ones, tuples lists.
        records: the schema of each record, and its rows.
        findings: what was judged, written beside it.

    Raises:
        OSError: if it could not be written; the earlier replay is then still there.
        TypeError: for evidence that is not plain data.
    """
    part, earlier = (folder.with_name(f"{folder.name}.{ending}") for ending in ("part", "earlier"))
    for left_over in (part, earlier):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write_whole(part / FILE, json.dumps(evidence, indent=1, ensure_ascii=False, default=_plain))
        if findings is not None:
            findings.write(part)
        for schema, rows in records:
            segment = Segment(part / RECORDS, schema, int(rows[0]["step"]) if rows else 0)
            if rows:
                segment.append(rows)
        if folder.exists():
            folder.rename(earlier)
        part.rename(folder)
    except BaseException:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)


def read_evidence(folder: Path) -> dict[str, Any]:
    """The evidence of a replay; all of ``KEYS`` are there, None where a question was not answered.

    Raises:
        EvidenceError: if the file is not there, is damaged, or is none that is written.
    """
    path = folder / FILE
    content = read_json(path)
    for key, kind in KEYS.items():
        value = content.setdefault(key, None)
        if not isinstance(value, kind | None):
            raise EvidenceError(f"{path} is not of a replay: {key} is of the type {type(value).__name__}")
    return content


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"evidence must be plain data, not {type(value).__name__}")
