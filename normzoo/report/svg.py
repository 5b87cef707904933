"""Figures as elements of a page."""

from __future__ import annotations

import base64
import html
import io
import re

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

_DPI = 200  # of what is an image, the cells of heat maps: each of 512 channels has a line in a panel of 2.5 inches
_PNG = re.compile(r"(?<=data:image/png;base64,)[\sA-Za-z0-9+/=]+")


def inline_svg(name: str, figure: Figure) -> str:
    """The figure as an inline element.

    Args:
        name: what the figure shows, for readers who do not see it; other than those of the page's other figures, as the
            names of the elements inside are made from it.
        figure: what to draw.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    element = _PNG.sub(lambda found: _with_palette(found[0]), text[text.index("<svg") :])
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)


def _with_palette(png: str) -> str:
    """The same image with its colours in a palette, if they are few, which takes a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    pixels = np.asarray(image).view(np.uint32)[..., 0]
    colors, places = np.unique(pixels, return_inverse=True)
    if len(colors) > 256:
        return png
    indexed = Image.fromarray(places.reshape(pixels.shape).astype(np.uint8), "P")
    indexed.putpalette(colors.tobytes(), "RGBA")
    file = io.BytesIO()
    indexed.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
