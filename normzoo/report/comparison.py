"""Runs compared, as data frames: curves with bands, where runs ended, and that against what differs among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from normzoo._errors import UnknownNameError, unknown_name
from normzoo.report.averages import over_seeds
from normzoo.report.independent import Axis, axes_of
from normzoo.report.metric_names import users_first
from normzoo.report.run import Run
from normzoo.report.seeds import Group, seed_groups
from normzoo.report.settings import column, column_name, differing_settings, identity, settings_of

VALUES: dict[str, Callable[[Run, str], float | None]] = {
    "last": lambda run, metric: run.last(metric),
    "min": lambda run, metric: min(run.curve(metric)[1], default=None),
    "max": lambda run, metric: max(run.curve(metric)[1], default=None),
}
OUTCOMES = ("diverged", "failed", "unfinished", "missing")
_OF_GROUP = ("group", "runs")
_OF_VALUES = ("n", "mean", "spread", "low", "high")
_TAKEN = {*_OF_GROUP, *_OF_VALUES, *OUTCOMES, "step"}


class Comparison:
    """Runs in groups that differ only in the seed, and frames with a row for each group, or for each of its steps.

    Settings in which the runs differ are columns, as in the frames of :func:`normzoo.load_runs`.

    Args:
        runs: any number.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = [*runs]

    @cached_property
    def groups(self) -> list[Group]:
        """Runs that differ only in their seed, in the order of their first runs."""
        return seed_groups(self.runs)

    @cached_property
    def settings(self) -> list[str]:
        """The dotted keys in which the runs differ, without the seed."""
        return differing_settings(self.runs)

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that a run has logged, those of measurements of normzoo last."""
        return users_first(metric for run in self.runs for metric in run.logged)

    @cached_property
    def axes(self) -> list[Axis]:
        """The settings that differ by themselves: there are two groups that differ in that setting alone."""
        return axes_of(self._group_settings, [group.runs[0].sweep for group in self.groups])

    def curves(self, metric: str) -> pd.DataFrame:
        """A metric over steps: a row for each step of a group at which one of its runs has logged it.

        A run that ended early is not among the ``n`` of later steps: ``n`` below ``runs`` says that a mean is of fewer.
        Of several values of a run at one step their mean counts.

        Returns:
            ``group`` (text), the settings, ``step`` (int64), ``mean``, ``spread`` (standard deviation with n - 1, NaN
            of one run), ``low``, ``high`` (float64) of the finite values, ``n``, how many runs have one, and ``runs``,
            how many there are (int64). Where no value is finite ``n`` is 0 and the others are NaN.

        Raises:
            UnknownNameError: (a ValueError and KeyError) if no run has logged the metric.
        """
        self._check_metric(metric)
        tables = []
        for place, group in enumerate(self.groups):
            rows = [run.logged[metric] for run in group.runs if metric in run.logged]
            if rows:
                finite = [part["value"].where(np.isfinite(part["value"])).to_numpy() for part in rows]
                steps = [part["step"].to_numpy() for part in rows]
                tables.append(over_seeds([*zip(steps, finite, strict=True)]).rename(columns={"x": "step"}))
                tables[-1].insert(0, "place", place)
        table = pd.concat(tables, ignore_index=True)
        front = self._front.take(table.pop("place").to_numpy()).reset_index(drop=True)
        runs = front.pop("runs")
        return pd.concat([front, table.astype({"step": "int64", "n": "int64"}), runs], axis=1)

    def ends(self, metric: str, value: str = "last") -> pd.DataFrame:
        """Where the runs of each group ended: a row for each group.

        The values are those of runs that have neither diverged nor failed. Every run is counted once: ``runs`` is the
        sum of ``n``, ``diverged``, ``failed``, ``unfinished`` and ``missing``.

        Args:
            metric: its name.
            value: ``"last"``, or ``"min"`` or ``"max"`` of the finite values of a run.

        Returns:
            ``group`` (text), the settings, ``runs``, ``n``, ``mean``, ``spread`` (standard deviation with n - 1, NaN of
            one run), ``low``, ``high`` (float64, NaN if ``n`` is 0), ``diverged``, ``failed`` (and not diverged),
            ``unfinished`` (interrupted, killed, or still running) and ``missing``, which have no finite value (int64).

        Raises:
            UnknownNameError: if no run has logged the metric, or for another ``value``.
        """
        self._check_metric(metric)
        if value not in VALUES:
            raise UnknownNameError(unknown_name("value", value, VALUES))
        rows = [_end(group.runs, metric, VALUES[value]) for group in self.groups]
        return pd.concat([self._front, pd.DataFrame(rows)], axis=1)

    def against(self, axis: str, metric: str, value: str = "last") -> pd.DataFrame:
        """Where the runs ended against a setting: as :meth:`ends`, by the other settings, then by this one.

        Args:
            axis: the dotted key of a setting in which the runs differ, or its last part if that tells which one.
            metric: its name.
            value: ``"last"``, ``"min"`` or ``"max"``.

        Returns:
            the columns of :meth:`ends` with the setting first, then those that move with it, the others, and the rest.
            Rows that are the same in the other settings follow each other, by this one: numbers in ascending order,
            names in that of the runs.

        Raises:
            UnknownNameError: for a setting or metric that there is not.
        """
        chosen = self.axis(axis)
        table = self.ends(metric, value)
        front = [chosen.key, *chosen.along]
        others = [key for key in self.settings if key not in front]
        orders = {key: _order(key, self._group_settings) for key in (chosen.key, *others)}
        by = [orders[key] for key in (*others, chosen.key)]
        rows = sorted(range(len(table)), key=lambda row: tuple(order[row] for order in by))
        names = [column_name(key, _TAKEN) for key in (*front, *others)]
        rest = [name for name in table if name not in names]
        return table.iloc[rows].reset_index(drop=True)[[*names, *rest]]

    def axis(self, name: str) -> Axis:
        """The axis of a dotted key, or of its last part; also one that never differs by itself.

        Raises:
            UnknownNameError: if the runs do not differ in it.
        """
        known = [*self.axes, *(Axis.of(key, self._group_settings) for key in self.settings)]
        for axis in known:
            if name in (axis.key, axis.label, column_name(axis.key, _TAKEN)):
                return axis
        raise UnknownNameError(unknown_name("setting in which the runs differ", name, self.settings))

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise UnknownNameError(unknown_name("metric of these runs", metric, self.metrics))

    @cached_property
    def _group_settings(self) -> list[Mapping[str, Any]]:
        """The settings in which the runs differ, of each group."""
        every = [settings_of(group.runs[0]) for group in self.groups]
        return [{key: settings[key] for key in self.settings if key in settings} for settings in every]

    @cached_property
    def _front(self) -> pd.DataFrame:
        """Group, settings and number of runs of each group."""
        settings = {
            column_name(key, _TAKEN): column([settings.get(key) for settings in self._group_settings])
            for key in self.settings
        }
        labels = pd.Series([group.label for group in self.groups], dtype="str")
        counts = pd.Series([len(group.runs) for group in self.groups], dtype="int64")
        return pd.DataFrame({"group": labels, **settings, "runs": counts})


def outcome(run: Run, value: float | None) -> str | None:
    """Why a run has no value that counts, one of :data:`OUTCOMES`; None if it has one."""
    return run.trouble or ("missing" if value is None else None)


def _end(runs: Sequence[Run], metric: str, value_of: Callable[[Run, str], float | None]) -> dict[str, Any]:
    values = [value_of(run, metric) for run in runs]
    outcomes = [outcome(run, value) for run, value in zip(runs, values, strict=True)]
    counted = [v for v, what in zip(values, outcomes, strict=True) if what is None and v is not None]
    return {**_statistics(counted), **{what: outcomes.count(what) for what in OUTCOMES}}


def _statistics(values: Sequence[float]) -> dict[str, float]:
    n = len(values)
    return {
        "n": n,
        "mean": math.fsum(values) / n if n else math.nan,
        "spread": float(np.std(values, ddof=1)) if n > 1 else math.nan,
        "low": min(values, default=math.nan),
        "high": max(values, default=math.nan),
    }


def _order(key: str, settings: Sequence[Mapping[str, Any]]) -> list[int]:
    """The place of each group's value of a setting among the values of its axis; a group without a value is last."""
    places = {identity(value): place for place, value in enumerate(Axis.of(key, settings).values)}
    return [places.get(identity(setting.get(key)), len(places)) for setting in settings]
