"""The figures of a page: each as a picture that needs no script, and as data from which a script draws it again."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from normzoo.report.charts import Axis, Cells, Chart, rounded
from normzoo.report.elements import anchor, inline_svg
from normzoo.report.vega import PAGE_POINTS, layout, specification
from normzoo.report.vega_legend import legend_entries


class Gallery:
    """Collects the charts of a page.

    Attributes:
        charts: what the script of the page needs of each chart: ``id`` of its element, ``title``, ``spec`` for Vega,
            ``layout``, ``legend``, ``panels``.
    """

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []

    def element(self, title: str, chart: Chart, level: int = 2, within: str = "", **more: Any) -> str:
        """The figure as an element of the page, below its title as a heading.

        Args:
            title: of the figure.
            chart: what to draw.
            level: of the heading; 0 for none.
            within: of what the figure is, where a page has several of the same title.
            more: further facts for the script.
        """
        name = f"figure-{anchor(title, within)}"
        taken = {known["id"] for known in self.charts}
        unique = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        self.charts.append({"id": unique, "title": title, **_facts(chart), **more})
        heading = f"<h{level}>{html.escape(title)}</h{level}>" if level else ""
        told = f"{within}: {title}" if within else title
        return (
            f'<figure id="{html.escape(unique)}">{heading}<div class="static">{inline_svg(told, chart)}</div></figure>'
        )

    def elements(self, within: str, charts: Mapping[str, Chart], level: int = 3) -> list[str]:
        """Figures, each below its title as a heading of a level; ``within`` says of what they are."""
        return [self.element(title, chart, level, within) for title, chart in charts.items()]


def packed(data: Any) -> str:
    """Plain data as text for a page: JSON, compressed, in base64, which holds no markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def values_of(z: np.ndarray, there: np.ndarray) -> list[list[float | str | None]]:
    """Cells to three digits; null for none, and text for those that are not finite."""
    return [
        [
            None if not ok else rounded(value, 3) if np.isfinite(value) else str(float(value))
            for value, ok in zip(row, row_there, strict=True)
        ]
        for row, row_there in zip(z.tolist(), there, strict=True)
    ]


def _facts(chart: Chart) -> dict[str, Any]:
    return {
        "steps": chart.over_steps,
        "shared": chart.shared_y,
        "spec": specification(chart, live=True, points=PAGE_POINTS),
        "layout": asdict(layout(chart)),
        "legend": legend_entries(chart),
        "panels": [
            {"x": panel.x.label, "y": panel.y.label, "cells": panel.cells and _cells(panel.cells, panel.x, panel.y)}
            for panel in chart.panels
        ],
    }


def _cells(cells: Cells, x: Axis, y: Axis) -> dict[str, Any]:
    return {
        "x": [float(f"{edge:.12g}") for edge in cells.x],
        "y": [float(f"{edge:.12g}") for edge in cells.y],
        "z": values_of(cells.z, cells.there),
        "columns": [*x.names] or None,
        "rows": [*y.names] or None,
        "label": cells.colors.label,
    }
