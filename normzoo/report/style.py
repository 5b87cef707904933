"""The look of lines: colours, dashes and markers."""

from __future__ import annotations

from typing import Any

# Okabe & Ito's colours, told apart by colour-blind readers too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#808080"
MOST_PANELS = 4
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (1.5, 2), (6, 2, 1.5, 2))
_MARKERS = "osD^v"  # of a run's own lines


def line(index: int) -> dict[str, Any]:
    """The look of a run's lines, as runs may lie on top of each other."""
    return {
        "color": COLORS[index % len(COLORS)],
        "dash": _DASHES[(index + index // len(COLORS)) % len(_DASHES)],
    }


def marker(number: int) -> str:
    """The marker of one of a run's own lines."""
    return _MARKERS[number % len(_MARKERS)]
