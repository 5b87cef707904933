"""Charts of what runs have logged: every metric over steps, one line for the seeds of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from normzoo.records.schema import Figure
from normzoo.report.averages import over_seeds
from normzoo.report.charts import Axis, Chart, Note, Panel, Rule, Series, all_values, axis_of
from normzoo.report.drawing import draw_figure
from normzoo.report.metric_names import better, of_training, of_users, quantity_of
from normzoo.report.seeds import Group
from normzoo.report.style import line

LOSS_CEILING = 1e6  # up to which a training loss is drawn
_THRESHOLD = 1e3  # from which on a loss has diverged
_NEAR = 10.0  # times the largest loss, below which the threshold is drawn
_WIDE = 50.0  # ratio of the largest and the smallest value from which an axis is logarithmic
_FAMILY = 6  # metrics of one name up to the last slash that are lines of one chart
_MOST_MARKED = 30  # points of a line that have a marker


def draw_metrics(groups: Sequence[Group]) -> dict[str, Chart]:
    """Title -> chart, of everything that was logged but by measurements, which have records of their own.

    Metrics of one quantity, such as ``train/accuracy`` and ``test/accuracy``, are panels of one chart.
    """
    runs = [run for group in groups for run in group.runs]
    losses = [run.loss if run.loss is not None and of_training(run.loss) else None for run in runs]
    names = of_users(name for run in runs for name in run.logged)
    quantities: dict[str, list[str]] = {}
    for name in names:
        if name not in losses:
            quantities.setdefault(quantity_of(name), []).append(name)
    families = _families(quantities)
    quantities = {q: of for q, of in quantities.items() if not any(q in family for family in families.values())}
    accuracies = [quantity for quantity in quantities if better(quantity) == "higher"]
    charts = {title: _panels(groups, quantities[title]) for title in accuracies}
    charts["training loss"] = _training_loss(groups)
    charts |= {title: _panels(groups, of) for title, of in quantities.items() if title not in accuracies}
    charts |= {title: _family(groups, [n for q in family for n in family[q]]) for title, family in families.items()}
    return {title[0].upper() + title[1:]: chart for title, chart in charts.items() if chart is not None}


def _families(quantities: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Sequence[str]]]:
    """Quantities of one name up to the last slash, such as ``weight_norm/LAYER``, if they are many."""
    found: dict[str, dict[str, Sequence[str]]] = {}
    for quantity, names in quantities.items():
        found.setdefault(names[0].rpartition("/")[0], {})[quantity] = names
    return {title: family for title, family in found.items() if title and len(family) >= _FAMILY}


def _family(groups: Sequence[Group], metrics: Sequence[str]) -> Chart | None:
    """A line for each metric, as of the layers of a record."""
    frames = {}
    for run in (run for group in groups for run in group.runs):
        rows = run.metrics[run.metrics["metric"].isin(metrics)]
        frames[run.name] = rows.assign(metric=rows["metric"].str.rpartition("/")[2])
    values = np.concatenate([frame["value"].to_numpy(dtype=float) for frame in frames.values()])
    title = metrics[0].rpartition("/")[0]
    what = Figure(title, "line", x="step", y="value", lines=("metric",), y_scale=_scale(values), y_label=title)
    return draw_figure(what, frames, groups={group.name: [run.name for run in group.runs] for group in groups})


def _panels(groups: Sequence[Group], metrics: Sequence[str]) -> Chart | None:
    """A panel for each metric that has a finite value."""
    drawn: list[tuple[str, list[Series]]] = []
    for metric in metrics:
        smoothed = better(metric) == "higher" and of_training(metric)
        series = []
        for i, group in enumerate(groups):
            curves = [run.curve(metric) for run in group.runs]
            if smoothed:
                curves = [(steps, _smooth(values).tolist()) for steps, values in curves]
            if any(steps for steps, _ in curves):
                series.append(_mean(group, curves, i))
        if series:
            drawn.append((f"{metric} (mini-batches, smoothed)" if smoothed else metric, series))
    if not drawn:
        return None
    every = [one for _, series in drawn for one in series]
    x_axis = axis_of(np.concatenate([one.x for one in every]), "linear", "step", whole=True)
    values = np.concatenate([*all_values(every)])
    y_axis = axis_of(values, _scale(values), quantity_of(metrics[0]))
    if better(metrics[0]) == "higher" and np.nanmin(values) >= 0.0 and np.nanmax(values) <= 1.0:
        y_axis = Axis(y_axis.label, domain=(0.0, 1.0))
    return Chart(tuple(Panel(x_axis, y_axis, title, (*of,)) for title, of in drawn), shared_y=True, over_steps=True)


def _training_loss(groups: Sequence[Group]) -> Chart | None:
    series, notes = [], []
    for i, group in enumerate(groups):
        curves = [run.curve(run.loss) if run.loss and of_training(run.loss) else ([], []) for run in group.runs]
        if not any(steps for steps, _ in curves):
            continue
        series.append(_mean(group, [(steps, np.clip(values, None, LOSS_CEILING)) for steps, values in curves], i))
        for run, (steps, values) in zip(group.runs, curves, strict=True):
            divergence = run.record("divergence")
            if not divergence.empty:
                at, loss = divergence.loc[0, ["step", "loss"]]
                if steps and np.isnan(loss) and pd.notna(divergence.loc[0].get("value")):  # a norm has diverged
                    loss = np.interp(at, steps, values)
                at_most = loss if np.isfinite(loss) and loss < LOSS_CEILING else LOSS_CEILING
                notes.append(Note(float(at), float(at_most), run=group.name, color=line(i)["color"], cross=True))
            elif run.has_diverged and run.not_finite_at is not None and values:  # nothing watched for divergence
                last = min(values[-1], LOSS_CEILING)
                notes.append(Note(run.not_finite_at, last, run=group.name, color=line(i)["color"], cross=True))
    if not series:
        return None
    y = np.concatenate([*all_values(series), [note.y for note in notes]])
    x = np.concatenate([*(one.x for one in series), [note.x for note in notes]])
    x_axis = axis_of(x, "linear", "step", whole=True)
    positive = bool((y[np.isfinite(y)] > 0).all())
    rules: tuple[Rule, ...] = ()
    if positive and np.nanmax(y, initial=0.0) >= _THRESHOLD / _NEAR:
        y = np.append(y, _THRESHOLD)
        rules = (Rule(_THRESHOLD),)
        notes.append(Note(x_axis.domain[1], _THRESHOLD, "10³"))
    label = f"mini-batch loss (drawn up to {LOSS_CEILING:.0e})" if y.max() >= LOSS_CEILING else "mini-batch loss"
    y_axis = axis_of(y, "log" if positive else "linear", label)
    title = "loss of each mini-batch; × marks divergence"
    return Chart((Panel(x_axis, y_axis, title, (*series,), rules, (*notes,)),), over_steps=True)


def _mean(group: Group, curves: Sequence[tuple[Sequence[int], Sequence[float] | np.ndarray]], index: int) -> Series:
    """A curve; of several seeds their mean, and a band from the smallest to the largest."""
    look: dict[str, Any] = {"label": group.name, "run": group.name, **line(index)}
    if len(curves) == 1:
        x, y = (np.asarray(values, dtype=float) for values in curves[0])
        series = Series(x=x, y=y, **look)
    else:
        table = over_seeds(curves)
        x, y, low, high = (table[name].to_numpy(dtype=float) for name in ("x", "mean", "low", "high"))
        series = Series(x=x, y=y, low=low, high=high, count=table["n"].to_numpy(), **look)
    return replace(series, marker="o") if len(series.x) <= _MOST_MARKED else series


def _scale(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return "log" if known.size and known.min() > 0 and known.max() > _WIDE * known.min() else "linear"


def _smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Mean of up to ``window`` values so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / np.maximum(end - start, 1)
