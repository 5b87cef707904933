"""Charts as specifications for Vega, which draws them in a page and, by vl-convert, in files.

Specification and expressions: https://vega.github.io/vega/docs/.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from normzoo.report.charts import Axis, Cells, Chart, Colors, Note, Panel, Rule, Series, limited, rounded, text_width

WIDTH = 900  # of a file, and of a page that is wide enough, in pixels
_LEFT, _GAP, _BOTTOM, _BAR, _LINE = 58, 20, 46, 84, 15
_ONE_COLUMN = 560  # pixels of width below which panels stand below each other
_MOST_NAMES = 24
_UPRIGHT = 560  # pixels of names side by side, beyond which they are turned
_MOST_ENTRIES = 36  # of a legend
FILE_POINTS, PAGE_POINTS = 9_000, 20_000  # of all lines of a chart together
_LEAST_POINTS = 40  # of one line
_IMAGE = (512, 256)  # pixels of a picture of cells, at least
_MOST_PIXELS = 1200
_SEEN = 250  # part of a panel, in each direction, that a cell covers at least if it is not finite
_NOT_FINITE, _HATCH = "#D55E00", "#000000"
_MARKERS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "x": "cross"}
_NUMBER = (
    "datum.value != 0 && (abs(datum.value) >= 1e5 || abs(datum.value) < 1e-3) "
    "? format(datum.value, '~e') : format(datum.value, '~g')"
)
_LINEAR_NUMBER = "abs(datum.value) >= 1e6 ? format(datum.value, '~e') : datum.label"
_SHOWN = "indexof(hidden, {run}) >= 0 ? 0 : lit != '' && lit != {run} ? 0.1 : {opacity}"
_SHOWN_LINE = (
    "indexof(hidden, S[datum.s].run) >= 0 || (S[datum.s].label && indexof(hidden, S[datum.s].label) >= 0) ? 0 "
    ": lit != '' && lit != S[datum.s].run && lit != S[datum.s].label ? 0.1 : {opacity}"
)
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
    legend = [] if live else legend_entries(chart, _MOST_ENTRIES)
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
        marks.append(_text({"x": {"signal": "L"}, "y": {"value": 12}, "text": {"value": chart.heading}}))
    if legend:
        marks.append(_legend(legend, f"{at.head} + rows * {at.row}"))
    return {
        "$schema": "https://vega.github.io/schema/vega/v6.json",
        "width": {"signal": "W"},
        "height": {"signal": f"{at.head} + rows * {at.row} + {_legend_height(legend)}"},
        "padding": 4,
        "autosize": "none" if live else "pad",
        **({} if live else {"config": CONFIG, "background": CONFIG["background"]}),
        "signals": signals,
        "data": data,
        "scales": scales,
        "marks": marks,
    }


def picture(cells: Cells, x: Axis, y: Axis) -> str:
    """The cells as a picture, an address that holds it: pixels are spaced evenly along the axes as they are drawn."""
    width, height = (
        min(max(least, 2 * count), _MOST_PIXELS) for least, count in zip(_IMAGE, cells.z.shape[::-1], strict=True)
    )
    columns = _cell_of_pixel(cells.x, x, width)
    rows = _cell_of_pixel(cells.y, y, height)
    if not y.names:  # whose first row is at the top; else upwards
        rows = rows[::-1]
    index = _color_index(cells)[np.ix_(rows, columns)]
    odd, there = _widened(cells.odd, rows, columns), cells.there[np.ix_(rows, columns)]
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    count = len(cells.colors.palette)
    index = np.where(odd, np.where((across + down) % 8 < 3, count + 1, count), np.where(there, index, count + 2))
    image = Image.fromarray(index.astype(np.uint8), "P")
    palette = [*cells.colors.palette, _NOT_FINITE, _HATCH, "#ffffff"]
    image.putpalette([int(color[i : i + 2], 16) for color in palette for i in (1, 3, 5)])
    return _png(image, transparency=count + 2)


def _left(chart: Chart) -> int:
    """Pixels for the labels of the y axes."""
    names = [limited(name) for panel in chart.panels for name in panel.y.names]
    return round(max([_LEFT, *(text_width(name, 10.0) + 30 for name in names)]))


def _style(series: Series) -> dict[str, Any]:
    style: dict[str, Any] = {
        "run": series.run,
        "label": series.label,
        "color": series.color,
        "dash": [*series.dash],
        "width": series.width,
        "opacity": series.opacity,
        "marker": _MARKERS.get(series.marker, ""),
        "bars": series.bars,
        "fill": series.base is not None,
    }
    return style


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


def _axis(k: int, of: str, axis: Axis, orient: str, zoom: str | None, shown: str = "true") -> dict[str, Any]:
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
        drawn["values"] = [*range(0, len(axis.names), math.ceil(len(axis.names) / _MOST_NAMES))]
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


def _dataset(name: str, columns: Mapping[str, Sequence[Any]], live: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, **({"columns": columns} if live else {"values": _rows(columns)}), **more}


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
        inside.append(_image(k, panel.cells))
    if panel.series:
        inside += _series_marks(k, panel)
    if _has_rules(panel, live):
        inside += _rule_marks(k, height)
    if chart.over_steps:
        seen = f"at != null && at >= domain('x{k}')[0] && at <= domain('x{k}')[1]"
        inside.append(
            {
                "type": "rule",
                "interactive": False,
                "encode": {
                    "update": {
                        "x": {"signal": f"{seen} ? scale('x{k}', at) : -10"},
                        "y": {"value": 0},
                        "y2": {"value": height},
                        "stroke": {"value": "#888888"},
                        "strokeWidth": {"value": 1},
                    }
                },
            }
        )
    outside: list[dict[str, Any]] = []
    if panel.notes:
        outside += _note_marks(k, height)
    if panel.title:
        lines = panel.title.split("\n")
        outside.append(
            {"name": f"title{k}"}
            | _text(
                {
                    "x": {"value": 0},
                    "y": {"value": -8 - _LINE * (len(lines) - 1)},
                    "text": {"value": lines},
                    "limit": {"signal": "pw + 12"},
                    "lineHeight": {"value": _LINE},
                    "fontSize": {"value": 12},
                }
            )
        )
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
            _axis(k, "y", panel.y, "left", f"zy{k}", labelled),
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


def _series_marks(k: int, panel: Panel) -> list[dict[str, Any]]:
    solid, faded = (_SHOWN_LINE.format(opacity=of) for of in ("1", "S[datum.s].opacity"))
    facet = {"facet": {"name": f"f{k}", "data": f"p{k}", "groupby": "s"}}
    place = {"x": {"scale": f"x{k}", "field": "x"}}
    color = {"signal": "S[datum.s].color"}
    lines: list[dict[str, Any]] = []
    banded = any((s.low is not None and not s.bars) or s.base is not None for s in panel.series)
    if banded:
        lines.append(
            {
                "type": "area",
                "interactive": False,
                "from": {"data": f"f{k}"},
                "encode": {
                    "update": {
                        **place,
                        "y": {"scale": f"y{k}", "field": "l"},
                        "y2": {"scale": f"y{k}", "field": "h"},
                        "fill": color,
                        "fillOpacity": {"signal": f"({solid}) * 0.17"},
                        "defined": {"signal": "isValid(datum.l) && isValid(datum.h) && !S[datum.s].bars"},
                    }
                },
            }
        )
    lines.append(
        {
            "type": "line",
            "interactive": False,
            "from": {"data": f"f{k}"},
            "encode": {
                "update": {
                    **place,
                    "y": {"scale": f"y{k}", "field": "y"},
                    "stroke": color,
                    "strokeWidth": {"signal": "S[datum.s].width"},
                    "strokeDash": {"signal": "S[datum.s].dash"},
                    "opacity": {"signal": faded},
                    "defined": {"signal": "isValid(datum.y)"},
                }
            },
        }
    )
    marks: list[dict[str, Any]] = [{"type": "group", "from": facet, "interactive": False, "marks": lines}]
    if any(series.bars for series in panel.series):
        marks.append(
            {
                "type": "rule",
                "interactive": False,
                "from": {"data": f"p{k}"},
                "encode": {
                    "update": {
                        **place,
                        "y": {"scale": f"y{k}", "field": "l"},
                        "y2": {"scale": f"y{k}", "field": "h"},
                        "stroke": color,
                        "strokeWidth": {"value": 1.5},
                        "opacity": {"signal": f"S[datum.s].bars && isValid(datum.l) ? ({solid}) : 0"},
                    }
                },
            }
        )
    if any(series.marker for series in panel.series):
        marks.append(
            {
                "type": "symbol",
                "interactive": False,
                "from": {"data": f"p{k}"},
                "encode": {
                    "update": {
                        **place,
                        "y": {"scale": f"y{k}", "field": "y"},
                        "shape": {"signal": "S[datum.s].marker || 'circle'"},
                        "fill": color,
                        "size": {"value": 30},
                        "opacity": {"signal": f"S[datum.s].marker && isValid(datum.y) ? ({faded}) : 0"},
                    }
                },
            }
        )
    return marks


def _rule_marks(k: int, height: int) -> list[dict[str, Any]]:
    shown = _SHOWN.format(run="datum.run", opacity="1")
    x = f"datum.along == 'x' ? scale('x{k}', datum.at) : {{end}}"
    y = f"datum.along == 'y' ? scale('y{k}', datum.at) : {{end}}"
    ends = {
        "x": {"signal": x.format(end="0")},
        "x2": {"signal": x.format(end="pw")},
        "y": {"signal": y.format(end="0")},
        "y2": {"signal": y.format(end=str(height))},
    }
    outline, line = (
        {
            "type": "rule",
            "interactive": False,
            "from": {"data": f"r{k}"},
            "encode": {"update": {**ends, **look}},
        }
        for look in (
            {
                "stroke": {"value": "#000000"},
                "strokeWidth": {"signal": "datum.width + 1.5"},
                "opacity": {"signal": f"datum.outlined ? ({shown}) : 0"},
            },
            {
                "stroke": {"signal": "datum.color"},
                "strokeWidth": {"signal": "datum.width"},
                "strokeDash": {"signal": "datum.dash"},
                "opacity": {"signal": shown},
            },
        )
    )
    return [outline, line]


def _note_marks(k: int, height: int) -> list[dict[str, Any]]:
    shown = _SHOWN.format(run="datum.run", opacity="1")
    place = {
        "x": {"signal": f"scale('x{k}', datum.x)"},
        "y": {"signal": f"isValid(datum.up) ? {height} - datum.up : scale('y{k}', datum.y)"},
    }
    inside = f"scale('x{k}', datum.x) >= -1 && scale('x{k}', datum.x) <= pw + 1"
    opacity = {"signal": f"{inside} ? ({shown}) : 0"}
    return [
        {
            "type": "symbol",
            "interactive": False,
            "from": {"data": f"n{k}"},
            "encode": {
                "update": {
                    **place,
                    "shape": {"value": "M-.7,-.7L.7,.7M-.7,.7L.7,-.7"},
                    "size": {"value": 90},
                    "stroke": {"signal": "datum.color"},
                    "strokeWidth": {"value": 2},
                    "fill": {"value": "transparent"},
                    "opacity": {"signal": f"datum.cross && {inside} ? ({shown}) : 0"},
                }
            },
        },
        {
            "type": "text",
            "interactive": False,
            "from": {"data": f"n{k}"},
            "encode": {
                "update": {
                    **place,
                    "text": {"signal": "datum.text"},
                    "fill": {"signal": "datum.color"},
                    "fontSize": {"value": 10},
                    "align": {"signal": f"scale('x{k}', datum.x) > pw - 40 ? 'right' : 'left'"},
                    "baseline": {"signal": "datum.cross ? 'middle' : 'bottom'"},
                    "dx": {"signal": f"datum.cross ? (scale('x{k}', datum.x) > pw - 40 ? -8 : 8) : 0"},
                    "opacity": opacity,
                }
            },
        },
    ]


def _image(k: int, cells: Cells) -> dict[str, Any]:
    horizontal, vertical = (
        [f"scale('x{k}', dx{k}[{end}])" for end in (0, 1)],
        [f"scale('y{k}', dy{k}[{end}])" for end in (0, 1)],
    )
    return {
        "type": "image",
        "interactive": False,
        "encode": {
            "update": {
                "url": {"signal": f"url{k}"},
                "x": {"signal": horizontal[0]},
                "width": {"signal": f"{horizontal[1]} - {horizontal[0]}"},
                "y": {"signal": f"min({', '.join(vertical)})"},
                "height": {"signal": f"abs({' - '.join(vertical)})"},
                "aspect": {"value": False},
                "smooth": {"value": False},
            }
        },
    }


def _color_bar(k: int, colors: Colors, height: int) -> dict[str, Any]:
    rows = np.arange(len(colors.palette), dtype=np.uint8)[::-1, None]
    image = Image.fromarray(np.repeat(rows, 2, axis=1), "P")
    image.putpalette([int(color[i : i + 2], 16) for color in colors.palette for i in (1, 3, 5)])
    axis = _axis(k, "z", colors.axis, "right", None)
    axis |= {"grid": False, "title": colors.label + (" (and below)" if colors.below else "")}
    del axis["encode"]["title"]
    bar = {
        "x": {"value": 0},
        "y": {"value": 0},
        "width": {"value": 12},
        "height": {"value": height},
        "url": {"value": _png(image)},
        "aspect": {"value": False},
        "smooth": {"value": False},
    }
    return {
        "type": "group",
        "name": f"bar{k}",
        "signals": [{"name": "width", "value": 12}, {"name": "height", "value": height}],
        "encode": {
            "update": {"x": {"signal": "pw + 12"}, "width": {"value": 12}, "height": {"value": height}},
        },
        "axes": [axis],
        "marks": [{"type": "image", "interactive": False, "encode": {"update": bar}}],
    }


def legend_entries(chart: Chart, most: int | None = None) -> list[dict[str, Any]]:
    """What a legend has: a label, the look of a line, and the run with which it is hidden; of many the first ones."""
    entries = []
    for mark in chart.legend():
        look: dict[str, Any] = {
            "label": mark.label,
            "run": mark.run,
            "color": mark.color,
            "dash": [],
            "width": 0.0,
            "marker": "",
        }
        if isinstance(mark, Series | Rule):
            look |= {"dash": [*mark.dash], "width": mark.width}
        if isinstance(mark, Rule) and mark.outlined:
            look["color"] = "#808080"
        if isinstance(mark, Series):
            look["marker"] = _MARKERS.get(mark.marker, "")
        if isinstance(mark, Note):
            look["marker"] = "M-.7,-.7L.7,.7M-.7,.7L.7,-.7" if mark.cross else "square"
        entries.append(look)
    if any(panel.cells is not None and panel.cells.odd.any() for panel in chart.panels):
        entries.append(
            {"label": "not finite", "run": "", "color": _NOT_FINITE, "dash": [], "width": 0.0, "marker": "square"}
        )
    if most is not None and len(entries) > most:
        more = {"label": f"and {len(entries) - most + 1} others", "color": "#ffffff", "dash": [], "width": 0.0}
        entries = [*entries[: most - 1], {**more, "marker": ""}]
    return entries


def _legend_columns(entries: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    widest = max(text_width(entry["label"]) for entry in entries) + 48
    columns = max(1, min(4, int((WIDTH - _LEFT) // widest), len(entries)))
    return columns, (WIDTH - _LEFT) / columns if columns > 1 else WIDTH - _LEFT


def _legend_height(entries: Sequence[Mapping[str, Any]]) -> int:
    return 6 + 17 * math.ceil(len(entries) / _legend_columns(entries)[0]) if entries else 0


def _legend(entries: Sequence[Mapping[str, Any]], y: str) -> dict[str, Any]:
    columns, width = _legend_columns(entries)
    rows = math.ceil(len(entries) / columns)
    marks = []
    for i, entry in enumerate(entries):
        x, down = _LEFT + (i // rows) * width, (i % rows) * 17 + 8
        if entry["width"]:
            marks.append(
                {
                    "type": "rule",
                    "encode": {
                        "update": {
                            "x": {"value": x},
                            "x2": {"value": x + 26},
                            "y": {"value": down},
                            "stroke": {"value": entry["color"]},
                            "strokeWidth": {"value": entry["width"]},
                            "strokeDash": {"value": entry["dash"]},
                        }
                    },
                }
            )
        if entry["marker"]:
            crossed = entry["marker"].startswith("M")
            marks.append(
                {
                    "type": "symbol",
                    "encode": {
                        "update": {
                            "x": {"value": x + 13},
                            "y": {"value": down},
                            "shape": {"value": entry["marker"]},
                            "size": {"value": 50},
                            "fill": {"value": "transparent" if crossed else entry["color"]},
                            "stroke": {"value": entry["color"]},
                            "strokeWidth": {"value": 2 if crossed else 0},
                        }
                    },
                }
            )
        label = {"x": {"value": x + 32}, "y": {"value": down}, "text": {"value": entry["label"]}}
        marks.append(_text({**label, "baseline": {"value": "middle"}, "limit": {"value": width - 40}}))
    return {"type": "group", "encode": {"update": {"y": {"signal": y}}}, "marks": marks}


def _text(encoded: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "text", "interactive": False, "encode": {"update": dict(encoded)}}


def _cell_of_pixel(edges: np.ndarray, axis: Axis, pixels: int) -> np.ndarray:
    """The cell in which the middle of each pixel is, between the first and the last edge."""
    at = on_scale(np.asarray(edges, dtype=float), axis)
    middles = at[0] + (np.arange(pixels) + 0.5) / pixels * (at[-1] - at[0])
    return np.clip(np.searchsorted(at, middles, side="right") - 1, 0, len(at) - 2)


def _widened(odd: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels of cells that are true, of which none is too small to be seen; ``rows`` and ``columns`` as above."""
    if not odd.any():
        return np.zeros((len(rows), len(columns)), dtype=bool)
    some_rows, some_columns = (np.flatnonzero(odd.any(axis=axis)) for axis in (1, 0))
    down, across = _covered(rows, some_rows), _covered(columns, some_columns)
    pixels: np.ndarray = down @ odd[np.ix_(some_rows, some_columns)].astype(np.float32) @ across.T > 0
    return pixels


def _covered(cells: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of shape (pixels, chosen cells): 1 where a cell is, and around it if it is narrow."""
    least = math.ceil(len(cells) / _SEEN)
    backwards = cells[0] > cells[-1]
    ascending = cells[::-1] if backwards else cells
    first, end = (np.searchsorted(ascending, chosen, side=side) for side in ("left", "right"))
    first = np.where(end - first < least, np.clip((first + end - least) // 2, 0, len(cells) - least), first)
    end = np.maximum(end, first + least)
    places = np.arange(len(cells))[:, None]
    covered = ((first <= places) & (places < end)).astype(np.float32)
    return covered[::-1] if backwards else covered


def on_scale(values: np.ndarray, axis: Axis) -> np.ndarray:
    """Values as the scale places them, up to a factor and an offset."""
    if axis.scale == "log":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(values)
    if axis.scale == "signed log":
        return np.sign(values) * np.log1p(np.abs(values) / axis.linear_to)
    return values


def _color_index(cells: Cells) -> np.ndarray:
    """The place of each cell's colour in the palette."""
    axis, count = cells.colors.axis, len(cells.colors.palette)
    low, high = on_scale(np.array(axis.domain), axis)
    clipped = np.clip(np.where(np.isfinite(cells.z), cells.z, axis.domain[0]), *axis.domain)
    return np.clip((on_scale(clipped, axis) - low) / (high - low) * count, 0, count - 1).astype(int)


def _png(image: Image.Image, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "png", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
