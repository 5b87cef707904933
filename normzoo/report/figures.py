"""The figures of a report, drawn from run folders."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normzoo.names import SHORT_NAMES
from normzoo.records.schema import Figure as Specification
from normzoo.report.averages import over_seeds
from normzoo.report.axes import draw_axes
from normzoo.report.drawing import draw_figure, middle_layer
from normzoo.report.runs import Run
from normzoo.report.seeds import Group, seed_groups
from normzoo.report.style import STYLE, add_legend, as_label, line

_LOSS_CEILING = 1e6
_NO_ROWS = pd.DataFrame({"step": []})
_EARLIER: dict[str, dict[str, Any]] = {  # what there was before the columns of these records were written
    "gradient_tails": {"of": "gradient"},
    "relative_loss": {"along": "gradient", "optimizer": 0},
}


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure that the runs hold data for: title -> figure. Records say themselves what is to be drawn of them.

    Runs that differ only in their seed are one line, their mean, with a band from the smallest to the largest value.
    """
    groups = seed_groups(runs)
    drawings: dict[str, Callable[[Sequence[Group]], Figure | None]] = {"Accuracy": _accuracy, "Training loss": _loss}
    with rc_context(STYLE):
        against = draw_axes(groups)
        figures = {title: drawing(groups) for title, drawing in drawings.items()}
    drawn = against | {title: figure for title, figure in figures.items() if figure is not None}
    alarms = {run.name: run.diverged_at for run in runs if run.diverged_at is not None}
    records = {run.name: run.records for run in runs}
    together = {group.name: [run.name for run in group.runs] for group in groups}
    return drawn | draw_records(records, titles=[*figures, *against], marks=alarms, groups=together)


def draw_records(
    records: Mapping[str, Mapping[str, pd.DataFrame]],
    titles: Collection[str] = (),
    marks: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Figure]:
    """What records ask to be drawn of them: title -> figure.

    Args:
        records: for each run, by its name, the records, by theirs; the empty name is left out of the legend.
        titles: those that other figures have.
        marks: for runs that have diverged, by their names, the step of the alarm, which figures over steps mark.
        groups: names of runs that differ only in their seed, by what stands in the legend.
    """
    figures: dict[str, Figure | None] = {}
    for name in dict.fromkeys(name for of_run in records.values() for name in of_run):
        frames = {run: completed(of_run.get(name, _NO_ROWS), name) for run, of_run in records.items()}
        specifications = next(filter(None, map(_specifications, frames.values())), [])
        for place, what in enumerate(specifications):
            if any(_same_values(what, other, frames) for other in specifications[:place]):
                continue
            title = f"{what.title} ({name})" if what.title in {*figures, *titles} else what.title  # of another record
            drawable = {n: f for n, f in frames.items() if what.columns <= {*f} | {*what.lines}}
            figures[title] = draw_figure(what, drawable, marks, groups)
    return {title: figure for title, figure in figures.items() if figure is not None}


def tail_layer(runs: Sequence[Run]) -> str | None:
    """The layer whose gradient stands for a network: the middle one of those that every run with a record has."""
    tails = [run.record("gradient_tails") for run in runs]
    return middle_layer([record for record in tails if not record.empty])


def first_tail(run: Run, layer: str | None) -> Mapping[str, Any] | None:
    """The first sample of a layer's gradient."""
    record = completed(run.record("gradient_tails"), "gradient_tails")
    record = record[record["of"] == "gradient"]
    of_layer = record.index[record["layer"] == layer] if not record.empty else []
    return record.loc[of_layer[0]].to_dict() if len(of_layer) else None


def completed(record: pd.DataFrame, name: str) -> pd.DataFrame:
    """A record with the columns that earlier versions left out."""
    earlier = _EARLIER.get(name, {})
    return record.assign(**{c: record[c].fillna(v) if c in record else v for c, v in earlier.items()})


def _specifications(record: pd.DataFrame) -> Sequence[Specification]:
    """What a record asks to be drawn; of one written when records did not say, what its measurement asks today."""
    figures: Sequence[Specification] = record.attrs.get("figures", [])
    known = SHORT_NAMES["callbacks"].get(record.attrs.get("quantity", ""))
    if record.attrs.get("says_figures") or record.empty or known is None:
        return figures
    module, name = known.rsplit(".", 1)
    return getattr(importlib.import_module(module), name).figures


def _same_values(what: Specification, other: Specification, frames: Mapping[str, pd.DataFrame]) -> bool:
    """Whether two figures differ in nothing but the column they draw, and these columns hold the same values."""
    alike = replace(other, title=what.title, y=what.y, y_label=what.y_label) == what
    return alike and all(f[what.y].equals(f[other.y]) for f in frames.values() if {what.y, other.y} <= {*f})


def _accuracy(groups: Sequence[Group]) -> Figure | None:
    metrics = ("train/accuracy", "test/accuracy")
    if not any(run.curve(m)[0] for group in groups for run in group.runs for m in metrics):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, group in enumerate(groups):
        curves = [run.curve("train/accuracy") for run in group.runs]
        _draw_mean(left, [(s, _smooth(v)) for s, v in curves], label=as_label(group.name), **line(i))
        _draw_mean(right, [run.curve("test/accuracy") for run in group.runs], marker="o", markersize=4, **line(i))
    left.set(title="train (mini-batches, smoothed)", xlabel="step", ylabel="accuracy", ylim=(0, 1))
    right.set(title="test", xlabel="step")
    add_legend(figure, left)
    return figure


def _loss(groups: Sequence[Group]) -> Figure | None:
    if not any(run.curve("train/loss")[0] for group in groups for run in group.runs):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        curves = [run.curve("train/loss") for run in group.runs]
        drawn = [(steps, np.clip(values, None, _LOSS_CEILING)) for steps, values in curves]
        _draw_mean(axes, drawn, label=as_label(group.name), **line(i))
        for run, (steps, values) in zip(group.runs, curves, strict=True):
            divergence = run.record("divergence")
            if not divergence.empty:
                at, loss = divergence.loc[0, ["step", "loss"]]
                if steps and np.isnan(loss) and pd.notna(divergence.loc[0].get("value")):  # a norm has diverged
                    loss = np.interp(at, steps, values)
                at_most = loss if loss < _LOSS_CEILING else _LOSS_CEILING  # also for NaN
                axes.plot(at, at_most, marker="x", markersize=9, mew=2, color=line(i)["color"])
    axes.axhline(1e3, color="0.5", linewidth=1, linestyle=":")
    axes.annotate("10³", (1.0, 1e3), xycoords=("axes fraction", "data"), color="0.4", ha="right", va="bottom")
    axes.set(yscale="log", xlabel="step", ylabel=f"mini-batch loss (drawn up to {_LOSS_CEILING:.0e})")
    axes.set_title("loss of each mini-batch; × marks divergence")
    add_legend(figure, axes)
    return figure


def _draw_mean(axes: Axes, curves: Sequence[tuple[Sequence[int], Sequence[float] | np.ndarray]], **look: Any) -> None:
    """A curve; of several seeds their mean, and a band from the smallest to the largest."""
    if len(curves) == 1:
        axes.plot(*curves[0], **look)
        return
    table = over_seeds(curves)
    axes.plot(table["x"], table["mean"], **look)
    axes.fill_between(table["x"], table["low"], table["high"], color=look["color"], alpha=0.15, linewidth=0)


def samples_by_optimizer(record: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The samples of a record of relative loss, by the index of the optimizer."""
    record = completed(record, "relative_loss")
    return {int(index): record[record["optimizer"] == index] for index in sorted(record["optimizer"].unique())}


def _smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Mean of up to ``window`` values so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / np.maximum(end - start, 1)
