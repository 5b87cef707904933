"""Where runs of a sweep end, against a number that was swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normzoo.report.seeds import Group
from normzoo.report.settings import differing_keys, is_number, settings_of, short_key, text_of_setting
from normzoo.report.style import add_legend, as_label, line, marker

METRICS = {"test/accuracy": "test accuracy", "test/loss": "test loss", "train/loss": "loss of the last mini-batch"}
_WIDE = 10.0  # ratio of largest and smallest value from which an axis is logarithmic
_CROSSES = 0.04  # height of a row of crosses, as a part of the panel's


def draw_axes(groups: Sequence[Group]) -> dict[str, Figure]:
    """The last value of a metric against each number in which the recipes differ: title -> figure.

    The metric is the first of :data:`METRICS` that a run has. Points of a line differ only in that number, lines in the
    rest. A point is the mean over the seeds that finished and did not diverge, with a bar from the smallest to the
    largest; crosses at the bottom say how many seeds have diverged. A number in which no two runs differ alone has no
    figure. Numbers that were swept together, such as a rate and the epochs for it, count as one.
    """
    of_recipe = [group for group in groups if all(run.of_recipe for run in group.runs)]
    metric = next((m for m in METRICS if any(run.curve(m)[1] for g in of_recipe for run in g.runs)), None)
    if metric is None or len(of_recipe) < 2:
        return {}
    settings = [settings_of(group.runs[0]) for group in of_recipe]
    differing = differing_keys(settings)
    figures: dict[str, Figure] = {}
    drawn: list[str] = []
    for axis in differing:
        if any(_together(axis, other, settings) for other in drawn):
            continue
        others = [key for key in differing if key != axis and not _together(key, axis, settings)]
        lines: dict[str, list[tuple[float, Group]]] = {}
        for group, setting in zip(of_recipe, settings, strict=True):
            if is_number(setting.get(axis)):
                name = ", ".join(
                    f"{short_key(key, differing)}={text_of_setting(setting[key])}" for key in others if key in setting
                )
                lines.setdefault(name, []).append((setting[axis], group))
        if any(len({x for x, _ in points}) > 1 for points in lines.values()):
            title = f"{METRICS[metric]} against {short_key(axis, differing)}"
            figures[title[0].upper() + title[1:]] = _figure(metric, short_key(axis, differing), lines)
            drawn.append(axis)
    return figures


def _together(key: str, other: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two keys hold numbers, each value of one always beside the same value of the other."""
    if not all(is_number(setting.get(k)) for setting in settings for k in (key, other)):
        return False
    pairs = {(setting[key], setting[other]) for setting in settings}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _figure(metric: str, label: str, lines: Mapping[str, Sequence[tuple[float, Group]]]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(lines.items()):
        _draw_points(axes, metric, name, sorted(points, key=lambda point: point[0]), index)
    values = [x for points in lines.values() for x, _ in points]
    if min(values) > 0 and max(values) >= _WIDE * min(values):
        axes.set_xscale("log")
    if metric == "test/accuracy":
        axes.set_ylim(0, 1)
    counts = {len(group.runs) for points in lines.values() for _, group in points}
    title = f"mean and range over {'–'.join(map(str, sorted({min(counts), max(counts)})))} seeds"
    diverged = any(group.diverged for points in lines.values() for _, group in points)
    crosses = "×: seeds that have diverged, of all" if diverged else ""
    axes.set_title("; ".join(filter(None, [title if max(counts) > 1 else "", crosses])))
    axes.set(xlabel=label, ylabel=METRICS[metric])
    add_legend(figure, axes)
    return figure


def _draw_points(axes: Axes, metric: str, name: str, points: Sequence[tuple[float, Group]], index: int) -> None:
    ends: dict[float, list[float]] = {}
    for x, group in points:
        values = [run.end(metric) for run in group.runs]
        ends.setdefault(x, []).extend(value for value in values if value is not None)
    drawn = {x: values for x, values in ends.items() if values}
    middle = np.array([np.mean(values) for values in drawn.values()])
    low, high = (np.array([end(values) for values in drawn.values()]) for end in (min, max))
    look = line(index)
    bars = [middle - low, high - middle]
    axes.errorbar([*drawn], middle, bars, **look, marker=marker(index), capsize=3, label=as_label(name))
    for x, group in points:
        if group.diverged:
            height = _CROSSES * (1 + index)
            axes.plot(x, height, "x", transform=axes.get_xaxis_transform(), color=look["color"], mew=2, clip_on=False)
            axes.annotate(
                f"{len(group.diverged)} of {len(group.runs)}",
                (x, height),
                xycoords=axes.get_xaxis_transform(),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=look["color"],
            )
