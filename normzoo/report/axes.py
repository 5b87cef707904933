"""Where runs end, against each setting in which they differ: a number or a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from normzoo.report.charts import Axis, Chart, Note, Panel, Series, all_values, axis_of
from normzoo.report.independent import says
from normzoo.report.metric_names import is_accuracy, main_metric, of_training
from normzoo.report.seeds import Group
from normzoo.report.settings import differing_settings, identity, is_number, settings_of, short_key, text_of_setting
from normzoo.report.style import line, marker

_WIDE = 10.0  # ratio of largest and smallest value from which an axis is logarithmic
_MOST_TICKS = 10  # at the values that were swept
_MOST_TOLD = 2  # settings that go together, by their names
_MOST_VALUES = 24  # of a setting that is no number
_CROSSES = 12  # height of a row of crosses, in pixels
_SPREAD = 0.5  # of the points of all lines at one name, where names are 1 apart


def draw_axes(groups: Sequence[Group]) -> dict[str, Chart]:
    """The last value of the main metric against each setting in which the runs differ: title -> chart.

    Points of a line differ only in that setting, lines in the rest. A point is the mean over the seeds that finished
    and did not diverge, with a bar from the smallest to the largest; crosses at the bottom say how many seeds have
    diverged. A setting in which no two runs differ alone has no figure. Settings that go together, such as a rate and
    the epochs for it, count as one.
    """
    runs = [run for group in groups for run in group.runs]
    metric = main_metric(name for run in runs for name in run.logged if run.curve(name)[1])
    if metric is None or len(groups) < 2:
        return {}
    settings = [settings_of(group.runs[0]) for group in groups]
    differing = differing_settings([group.runs[0] for group in groups])
    charts: dict[str, Chart] = {}
    drawn: set[str] = set()
    for axis in (key for key in differing if key not in drawn):
        along = [key for key in differing if key != axis and _together(key, axis, settings)]
        others = [key for key in differing if key != axis and key not in along]
        named = [key for key in (axis, *along) if not all(is_number(setting.get(key)) for setting in settings)]
        keys = [axis, *along] if named else [axis]  # a name says nothing of the number beside it
        lines: dict[str, list[tuple[Any, Group]]] = {}
        for group, setting in zip(groups, settings, strict=True):
            if axis in setting:
                told = [
                    f"{short_key(key, differing)}={text_of_setting(setting[key])}" for key in others if key in setting
                ]
                together = [text_of_setting(setting[key]) for key in keys[:_MOST_TOLD]]
                value = setting[axis] if len(keys) == 1 else ", ".join(together)
                lines.setdefault(", ".join(told), []).append((value, group))
        if any(len({text_of_setting(x) for x, _ in points}) > 1 for points in lines.values()):
            short = [short_key(key, differing) for key in keys]
            label = ", ".join(short if len(short) <= _MOST_TOLD else [*short[:_MOST_TOLD], "..."])
            if (chart := _chart(metric, label, lines)) is not None:
                title = f"{_words(metric)} against {label}"
                charts[title[0].upper() + title[1:]] = chart
                drawn |= {*along}
    return charts


def group_settings(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    """The settings in which the runs differ, by their short names: the value of each group, by the group's name.

    A setting with more values than a reader would pick from is left out.
    """
    settings = {group.name: settings_of(group.runs[0]) for group in groups}
    keys = differing_settings([group.runs[0] for group in groups])
    found = {}
    for key in keys:
        values = {name: text_of_setting(setting[key]) for name, setting in settings.items() if key in setting}
        if 2 <= len({*values.values()}) <= _MOST_VALUES:
            found[short_key(key, keys)] = values
    return found


def _together(key: str, other: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each value of one key always stands beside the same value of the other one."""
    if not all(key in setting and other in setting for setting in settings):
        return False
    columns = {name: [identity(setting[name]) for setting in settings] for name in (key, other)}
    return says(columns, key, other) and says(columns, other, key)


def _chart(metric: str, label: str, lines: Mapping[str, Sequence[tuple[Any, Group]]]) -> Chart | None:
    every = [x for points in lines.values() for x, _ in points]
    numeric = all(map(is_number, every))
    names = [] if numeric else [*dict.fromkeys(map(text_of_setting, every))]
    if len(names) > _MOST_VALUES:
        return None
    series, notes, row = [], [], 0
    for index, (name, points) in enumerate(lines.items()):
        beside = _SPREAD * ((index + 0.5) / len(lines) - 0.5)
        placed = [(float(x) if numeric else names.index(text_of_setting(x)) + beside, group) for x, group in points]
        line_of_points = _points(metric, name, sorted(placed, key=lambda point: point[0]), index)
        series.append(line_of_points if numeric else replace(line_of_points, width=0.0))
        crosses = _crosses(name, placed, index, row)
        row += bool(crosses)
        notes += crosses
    if not notes and not any(len(one.x) for one in series):
        return None
    y_label = _words(metric) + (" of the last mini-batch" if of_training(metric) else "")
    values = np.concatenate([*all_values(series)])
    y_axis = axis_of(values, "linear", y_label)
    if is_accuracy(metric) and ((values >= 0.0) & (values <= 1.0)).all():
        y_axis = Axis(y_label, domain=(0.0, 1.0))
    x_axis = _number_axis(np.unique(np.array(every, dtype=float)), label) if numeric else _name_axis(names, label)
    counts = {len(group.runs) for points in lines.values() for _, group in points}
    told = f"mean and range over {'–'.join(map(str, sorted({min(counts), max(counts)})))} seeds"
    title = [told if max(counts) > 1 else "", "×: seeds that have diverged, of all" if notes else ""]
    return Chart((Panel(x_axis, y_axis, "; ".join(filter(None, title)), (*series,), notes=(*notes,)),))


def _number_axis(values: np.ndarray, label: str) -> Axis:
    logarithmic = values.min() > 0 and values.max() >= _WIDE * values.min()
    axis = axis_of(values, "log" if logarithmic else "linear", label, bool((values == np.round(values)).all()))
    return replace(axis, places=(*values.tolist(),)) if len(values) <= _MOST_TICKS else axis


def _name_axis(names: Sequence[str], label: str) -> Axis:
    return Axis(label, domain=(-0.5, len(names) - 0.5), names=(*names,))


def _points(metric: str, name: str, points: Sequence[tuple[float, Group]], index: int) -> Series:
    """The mean over seeds at each place, with a bar from the smallest to the largest."""
    ends: dict[float, list[float]] = {}
    for x, group in points:
        values = [run.end(metric) for run in group.runs]
        ends.setdefault(x, []).extend(value for value in values if value is not None)
    drawn = {x: values for x, values in ends.items() if values}
    mean, low, high = (np.array([of(values) for values in drawn.values()], dtype=float) for of in (np.mean, min, max))
    count = np.array([len(values) for values in drawn.values()], dtype=int)
    at = np.array([*drawn], dtype=float)
    return Series(name, name, at, mean, low, high, count, bars=True, marker=marker(index), **line(index))


def _crosses(name: str, points: Sequence[tuple[float, Group]], index: int, row: int) -> list[Note]:
    """At the bottom, in a row for each line, where seeds have diverged, how many of all."""
    height, color = _CROSSES * (1 + row), line(index)["color"]
    return [
        Note(x, 0.0, f"{len(group.diverged)} of {len(group.runs)}", name, color, cross=True, from_bottom=height)
        for x, group in points
        if group.diverged
    ]


def _words(metric: str) -> str:
    return metric.replace("/", " ").replace("_", " ")
