"""Figures and tables as elements of a page."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence

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


def figure_elements(name: str, figures: Mapping[str, Figure], level: int = 3) -> list[str]:
    """Figures, each below its title as a heading of a level; ``name`` says of what they are."""
    return [
        f"<figure><h{level}>{html.escape(title)}</h{level}>{inline_svg(f'{name}: {title}', figure)}</figure>"
        for title, figure in figures.items()
    ]


def table_element(rows: Sequence[Mapping[str, str]], marked: str = "", look: str = "numbers") -> str:
    """A table of texts.

    Args:
        rows: at least one; the columns are those of the first. If none of them has a heading, there is no line of them.
        marked: what the first cell of those rows says that are bold.
        look: classes of the style sheet: ``"numbers"``, ``"numbers named"`` if names come first, or ``"texts"``.
    """
    header = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    lines = []
    for row in rows:
        cells = [html.escape(text) for text in row.values()]
        style = ' class="marked"' if cells[0] == marked else ""
        lines.append(f"<tr{style}>{''.join(f'<td>{text}</td>' for text in cells)}</tr>")
    body = "\n".join(lines)
    table = f"<thead><tr>{header}</tr></thead>\n" * any(map(str.strip, rows[0])) + f"<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{look}">{table}</table></div>'


def list_element(texts: Sequence[str]) -> str:
    """A list of sentences; nothing if there are none."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def anchor(title: str, within: str = "") -> str:
    """The name by which an element of a page is linked: ``report.html#NAME``, the same in each report of a folder.

    Args:
        title: that of a figure, a table or a section.
        within: what the title is of, where a page has several of the same.

    Example:
        >>> anchor("Loss along the update", "version_0, capsule 000_step_00000048")
        'version_0-capsule-000_step_00000048-loss-along-the-update'
    """
    return "-".join(re.findall(r"\w+", f"{within} {title}".lower()))


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
