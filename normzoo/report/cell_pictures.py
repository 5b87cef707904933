"""Cells of heat maps as pictures: PNG files in addresses, which pages and files hold without reading anything."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from normzoo.report.charts import Axis, Cells, Colors

NOT_FINITE = "#D55E00"  # under a hatch
_HATCH, _PAPER = "#000000", "#ffffff"
_SIZE = (512, 256)  # pixels of a picture, at least
_MOST_PIXELS = 1200
_SEEN = 250  # part of a panel, in each direction, that a cell covers at least if it is not finite


def picture(cells: Cells, x: Axis, y: Axis) -> str:
    """The address of a picture of the cells, whose pixels are spaced evenly along the axes as they are drawn."""
    width, height = (
        min(max(least, 2 * count), _MOST_PIXELS) for least, count in zip(_SIZE, cells.z.shape[::-1], strict=True)
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
    return _png(index, [*cells.colors.palette, NOT_FINITE, _HATCH, _PAPER], transparency=count + 2)


def palette_picture(colors: Colors) -> str:
    """The address of a picture of the palette, the highest colour at the top."""
    rows = np.arange(len(colors.palette))[::-1, None]
    return _png(np.repeat(rows, 2, axis=1), colors.palette)


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


def _png(index: np.ndarray, palette: Sequence[str], **options: Any) -> str:
    """The address of an image of palette indices, of shape (height, width)."""
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette([int(color[i : i + 2], 16) for color in palette for i in (1, 3, 5)])
    file = io.BytesIO()
    image.save(file, "png", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
