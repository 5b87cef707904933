"""The figures of docs/callbacks.md, from the runs of the recipe ``measurements``.

usage: normzoo sweep measurements && python benchmarks/callback_figures.py runs/measurements-sweep-...
"""

from __future__ import annotations

import sys
from pathlib import Path

from normzoo.report import load_runs, save
from normzoo.report.figures import draw

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAMES = {
    "Gradient histogram": "gradient-tails",
    "Relative loss along the step": "relative-loss",
    "Channels over depth": "channel-moments",
    "Gradient noise scale": "gradient-noise",
}


def main(folder: str) -> None:
    """Draw the runs below the folder."""
    figures = draw(load_runs(Path(folder)))
    for title, name in NAMES.items():
        save(figures[title], IMAGES / f"callbacks-{name}.png", scale=0.9)


if __name__ == "__main__":
    main(*sys.argv[1:])
