"""The marks of a chart's panels for Vega: lines, bands, bars, points, rules, notes and pictures.

Expressions read the signals of ``normzoo.report.vega``: ``S`` has the look of each line, ``hidden`` and ``lit`` name
runs or lines, ``pw`` is the width of a panel, and panel k has the scales ``xk`` and ``yk`` with the domains ``dxk`` and
``dyk``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normzoo.report.charts import Panel

CROSS = "M-.7,-.7L.7,.7M-.7,.7L.7,-.7"  # a path in the square from -1 to 1
_SHOWN = "indexof(hidden, {run}) >= 0 ? 0 : lit != '' && lit != {run} ? 0.1 : {opacity}"
_SHOWN_LINE = (
    "indexof(hidden, S[datum.s].run) >= 0 || (S[datum.s].label && indexof(hidden, S[datum.s].label) >= 0) ? 0 "
    ": lit != '' && lit != S[datum.s].run && lit != S[datum.s].label ? 0.1 : {opacity}"
)


def mark(kind: str, encoded: Mapping[str, Any], data: str | None = None, name: str | None = None) -> dict[str, Any]:
    """A mark.

    Args:
        kind: as Vega calls it, such as ``"rule"``.
        encoded: its properties: an expression as text, or a mapping such as ``{"value": 1}``.
        data: the set with a row for each of the marks; None for a single one.
        name: by which the script of a page finds it.
    """
    properties = {key: {"signal": value} if isinstance(value, str) else value for key, value in encoded.items()}
    source = {} if data is None else {"from": {"data": data}}
    named = {} if name is None else {"name": name}
    return {"type": kind, **named, "interactive": False, **source, "encode": {"update": properties}}


def series_marks(k: int, panel: Panel) -> list[dict[str, Any]]:
    """The bands, lines, bars and points of panel k, whose points are the rows of the data set ``pk``."""
    solid, faded = (_SHOWN_LINE.format(opacity=of) for of in ("1", "S[datum.s].opacity"))
    x, y, low, high = (
        {"scale": f"{axis}{k}", "field": field} for axis, field in (("x", "x"), ("y", "y"), ("y", "l"), ("y", "h"))
    )
    color = "S[datum.s].color"
    lines: list[dict[str, Any]] = []
    if any((one.low is not None and not one.bars) or one.base is not None for one in panel.series):
        band = {
            "x": x,
            "y": low,
            "y2": high,
            "fill": color,
            "fillOpacity": f"({solid}) * 0.17",
            "defined": "isValid(datum.l) && isValid(datum.h) && !S[datum.s].bars",
        }
        lines.append(mark("area", band, f"f{k}"))
    line = {
        "x": x,
        "y": y,
        "stroke": color,
        "strokeWidth": "S[datum.s].width",
        "strokeDash": "S[datum.s].dash",
        "opacity": faded,
        "defined": "isValid(datum.y)",
    }
    lines.append(mark("line", line, f"f{k}"))
    facet = {"facet": {"name": f"f{k}", "data": f"p{k}", "groupby": "s"}}
    marks: list[dict[str, Any]] = [{"type": "group", "from": facet, "interactive": False, "marks": lines}]
    if any(one.bars for one in panel.series):
        bar = {
            "x": x,
            "y": low,
            "y2": high,
            "stroke": color,
            "strokeWidth": {"value": 1.5},
            "opacity": f"S[datum.s].bars && isValid(datum.l) ? ({solid}) : 0",
        }
        marks.append(mark("rule", bar, f"p{k}"))
    if any(one.marker for one in panel.series):
        point = {
            "x": x,
            "y": y,
            "shape": "S[datum.s].marker || 'circle'",
            "fill": color,
            "size": {"value": 30},
            "opacity": f"S[datum.s].marker && isValid(datum.y) ? ({faded}) : 0",
        }
        marks.append(mark("symbol", point, f"p{k}"))
    return marks


def rule_marks(k: int, height: int) -> list[dict[str, Any]]:
    """The straight lines of panel k with their outlines, from the data set ``rk``."""
    shown = _SHOWN.format(run="datum.run", opacity="1")
    x = f"datum.along == 'x' ? scale('x{k}', datum.at) : {{end}}"
    y = f"datum.along == 'y' ? scale('y{k}', datum.at) : {{end}}"
    ends = {"x": x.format(end="0"), "x2": x.format(end="pw"), "y": y.format(end="0"), "y2": y.format(end=str(height))}
    outline = {
        "stroke": {"value": "#000000"},
        "strokeWidth": "datum.width + 1.5",
        "opacity": f"datum.outlined ? ({shown}) : 0",
    }
    line = {"stroke": "datum.color", "strokeWidth": "datum.width", "strokeDash": "datum.dash", "opacity": shown}
    return [mark("rule", {**ends, **look}, f"r{k}") for look in (outline, line)]


def note_marks(k: int, height: int) -> list[dict[str, Any]]:
    """The crosses and texts of panel k, from the data set ``nk``."""
    shown = _SHOWN.format(run="datum.run", opacity="1")
    x = f"scale('x{k}', datum.x)"
    inside, near_the_end = f"{x} >= -1 && {x} <= pw + 1", f"{x} > pw - 40"
    place = {"x": x, "y": f"isValid(datum.up) ? {height} - datum.up : scale('y{k}', datum.y)"}
    cross = {
        "shape": {"value": CROSS},
        "size": {"value": 90},
        "stroke": "datum.color",
        "strokeWidth": {"value": 2},
        "fill": {"value": "transparent"},
        "opacity": f"datum.cross && {inside} ? ({shown}) : 0",
    }
    text = {
        "text": "datum.text",
        "fill": "datum.color",
        "fontSize": {"value": 10},
        "align": f"{near_the_end} ? 'right' : 'left'",
        "baseline": "datum.cross ? 'middle' : 'bottom'",
        "dx": f"datum.cross ? ({near_the_end} ? -8 : 8) : 0",
        "opacity": f"{inside} ? ({shown}) : 0",
    }
    return [mark("symbol", {**place, **cross}, f"n{k}"), mark("text", {**place, **text}, f"n{k}")]


def step_mark(k: int, height: int) -> dict[str, Any]:
    """The line at the step ``at`` that the reader of a page points at, outside of panel k if it has no such step."""
    seen = f"at != null && at >= domain('x{k}')[0] && at <= domain('x{k}')[1]"
    line = {
        "x": f"{seen} ? scale('x{k}', at) : -10",
        "y": {"value": 0},
        "y2": {"value": height},
        "stroke": {"value": "#888888"},
        "strokeWidth": {"value": 1},
    }
    return mark("rule", line)


def cells_mark(k: int) -> dict[str, Any]:
    """The picture of the cells of panel k, whose address is the signal ``urlk``."""
    (left, right), (low, high) = ([f"scale('{axis}{k}', d{axis}{k}[{end}])" for end in (0, 1)] for axis in "xy")
    image = {
        "url": f"url{k}",
        "x": left,
        "width": f"{right} - {left}",
        "y": f"min({low}, {high})",
        "height": f"abs({low} - {high})",
        "aspect": {"value": False},
        "smooth": {"value": False},
    }
    return mark("image", image)


def picture_mark(url: str, width: int, height: int) -> dict[str, Any]:
    """A picture at the upper left corner, stretched to a size in pixels."""
    values = {"url": url, "x": 0, "y": 0, "width": width, "height": height, "aspect": False, "smooth": False}
    return mark("image", {key: {"value": value} for key, value in values.items()})
