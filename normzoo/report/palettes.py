"""Colours of heat maps and of many lines, to be told apart by colour-blind readers."""

from __future__ import annotations

import numpy as np

# Viridis and cividis (CC0) by van der Walt & Smith 2015 and Nuñez et al. 2018, RdBu by Brewer 2002: every 16th or 25th
_ANCHORS = {
    "viridis": (
        "#440154 #48186a #472d7b #424086 #3b528b #33638d #2c728e #26828e #21918c "
        "#1fa088 #28ae80 #3fbc73 #5ec962 #84d44b #addc30 #d8e219 #fde725"
    ),
    "cividis": (
        "#00224e #002e6a #1a386f #32436d #434e6c #535a6d #61656f #6f7073 #7d7c78 "
        "#8c8878 #9b9476 #aba072 #bcae6c #cdbb63 #dec958 #f0d846 #fee838"
    ),
    "red-blue": ("#053061 #2065ab #4393c3 #90c4dd #d1e5f0 #f7f6f6 #fddbc7 #f3a481 #d6604d #b1182b #67001f"),
}


def palette(name: str, count: int) -> tuple[str, ...]:
    """Hexadecimal RGB colours from one end of a palette to the other.

    Args:
        name: ``"viridis"`` or ``"cividis"``, both lighter from end to end, or ``"red-blue"``, blue below the middle,
            white in it and red above.
        count: how many, at least 2.
    """
    anchors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in _ANCHORS[name].split()])
    at = np.linspace(0, len(anchors) - 1, count)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, c]).round().astype(int) for c in range(3)]
    return tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in zip(*channels, strict=True))
