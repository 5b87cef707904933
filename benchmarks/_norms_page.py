"""The page and the figure of benchmarks/norms.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normzoo.report import save
from normzoo.report.charts import Axis, Chart, Panel, Rule, Series, axis_of
from normzoo.report.style import COLORS, GREY

Row = dict[str, Any]
_TICKS = (0.5, 1, 2, 5, 10, 20, 50)


def write(root: Path, rows: list[Row], results: dict[str, Any], machine: dict[str, Any]) -> None:
    """Make docs/benchmarks/norms.md and docs/images/norms-cost.png."""
    figure(root / "docs" / "images" / "norms-cost.png", rows)
    page = root / "docs" / "benchmarks" / "norms.md"
    head = page.read_text(encoding="utf-8").partition("<!-- measured -->")[0] if page.exists() else ""
    text = "\n\n".join([conditions(machine), summary_table(rows), configuration_table(rows, results)])
    page.write_text(f"{head}<!-- measured -->\n\n{text}\n", encoding="utf-8")


def conditions(machine: dict[str, Any]) -> str:
    """What was measured on."""
    versions = ", ".join(f"{what} {machine[what.lower()]}" for what in ("torch", "timm", "Python"))
    hardware = f"{machine['processor']}, {machine['threads']} threads"
    return f"Measured on {machine['date']}: {hardware}, {versions}, n = {machine['rounds']} rounds."


def summary_table(rows: list[Row]) -> str:
    """A row for each layer: multiples of nn.BatchNorm2d."""
    lines = [
        "| layer | best | worst | bar | | floor | over floor | peer | naive | compiled | saved |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = "met" if row["worst"] <= row["bar"] else "above"
        cells = [
            f"`{row['name']}`",
            number(row["best"]),
            number(row["worst"]),
            f"{row['bar']:g}",
            met,
            number(row["floor"]),
            number(row["over_floor"]),
            number(row["peer"]),
            number(row["naive"]),
            number(row["compiled"]),
            f"{100 * row['saved']:.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def configuration_table(rows: list[Row], results: dict[str, Any]) -> str:
    """A row for each layer, a column for each shape and memory format."""
    keys = list(results[rows[0]["name"]]["eager"])
    lines = ["| layer | " + " | ".join(heading(k) for k in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    times = [min(r["eager"][k]["torch_ms"] for r in results.values()) for k in keys]
    lines.append("| `torch.nn.BatchNorm2d`, ms | " + " | ".join(number(t) for t in times) + " |")
    for row in rows:
        eager = results[row["name"]]["eager"]
        lines.append(f"| `{row['name']}` | " + " | ".join(number(eager[k]["ours"]) for k in keys) + " |")
    return "\n".join(lines)


def heading(key: str) -> str:
    """``128x16x32x32 channels_last`` on two lines."""
    shape, _, kind = key.partition(" ")
    return f"{shape}<br>{kind}"


def number(value: float | None) -> str:
    """Three figures at most; nothing for what was not measured."""
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def figure(path: Path, rows: list[Row]) -> None:
    """Each layer's range over shapes and formats, with its peer's and the naive formula's worst."""
    rows = sorted(rows, key=lambda row: row["worst"])
    spans = [
        Series("normzoo" if i == 0 else "", "", _points(r["best"], r["worst"]), _points(i, i), color=COLORS[0], width=5)
        for i, r in enumerate(rows)
    ]
    marks = []
    for key, marker, color, label in (
        ("peer", "D", COLORS[1], "timm or torch, worst"),
        ("naive", "s", GREY, "formula by autograd, worst"),
    ):
        x, y = zip(*sorted((r[key], i) for i, r in enumerate(rows) if r[key]), strict=True)
        marks.append(Series(label, "", _points(*x), _points(*y), color=color, marker=marker, width=0))
    values = np.concatenate([series.x for series in (*spans, *marks)])
    x_axis = axis_of(values, "log", "forward and backward, as a multiple of torch.nn.BatchNorm2d")
    panel = Panel(
        replace(x_axis, places=tuple(t for t in _TICKS if x_axis.domain[0] <= t <= x_axis.domain[1])),
        Axis(domain=(-0.5, len(rows) - 0.5), names=tuple(r["name"] for r in rows)),
        series=(*spans, *marks),
        rules=(Rule(1.0, "x"),),
    )
    save(Chart((panel,), height=16 * len(rows)), path)


def _points(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)
