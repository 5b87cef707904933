"""The look of figures: colours, lines, labels and legends."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}
# Okabe & Ito's colours, told apart by colour-blind readers too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MOST_PANELS = 4
_MOST_IN_HALF = 60  # letters of a label that fit into half of a figure's width
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^v"  # of a run's own lines


def line(index: int) -> dict[str, Any]:
    """The look of a run's lines, as runs may lie on top of each other."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _DASHES[(index + index // len(COLORS)) % len(_DASHES)],
    }


def marker(number: int) -> str:
    """The marker of one of a run's own lines."""
    return _MARKERS[number % len(_MARKERS)]


def as_label(name: str) -> str:
    """A name as matplotlib draws it: ``$`` would start a formula, and a leading underscore hide the line."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def add_legend(figure: Figure, *panels: Axes) -> None:
    """The legend of one panel, or of several, below the figure, if any line has a label."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        wide = max(map(len, named)) > _MOST_IN_HALF
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=1 if wide else 2)
