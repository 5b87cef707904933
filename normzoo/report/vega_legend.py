"""Legends of charts: what they name, and their marks for Vega below the panels of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from normzoo.report.cell_pictures import NOT_FINITE
from normzoo.report.charts import Chart, Note, Rule, Series, text_width
from normzoo.report.style import GREY
from normzoo.report.vega_marks import CROSS, mark

MARKERS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "x": "cross"}
MOST_ENTRIES = 36  # in a file
_ROW = 17  # height of an entry, in pixels


def legend_entries(chart: Chart, most: int | None = None) -> list[dict[str, Any]]:
    """What a legend has: a label, the look of a line, and the run with which it is hidden; of many the first ones."""
    entries = [_entry(shown) for shown in chart.legend()]
    if any(panel.cells is not None and panel.cells.odd.any() for panel in chart.panels):
        entries.append(_look("not finite", NOT_FINITE, marker="square"))
    if most is not None and len(entries) > most:
        entries = [*entries[: most - 1], _look(f"and {len(entries) - most + 1} others", "#ffffff")]
    return entries


def legend_height(entries: Sequence[Mapping[str, Any]], width: int) -> int:
    """Pixels from the panels to the end of a legend that is so many pixels wide."""
    return 6 + _ROW * math.ceil(len(entries) / _columns(entries, width)) if entries else 0


def legend_marks(entries: Sequence[Mapping[str, Any]], left: int, width: int, y: str) -> dict[str, Any]:
    """The legend, column by column, from ``left`` on; ``y`` is an expression for its place."""
    columns = _columns(entries, width)
    rows = math.ceil(len(entries) / columns)
    marks = []
    for i, entry in enumerate(entries):
        x, down = left + (i // rows) * width / columns, (i % rows) * _ROW + 8
        if entry["width"]:
            line = {"x": x, "x2": x + 26, "y": down, "stroke": entry["color"], "strokeWidth": entry["width"]}
            marks.append(mark("rule", _values(line | {"strokeDash": entry["dash"]})))
        if entry["marker"]:
            crossed = entry["marker"] == CROSS
            symbol = {"x": x + 13, "y": down, "shape": entry["marker"], "size": 50, "stroke": entry["color"]}
            symbol |= {"fill": "transparent" if crossed else entry["color"], "strokeWidth": 2 if crossed else 0}
            marks.append(mark("symbol", _values(symbol)))
        label = {"x": x + 32, "y": down, "text": entry["label"], "baseline": "middle", "limit": width / columns - 40}
        marks.append(mark("text", _values(label)))
    return {"type": "group", "encode": {"update": {"y": {"signal": y}}}, "marks": marks}


def _entry(shown: Series | Rule | Note) -> dict[str, Any]:
    if isinstance(shown, Note):
        return _look(shown.label, shown.color, shown.run, marker=CROSS if shown.cross else "square")
    marker = MARKERS.get(shown.marker, "") if isinstance(shown, Series) else ""
    color = GREY if isinstance(shown, Rule) and shown.outlined else shown.color  # which may be white
    return _look(shown.label, color, shown.run, shown.dash, shown.width, marker)


def _look(
    label: str, color: str, run: str = "", dash: Sequence[float] = (), width: float = 0.0, marker: str = ""
) -> dict[str, Any]:
    return {"label": label, "run": run, "color": color, "dash": [*dash], "width": width, "marker": marker}


def _columns(entries: Sequence[Mapping[str, Any]], width: int) -> int:
    widest = max(text_width(entry["label"]) for entry in entries) + 48
    return max(1, min(4, int(width // widest), len(entries)))


def _values(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {"value": value} for key, value in properties.items()}
