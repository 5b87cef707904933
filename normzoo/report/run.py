"""What one run's folder holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normzoo.capsules import Capsule
from normzoo.report.metric_names import loss_metric, of_training
from normzoo.report.replay_reading import Replay

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Run:
    """What one run's folder holds.

    Attributes:
        name: the folder's name; of runs read from several folders, as much of the path as tells them apart.
        config: its resolved recipe; of a plain Lightning folder its hyperparameters.
        status: ``state`` (running, finished, diverged, interrupted, failed), ``seconds``, ``error``; empty if not
            written.
        environment: versions, machine and git state.
        metrics: a row for each number that was logged, also one that is not finite: ``step`` (int64, optimizer steps
            made), ``epoch`` (float64, NaN where none was logged), ``metric`` (text) and ``value`` (float64). The rows
            of a metric are together, in the order in which they were logged.
        records: the callbacks' records, quantity -> data frame.
        capsules: those that can be read.
        capsule_problems: a sentence for each that cannot, and for each replay that cannot.
        replays: those that can be read, by the paths of their capsules.
        of_recipe: whether ``normzoo run`` wrote the folder; others have what a logger and callbacks wrote.
        folder: where it was read from.
        problems: a sentence for each file of a plain Lightning folder that is damaged, as far as it is.
        sweep: the section ``sweep`` of the sweep that it is a point of; empty if there is none.
    """

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    metrics: pd.DataFrame = field(repr=False)
    records: dict[str, pd.DataFrame] = field(repr=False)
    capsules: list[Capsule] = field(default_factory=list, repr=False)
    capsule_problems: list[str] = field(default_factory=list, repr=False)
    replays: dict[Path, Replay] = field(default_factory=dict, repr=False)
    of_recipe: bool = True
    folder: Path = Path()
    problems: list[str] = field(default_factory=list, repr=False)
    sweep: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def logged(self) -> dict[str, pd.DataFrame]:
        """The rows of each metric, by its name, in the order of the file."""
        return {str(name): rows for name, rows in self.metrics.groupby("metric", sort=False)}

    def curve(self, metric: str) -> Curve:
        """Steps and finite values of one metric."""
        if metric not in self.logged:
            return [], []
        rows = self.logged[metric]
        finite = np.isfinite(rows["value"].to_numpy())
        return rows["step"].to_numpy()[finite].tolist(), rows["value"].to_numpy()[finite].tolist()

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None if there is none or it is not finite."""
        if metric not in self.logged:
            return None
        value = float(self.logged[metric]["value"].iloc[-1])
        return value if math.isfinite(value) else None

    def end(self, metric: str) -> float | None:
        """The last value of a metric; None if it is not finite, or the run did not finish or has diverged."""
        return self.last(metric) if self.completed else None

    def record(self, quantity: str) -> pd.DataFrame:
        """The record of a quantity, with no rows if the run has none."""
        return self.records.get(quantity, pd.DataFrame({"step": []}))

    @property
    def state(self) -> str:
        """``finished``, ``diverged``, ``interrupted``, ``failed``, ``unfinished`` (runs, or was killed), or ``–``.

        ``–`` is the state of a folder that ``normzoo run`` did not write, which does not say how the run ended.
        """
        if not self.of_recipe:
            return "–"
        state = self.status.get("state", "running")
        return "unfinished" if state == "running" else state

    @property
    def diverged_at(self) -> int | None:
        """The step of the first divergence on record."""
        record = self.record("divergence")
        return None if record.empty else int(record["step"].iloc[0])

    @cached_property
    def loss(self) -> str | None:
        """The metric that is the training loss by its name; else another loss; None if none is called so."""
        return loss_metric(self.logged)

    @cached_property
    def not_finite_at(self) -> int | None:
        """The step from which on the :attr:`loss` is NaN or infinite until its last value; None if that is finite."""
        rows = self.logged.get(self.loss or "")
        if rows is None:
            return None
        finite = np.flatnonzero(np.isfinite(rows["value"].to_numpy()))
        first = int(finite[-1]) + 1 if finite.size else 0
        return None if first == len(rows) else int(rows["step"].iloc[first])

    @property
    def has_diverged(self) -> bool:
        """Whether a divergence is on record, or else whether the loss ended as NaN or infinite, unwatched."""
        if self.state == "diverged" or self.diverged_at is not None:
            return True
        return not self.watched and self.not_finite_at is not None

    @property
    def completed(self) -> bool:
        """Whether the run has an end to compare with those of others: not diverged, and not known to be cut short."""
        return self.trouble is None

    @property
    def trouble(self) -> str | None:
        """``diverged``, ``failed``, ``unfinished`` (interrupted, killed, or running); None if none is known."""
        if self.has_diverged:
            return "diverged"
        if self.of_recipe:
            return {"finished": None, "failed": "failed"}.get(self.state, "unfinished")
        about = self._cut_short
        return None if about is None else "unfinished" if about["kind"] == "signal" else "failed"

    @property
    def ended_by(self) -> str | None:
        """The error or signal that has cut the run short, and its step, by its capsule; None if the run went on."""
        about = self._cut_short
        if about is None:
            return None
        error = "signal" if about["kind"] == "signal" else str(about.get("error")).partition(":")[0]
        return f"{error} at step {about.get('step')}"

    @property
    def _cut_short(self) -> dict[str, Any] | None:
        """What the capsule of an error or signal says, if the run did not go on after it."""
        cut_short = [capsule.about for capsule in self.capsules if capsule.about.get("kind") in ("exception", "signal")]
        if not cut_short:
            return None
        about = cut_short[-1]
        step = about.get("step")
        ends = [record["step"].max() for record in self.records.values() if "step" in record and not record.empty]
        resumed = isinstance(step, int) and max(ends, default=step) > step  # in the same folder
        return None if resumed else about

    @property
    def last_loss(self) -> float | None:
        """The training loss of the last step of which it is known."""
        if self.loss is not None and of_training(self.loss):
            return float(self.logged[self.loss]["value"].iloc[-1])
        measured = self.record("relative_loss")
        return None if measured.empty or "loss" not in measured else float(measured["loss"].iloc[-1])

    @property
    def watched(self) -> bool:
        """Whether the run looked for divergence at all."""
        if "divergence" in self.records:
            return True
        callbacks = self.config.get("callbacks") if self.of_recipe else None
        return any("divergence" in callback_name(c).lower() for c in callbacks or [])


@dataclass(frozen=True)
class DamagedRun:
    """A run folder that cannot be read: its name, and which file is damaged in what way."""

    name: str
    problem: str


class RunError(ValueError):
    """A file of a run folder is damaged; the message names it."""


def bare(record: pd.DataFrame) -> pd.DataFrame:
    """A record without what it says of itself, which pandas would copy in each operation."""
    rows = record.copy(deep=False)
    rows.attrs = {}
    return rows


def callback_name(callback: Any) -> Any:
    """The name that a recipe calls a callback by."""
    if isinstance(callback, dict):
        return callback.get("name", callback.get("class_path"))
    return callback
