"""Pictures of cells, and the colours that their pixels have to have, value by value."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from normzoo.report.cell_pictures import picture
from normzoo.report.charts import Axis, Cells, Colors, Panel

ODD = ((0xD5, 0x5E, 0x00, 255), (0, 0, 0, 255))  # of hatched cells, which are not finite

Color = tuple[int, ...]


def pixels(cells: Cells, panel: Panel) -> np.ndarray:
    """The picture of a panel's cells, of shape (height, width, 4)."""
    kind, text = picture(cells, panel.x, panel.y).split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        return np.asarray(image.convert("RGBA"))


def scaled(value: float, axis: Axis) -> float:
    """Where a value is along an axis, in units of its own."""
    if axis.scale == "log":
        return math.log(value)
    if axis.scale == "signed log":
        return math.copysign(math.log1p(abs(value) / axis.linear_to), value)
    return value


def pixel_of(cells: Cells, panel: Panel, row: int, column: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """The pixel in the middle of a cell."""
    down = _middle(cells.y.tolist(), panel.y, row, shape[0])
    return down if panel.y.names else shape[0] - 1 - down, _middle(cells.x.tolist(), panel.x, column, shape[1])


def _middle(edges: list[float], axis: Axis, place: int, count: int) -> int:
    at = [scaled(edge, axis) for edge in edges]
    return int(((at[place] + at[place + 1]) / 2 - at[0]) / (at[-1] - at[0]) * count)


def color_of(value: float, colors: Colors) -> list[Color]:
    """The colour of a value, and those beside it if it is as near to their border as rounding is."""
    low, high = (scaled(end, colors.axis) for end in colors.axis.domain)
    clipped = min(max(value, colors.axis.domain[0]), colors.axis.domain[1])
    part = (scaled(clipped, colors.axis) - low) / (high - low) * len(colors.palette)
    places = {min(max(math.floor(part + shift), 0), len(colors.palette) - 1) for shift in (0.0, -1e-6, 1e-6)}
    return [(*bytes.fromhex(colors.palette[place][1:]), 255) for place in sorted(places)]


def is_odd(color: Color | np.ndarray) -> np.ndarray:
    """Whether a pixel, or each of a picture, is one of a hatched cell."""
    return np.any([(np.asarray(color) == odd).all(axis=-1) for odd in ODD], axis=0)
