"""Charts as specifications for Vega, which draws them in a page and, by vl-convert, in files.

Specification and expressions: https://vega.github.io/vega/docs/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normzoo.report.cell_pictures import palette_picture, picture
from normzoo.report.charts import Axis, Chart, Colors, Panel, Series, limited, rounded, text_width
from normzoo.report.vega_legend import MARKERS, MOST_ENTRIES, legend_entries, legend_height, legend_marks
from normzoo.report.vega_marks import cells_mark, mark, note_marks, picture_mark, rule_marks, series_marks, step_mark

WIDTH = 900  # of a file, and of a page that is wide enough, in pixels
_LEFT, _GAP, _BOTTOM, _BAR, _LINE = 58, 20, 46, 84, 15
_ONE_COLUMN = 560  # pixels of width below which panels stand below each other
_MOST_NAMES = 24  # side by side
_NAME = 11.6  # pixels of height that a name takes
_UPRIGHT = 560  # pixels of names side by side, beyond which they are turned
FILE_POINTS, PAGE_POINTS = 9_000, 20_000  # of all lines of a chart together
_LEAST_POINTS = 40  # of one line
_NUMBER = (
    "datum.value != 0 && (abs(datum.value) >= 1e5 || abs(datum.value) < 1e-3) "
    "? format(datum.value, '~e') : format(datum.value, '~g')"
)
_LINEAR_NUMBER = "abs(datum.value) >= 1e6 ? format(datum.value, '~e') : datum.label"
CONFIG: dict[str, Any] = {  # of files; a page has its own colours for the same
    "background": "#ffffff",
    "font": "sans-serif",
    "axis": {
        "domainColor": "#888888",
        "tickColor": "#888888",
        "gridColor": "#dddddd",
        "labelColor": "#333333",
        "titleColor": "#1b1b1b",
        "labelFontSize": 10,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelFont": "sans-serif",
        "titleFont": "sans-serif",
    },
    "text": {"fill": "#1b1b1b", "font": "sans-serif", "fontSize": 11},
}


@dataclass(frozen=True)
class Layout:
    """Where panels are, in pixels.

    Args:
        head: height of the heading.
        above: height of the titles above each panel.
        row: height of a row of panels.
        bar: width of the bar of colours beside each panel, if each has one.
        height: of a panel.
    """

    head: int
    above: int
    row: int
    bar: int
    height: int


def layout(chart: Chart) -> Layout:
    """Where the panels of a chart are."""
    lines = max(panel.title.count("\n") + bool(panel.title) for panel in chart.panels)
    above = 8 + _LINE * lines
    bars = all(panel.cells is not None and panel.cells.bar for panel in chart.panels)
    return Layout(24 if chart.heading else 0, above, above + chart.height + _BOTTOM, _BAR if bars else 0, chart.height)


def specification(chart: Chart, live: bool = False, points: int = FILE_POINTS) -> dict[str, Any]:
    """The chart for Vega.

    Args:
        chart: what to draw.
        live: whether it is for a page, which has legends of its own and sets the signals: ``W``, the width in pixels;
            ``hidden``, names of runs or lines; ``lit``, the run or line that stands out, or ``""``; ``at``, a step that
            is marked; ``zx0`` and so on, ``zy0`` and so on, parts of the axes of each panel to zoom to, or null.
            Data are columns by their names, which the page has to turn into rows.
        points: of all lines of a panel together, about, of which those with extreme values are drawn.

    Returns:
        plain data, without NaN.
    """
    at = layout(chart)
    bars = [panel.cells is not None and panel.cells.bar for panel in chart.panels]
    once = 8 + (_BAR if any(bars) and not at.bar else 0)
    legend = [] if live else legend_entries(chart, MOST_ENTRIES)
    styles = [_style(series) for panel in chart.panels for series in panel.series]
    signals: list[dict[str, Any]] = [
        {"name": "W", "value": WIDTH},
        {"name": "C", "update": f"W < {_ONE_COLUMN} ? 1 : {chart.columns}"},
        {"name": "left", "value": _left(chart)},
        {"name": "L", "update": "min(left, W * 0.4)"},
        {"name": "gap", "update": f"{_GAP}" if chart.shared_y else f"{_GAP} + L"},
        {"name": "pw", "update": f"max(60, (W - L - {once} - C * {at.bar} - (C - 1) * gap) / C)"},
        {"name": "hidden", "value": []},
        {"name": "lit", "value": ""},
        {"name": "at", "value": None},
        {"name": "rows", "update": f"ceil({len(chart.panels)} / C)"},
        {"name": "S", "value": styles},
    ]
    scales: list[dict[str, Any]] = []
    data: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    most = points // max(1, max(len(panel.series) for panel in chart.panels))
    first = 0
    for k, panel in enumerate(chart.panels):
        signals += [{"name": f"zx{k}", "value": None}, {"name": f"zy{k}", "value": None}]
        for name, axis, ends in (("x", panel.x, "[0, pw]"), ("y", panel.y, _vertical(panel.y, chart.height))):
            signals.append(_domain(f"d{name}{k}", axis))
            scales.append(_scale(f"{name}{k}", axis, ends, f"z{name}{k} || d{name}{k}"))
        if panel.cells is not None:
            signals.append({"name": f"url{k}", "value": picture(panel.cells, panel.x, panel.y)})
            signals.append(_domain(f"dz{k}", panel.cells.colors.axis))
            scales.append(_scale(f"z{k}", panel.cells.colors.axis, f"[{chart.height}, 0]", f"dz{k}"))
        data += _data(k, panel, first, max(most, _LEAST_POINTS), live)
        first += len(panel.series)
        marks.append(_panel(k, panel, chart, at, live))
    if chart.heading:
        marks.append(mark("text", {"x": "L", "y": {"value": 12}, "text": {"value": chart.heading}}))
    if legend:
        marks.append(legend_marks(legend, _LEFT, WIDTH - _LEFT, f"{at.head} + rows * {at.row}"))
    return {
        "$schema": "https://vega.github.io/schema/vega/v6.json",
        "width": {"signal": "W"},
        "height": {"signal": f"{at.head} + rows * {at.row} + {legend_height(legend, WIDTH - _LEFT)}"},
        "padding": 4,
        "autosize": "none" if live else "pad",
        **({} if live else {"config": CONFIG, "background": CONFIG["background"]}),
        "signals": signals,
        "data": data,
        "scales": scales,
        "marks": marks,
    }


def _left(chart: Chart) -> int:
    """Pixels for the labels of the y axes."""
    names = [limited(name) for panel in chart.panels for name in panel.y.names]
    return round(max([_LEFT, *(text_width(name, 10.0) + 30 for name in names)]))


def _style(series: Series) -> dict[str, Any]:
    return {
        "run": series.run,
        "label": series.label,
        "color": series.color,
        "dash": [*series.dash],
        "width": series.width,
        "opacity": series.opacity,
        "marker": MARKERS.get(series.marker, ""),
        "bars": series.bars,
        "fill": series.base is not None,
    }


def _vertical(axis: Axis, height: int) -> str:
    return f"[0, {height}]" if axis.names else f"[{height}, 0]"


def _domain(name: str, axis: Axis) -> dict[str, Any]:
    return {"name": name, "value": [float(end) for end in axis.domain]}


def _scale(name: str, axis: Axis, ends: str, domain: str) -> dict[str, Any]:
    kinds = {"linear": "linear", "log": "log", "signed log": "symlog"}
    scale: dict[str, Any] = {
        "name": name,
        "type": kinds[axis.scale],
        "domain": {"signal": domain},
        "range": {"signal": ends},
        "zero": False,
        "nice": False,
        "clamp": False,
    }
    if axis.scale == "signed log":
        scale["constant"] = axis.linear_to
    return scale


def _axis(
    k: int, of: str, axis: Axis, orient: str, zoom: str | None, shown: str = "true", most_names: int = _MOST_NAMES
) -> dict[str, Any]:
    """An axis with its labels, and lines across the panel; ``shown`` is an expression for whether it has labels."""
    hidden = {"update": {"fillOpacity": {"signal": f"{shown} ? 1 : 0"}}}
    drawn: dict[str, Any] = {
        "scale": f"{of}{k}",
        "orient": orient,
        "title": axis.label,
        "encode": {"title": hidden, "labels": hidden},
        "labelOverlap": False if axis.names else "greedy",
        "grid": not axis.names,
        "zindex": 0,
    }
    if axis.scale == "linear" and not axis.names:
        drawn["tickCount"] = {"signal": "max(2, pw / 70)"} if of == "x" else 6
    if orient == "left":
        drawn["titleX"] = {"signal": "14 - L"}
    if axis.names:
        drawn["values"] = [*range(0, len(axis.names), math.ceil(len(axis.names) / most_names))]
        drawn["encode"]["labels"] = {
            "update": {**hidden["update"], "text": {"signal": f"N{of}{k}[datum.value]"}},
        }
        drawn["labelLimit"] = {"signal": "L - 24"} if of == "y" else 120
        if of == "x" and sum(text_width(limited(name), 10.0) + 16 for name in axis.names) > _UPRIGHT:
            drawn["labelAngle"] = -35
            drawn["labelAlign"] = "right"
    elif axis.scale != "linear" or axis.places:
        ticks = axis.ticks
        drawn["values"] = {"signal": f"{zoom} ? null : {ticks}"} if zoom else ticks
        drawn["encode"]["labels"] = {"update": {**hidden["update"], "text": {"signal": _NUMBER}}}
    else:
        drawn["encode"]["labels"] = {"update": {**hidden["update"], "text": {"signal": _LINEAR_NUMBER}}}
        if axis.whole:
            drawn["tickMinStep"] = 1
    return drawn


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _dataset(name: str, columns: Mapping[str, Sequence[Any]], live: bool) -> dict[str, Any]:
    return {"name": name, **({"columns": columns} if live else {"values": _rows(columns)})}


def _data(k: int, panel: Panel, first: int, most: int, live: bool) -> list[dict[str, Any]]:
    """Points, rules and notes of a panel."""
    points: dict[str, list[Any]] = {name: [] for name in ("s", "x", "y", "l", "h", "n", "t")}
    for place, series in enumerate(panel.series):
        line = series.thinned(most)
        count = len(line.x)
        lows = line.low if line.low is not None else None if line.base is None else np.full(count, line.base)
        highs = line.high if line.high is not None else None if line.base is None else line.y
        points["s"] += [first + place] * count
        places = _numbers(line.x, panel.x)
        points["x"] += places
        for name, values in (("y", line.y), ("l", lows), ("h", highs)):
            numbers = [None] * count if values is None else _numbers(values, panel.y)
            points[name] += [number if x is not None else None for x, number in zip(places, numbers, strict=True)]
        points["n"] += [None] * count if line.count is None else np.asarray(line.count).astype(int).tolist()
        points["t"] += line.names if live and line.names else [None] * count
    for name in ("l", "h", "n", "t"):
        if all(value is None for value in points[name]):
            del points[name]
    rules = [
        {
            "at": float(rule.at),
            "along": rule.along,
            "run": rule.run,
            "color": rule.color,
            "dash": [*rule.dash],
            "width": rule.width,
            "outlined": rule.outlined,
        }
        for rule in panel.rules
        if math.isfinite(rule.at)
    ]
    notes = [
        {
            "x": float(note.x),
            "y": float(note.y),
            "up": note.from_bottom,
            "text": note.text,
            "run": note.run,
            "color": note.color,
            "cross": note.cross,
        }
        for note in panel.notes
        if math.isfinite(note.x) and math.isfinite(note.y)
    ]
    found = [_dataset(f"p{k}", points, live)] if panel.series else []
    return [
        *found,
        *([{"name": f"r{k}", "values": rules}] if _has_rules(panel, live) else []),
        *([{"name": f"n{k}", "values": notes}] if panel.notes else []),
    ]


def _has_rules(panel: Panel, live: bool) -> bool:
    """Whether a panel has rules, or may have some when a page shows other cells in it."""
    return bool(panel.rules) or (live and panel.cells is not None)


def _numbers(values: np.ndarray, axis: Axis | None = None) -> list[float | int | None]:
    """Values to five digits, whole numbers whole; null for those that have no place."""
    of = np.asarray(values, dtype=float)
    there = np.isfinite(of) & ((of > 0) if axis is not None and axis.scale == "log" else True)
    return [_short(float(value)) if ok else None for value, ok in zip(of, there, strict=True)]


def _short(value: float) -> float | int:
    if value == round(value) and abs(value) < 1e15:
        return int(value)
    return rounded(value, 5)


def _panel(k: int, panel: Panel, chart: Chart, at: Layout, live: bool) -> dict[str, Any]:
    height = chart.height
    inside: list[dict[str, Any]] = []
    if panel.cells is not None:
        inside.append(cells_mark(k))
    if panel.series:
        inside += series_marks(k, panel)
    if _has_rules(panel, live):
        inside += rule_marks(k, height)
    if chart.over_steps:
        inside.append(step_mark(k, height))
    outside: list[dict[str, Any]] = []
    if panel.notes:
        outside += note_marks(k, height)
    if panel.title:
        outside.append(_title(k, panel.title.split("\n")))
    if panel.cells is not None and panel.cells.bar:
        outside.append(_color_bar(k, panel.cells.colors, height))
    signals = [{"name": "width", "update": "pw"}, {"name": "height", "value": height}]
    signals += [
        {"name": f"N{of}{k}", "value": [limited(name) for name in axis.names]}
        for of, axis in (("x", panel.x), ("y", panel.y))
        if axis.names
    ]
    labelled = "true" if not chart.shared_y else f"{k} % C == 0"
    return {
        "type": "group",
        "name": f"panel{k}",
        "signals": signals,
        "encode": {
            "update": {
                "x": {"signal": f"L + ({k} % C) * (pw + gap + {at.bar})"},
                "y": {"signal": f"{at.head + at.above} + floor({k} / C) * {at.row}"},
                "width": {"signal": "pw"},
                "height": {"value": height},
            }
        },
        "axes": [
            _axis(k, "x", panel.x, "bottom", f"zx{k}"),
            _axis(k, "y", panel.y, "left", f"zy{k}", labelled, int(chart.height / _NAME)),
        ],
        "marks": [
            {
                "type": "group",
                "clip": True,
                "encode": {"update": {"width": {"signal": "pw"}, "height": {"value": height}}},
                "marks": inside,
            },
            *outside,
        ],
    }


def _title(k: int, lines: list[str]) -> dict[str, Any]:
    text = {
        "x": {"value": 0},
        "y": {"value": -8 - _LINE * (len(lines) - 1)},
        "text": {"value": lines},
        "limit": "pw + 12",
        "lineHeight": {"value": _LINE},
        "fontSize": {"value": 12},
    }
    return mark("text", text, name=f"title{k}")


def _color_bar(k: int, colors: Colors, height: int) -> dict[str, Any]:
    axis = _axis(k, "z", colors.axis, "right", None)
    axis |= {"grid": False, "title": colors.label + (" (and below)" if colors.below else "")}
    del axis["encode"]["title"]
    return {
        "type": "group",
        "name": f"bar{k}",
        "signals": [{"name": "width", "value": 12}, {"name": "height", "value": height}],
        "encode": {
            "update": {"x": {"signal": "pw + 12"}, "width": {"value": 12}, "height": {"value": height}},
        },
        "axes": [axis],
        "marks": [picture_mark(palette_picture(colors), 12, height)],
    }
