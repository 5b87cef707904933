"""Reading run folders, finished or not."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from normzoo.records.reading import read_records

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        name: the folder's name.
        config: its resolved recipe.
        status: ``state`` (running, finished, interrupted, failed), ``seconds``, ``error``; empty if not written.
        environment: versions, machine and git state.
        metrics: rows of the metrics file, numbers only, with ``step``.
        records: the callbacks' records, quantity -> data frame.
    """

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, float]] = field(repr=False)
    records: dict[str, pd.DataFrame] = field(repr=False)

    def curve(self, metric: str) -> Curve:
        """Steps and finite values of one metric."""
        rows = [(int(r["step"]), r[metric]) for r in self.metrics if metric in r and math.isfinite(r[metric])]
        return [s for s, _ in rows], [v for _, v in rows]

    def record(self, quantity: str) -> pd.DataFrame:
        """The record of a quantity, with no rows if the run has none."""
        return self.records.get(quantity, pd.DataFrame({"step": []}))

    @property
    def state(self) -> str:
        """``finished``, ``interrupted``, ``failed``, or ``unfinished`` (still running, or killed)."""
        state = self.status.get("state", "running")
        return "unfinished" if state == "running" else state

    @property
    def diverged_at(self) -> int | None:
        """The step of the first divergence on record."""
        record = self.record("divergence")
        return None if record.empty else int(record["step"].iloc[0])

    @property
    def watched(self) -> bool:
        """Whether the run looked for divergence at all."""
        if "divergence" in self.records:
            return True
        names = [c if isinstance(c, str) else c.get("name", c.get("class_path", "")) for c in self._callbacks]
        return any("divergence" in name.lower() for name in names)

    @property
    def _callbacks(self) -> list[Any]:
        return self.config.get("callbacks") or []


def load_runs(folder: Path) -> list[Run]:
    """The run in ``folder``, or the runs in the folders right below it, by name.

    Raises:
        ValueError: if there is none, or if a record of one is damaged.
    """
    folder = Path(folder)
    if (folder / "recipe.yaml").is_file():
        return [_load_run(folder)]
    found = sorted(p.parent for p in folder.glob("*/recipe.yaml"))
    if not found:
        raise ValueError(f"no runs in {folder}: neither it nor a folder right below it holds a recipe.yaml")
    return [_load_run(p) for p in found]


def _load_run(folder: Path) -> Run:
    return Run(
        name=folder.name,
        config=yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {},
        status=_json(folder / "status.json"),
        environment=_json(folder / "environment.json"),
        metrics=_metrics(folder / "metrics" / "metrics.csv"),
        records=read_records(folder),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _metrics(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: _number(v) for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    numbers = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return [row for row in numbers if "step" in row]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
