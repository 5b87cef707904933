"""The page and the figure of benchmarks/norms.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Row = dict[str, Any]


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
    rows = sorted(rows, key=lambda row: row["worst"], reverse=True)
    places = range(len(rows))
    fig, ax = plt.subplots(figsize=(8, 0.27 * len(rows) + 1.2), layout="constrained")
    ax.axvline(1, color="0.6", linewidth=1)
    ax.hlines(places, [r["best"] for r in rows], [r["worst"] for r in rows], color="C0", linewidth=5, label="normzoo")
    marks = {"peer": ("D", "C1", "timm or torch, worst"), "naive": ("x", "0.4", "formula by autograd, worst")}
    for key, (marker, color, label) in marks.items():
        found = [(r[key], i) for i, r in zip(places, rows, strict=True) if r[key]]
        ax.scatter(*zip(*found, strict=True), marker=marker, color=color, s=22, label=label, zorder=3)
    ax.set_yticks(places, [r["name"] for r in rows])
    ax.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(-0.8, len(rows) - 0.2)
    ax.set_xlabel("forward and backward, as a multiple of torch.nn.BatchNorm2d (log scale)")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(loc="upper right", frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
