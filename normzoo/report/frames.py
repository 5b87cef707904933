"""Runs as tidy data frames, for figures and tables of one's own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pandas as pd

from normzoo.report.comparison import Comparison
from normzoo.report.metric_names import users_first
from normzoo.report.run import DamagedRun, Run
from normzoo.report.runs import read_runs, read_whole_runs
from normzoo.report.settings import column, column_name, differing_settings, seed_of, settings_of

# Columns of frames that are none of recipes
_OF_RUNS = ("run", "folder", "state", "error", "seconds", "last_step", "diverged_at", "not_finite_at", "seed")
_OF_METRICS = ("step", "epoch", "metric", "value")


def load_runs(*folders: str | os.PathLike[str], skip_damaged: bool = False) -> Runs:
    r"""The runs in folders as data frames, and one by one: ``len(runs)``, ``runs[0]``, ``for run in runs``.

    Args:
        *folders: each a run, or with runs up to three levels below it: folders of ``normzoo run`` and ``normzoo
            sweep``, of Lightning's CSVLogger and TensorBoardLogger, and of the callbacks or ``normzoo.watch``.
        skip_damaged: leave out runs with a damaged file, which ``runs.damaged`` then tells, rather than raise.

    Raises:
        ValueError: if there are no runs in one of the folders, or if a file of a run is damaged; the message names it.
        TypeError: if no folder is given.

    Example:
        >>> import pathlib, tempfile, normzoo
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for version, lr in enumerate((0.1, 0.2)):
        ...     (folder / f"version_{version}").mkdir()
        ...     _ = (folder / f"version_{version}" / "hparams.yaml").write_text(f"lr: {lr}")
        ...     _ = (folder / f"version_{version}" / "metrics.csv").write_text(f"epoch,loss,step\n0,{lr},9\n")
        >>> runs = normzoo.load_runs(folder)
        >>> runs.runs[["run", "lr", "loss (last)"]].values.tolist()
        [['version_0', 0.1, 0.1], ['version_1', 0.2, 0.2]]
        >>> [*runs.metrics], len(runs.metrics), runs.records
        (['run', 'lr', 'step', 'epoch', 'metric', 'value'], 2, {})
    """
    if not folders:
        raise TypeError("load_runs takes one or several folders, such as load_runs('runs/my-sweep'), and got none")
    if not skip_damaged:
        return Runs(read_whole_runs(*folders))
    return Runs(*read_runs(*folders))


class Runs(Sequence[Run]):
    """Runs, in the order of their folders and names, and data frames of them.

    The settings in which the runs differ are columns, by their dotted keys such as ``optimizer.lr``: numbers as int64
    or float64 (Int64 or NaN where a run lacks one), anything else as object, None where a run lacks it. A setting that
    has the name of another column of a frame is called ``recipe.NAME``. The seed is a column of its own, ``seed``.

    Args:
        runs: as :func:`load_runs` reads them.
        damaged: those that were left out.
    """

    def __init__(self, runs: Sequence[Run], damaged: Sequence[DamagedRun] = ()) -> None:
        self._runs, self.damaged = [*runs], [*damaged]

    @overload
    def __getitem__(self, place: int) -> Run: ...

    @overload
    def __getitem__(self, place: slice) -> list[Run]: ...

    def __getitem__(self, place: int | slice) -> Run | list[Run]:
        return self._runs[place]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        names = ", ".join(run.name for run in self._runs[:3])
        return f"<{len(self)} runs: {names}{', …' if len(self) > 3 else ''}>"

    @cached_property
    def settings(self) -> list[str]:
        """The columns of settings in which the runs differ, without the seed."""
        return [*self._settings]

    @cached_property
    def comparison(self) -> Comparison:
        """Curves, ends and axes of the runs, with those that differ only in their seed as one."""
        return Comparison(self)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run.

        - ``run`` (text): the name.
        - ``folder`` (text): its path.
        - ``state`` (text): finished, diverged, interrupted, failed, unfinished (runs, or was killed), or unknown where
          ``normzoo run`` did not write the folder.
        - ``error`` (text): the alarm, error or signal that ended it; empty if none did.
        - ``seconds`` (float64): how long it took; NaN if that is not known.
        - ``last_step`` (Int64): the last step at which a metric was logged.
        - ``diverged_at`` (Int64): the step of the first divergence on record.
        - ``not_finite_at`` (Int64): the step from which on the loss is NaN or infinite to its end.
        - ``seed``: of the recipe or the hyperparameters.
        - the settings in which the runs differ.
        - ``METRIC (last)``, ``METRIC (min)``, ``METRIC (max)`` (float64) for each metric that a run has logged: its
          last value, finite or not, and the smallest and the largest of the finite ones. Those that measurements of
          normzoo have logged come last.
        """
        columns = {
            "run": pd.Series([run.name for run in self], dtype="str"),
            "folder": pd.Series([str(run.folder) for run in self], dtype="str"),
            "state": pd.Series([run.state.replace("–", "unknown") for run in self], dtype="str"),
            "error": pd.Series([run.status.get("error", "") for run in self], dtype="str"),
            "seconds": pd.Series([run.status.get("seconds", np.nan) for run in self], dtype="float64"),
            "last_step": _steps([None if run.metrics.empty else run.metrics["step"].max() for run in self]),
            "diverged_at": _steps([run.diverged_at for run in self]),
            "not_finite_at": _steps([run.not_finite_at for run in self]),
            "seed": column([seed_of(run) for run in self]),
        }
        return pd.concat([pd.DataFrame({**columns, **self._settings}), self._ends()], axis=1)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row for each number that was logged, after the run, the seed if the runs have one, and settings.

        - ``run`` (text): its name.
        - ``step`` (int64): optimizer steps made, as the logger counts them.
        - ``epoch`` (float64): NaN where none was logged.
        - ``metric`` (text): its name.
        - ``value`` (float64): NaN and infinities are kept.
        """
        return self._with_settings([run.metrics for run in self])

    @cached_property
    def records(self) -> dict[str, pd.DataFrame]:
        """The records of measurements, by quantity, as :func:`normzoo.load_run` gives them, of all runs that have one.

        ``run``, the seed if the runs have one, and the settings come first. Curves and histograms are arrays, one in a
        cell. ``frame.attrs`` has ``quantity`` and ``meaning`` (column -> what it is).
        """
        frames = {}
        for name in dict.fromkeys(name for run in self for name in run.records):
            frames[name] = self._with_settings([run.records.get(name) for run in self])
            of_record = [run.records[name].attrs for run in self if name in run.records]
            meaning = {key: text for attrs in of_record for key, text in attrs.get("meaning", {}).items()}
            frames[name].attrs = {"quantity": name, "meaning": meaning}
        return frames

    @cached_property
    def _settings(self) -> dict[str, pd.Series]:
        """Values of settings in which the runs differ, by the names of their columns."""
        settings = [settings_of(run) for run in self]
        taken = {*_OF_RUNS, *_OF_METRICS}
        return {column_name(key, taken): column([s.get(key) for s in settings]) for key in differing_settings(self)}

    def _with_settings(self, frames: Sequence[pd.DataFrame | None]) -> pd.DataFrame:
        """Frames of the runs below each other, with names and settings in front."""
        there = [(place, frame) for place, frame in enumerate(frames) if frame is not None]
        filled = [frame for _, frame in there if len(frame)] or [frame.head(0) for _, frame in there[:1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of pandas 2, on columns in which a run has no value
            rows = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
        seeds = {} if self.runs["seed"].isna().all() else {"seed": self.runs["seed"]}
        front = pd.DataFrame({"run": self.runs["run"], **seeds, **self._settings})
        front.columns = [column_name(key, {*rows}) for key in front]
        places = np.repeat([place for place, _ in there], [len(frame) for _, frame in there]).astype(np.intp)
        return pd.concat([front.take(places).reset_index(drop=True), rows], axis=1)

    def _ends(self) -> pd.DataFrame:
        """The last, smallest and largest value of each metric of each run."""
        frames = [run.metrics.assign(place=place) for place, run in enumerate(self) if len(run.metrics)]
        if not frames:
            return pd.DataFrame(index=range(len(self)))
        rows = pd.concat(frames, ignore_index=True)
        last = rows.drop_duplicates(["place", "metric"], keep="last").set_index(["place", "metric"])["value"]
        finite = rows[np.isfinite(rows["value"])].groupby(["place", "metric"], sort=False)["value"]
        ends = {"last": last, "min": finite.min(), "max": finite.max()}
        wide = {kind: values.unstack().reindex(range(len(self))) for kind, values in ends.items()}
        nothing = pd.Series(np.nan, index=range(len(self)))
        names = users_first(rows["metric"])
        return pd.DataFrame({f"{m} ({kind})": wide[kind].get(m, nothing) for m in names for kind in ends})


def _steps(values: Sequence[Any]) -> pd.Series:
    return pd.Series(values, dtype="Int64")
