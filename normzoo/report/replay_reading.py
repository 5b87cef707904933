"""The replay of a capsule, as it is on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from normzoo.causes import Findings, read_evidence, read_findings
from normzoo.causes.evidence import RECORDS
from normzoo.records.reading import read_records

FOLDER = "replay"


@dataclass(frozen=True)
class Replay:
    """What making the steps of a capsule again has shown.

    Attributes:
        path: its folder, ``CAPSULE/replay``.
        findings: the causes, likeliest first, with facts and notes.
        evidence: what they were judged by; see :data:`normzoo.causes.evidence.KEYS`.
        records: what was measured, record -> data frame.
    """

    path: Path
    findings: Findings = field(repr=False)
    evidence: dict[str, Any] = field(repr=False)
    records: dict[str, pd.DataFrame] = field(repr=False)


def read_replay(capsule: Path) -> Replay | None:
    """The replay of the capsule in a folder; None if there is none.

    Raises:
        EvidenceError: if a file is not there, is damaged, or is none that a replay writes.
        RecordError: if a record is damaged.
        OSError: if a record cannot be read.
    """
    folder = capsule / FOLDER
    if not os.path.lexists(folder):
        return None
    records = read_records(folder / RECORDS) if (folder / RECORDS).is_dir() else {}
    return Replay(folder, read_findings(folder), read_evidence(folder), records)
