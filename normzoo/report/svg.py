"""Figures as elements of a page."""

from __future__ import annotations

import html
import io

from matplotlib import rc_context
from matplotlib.figure import Figure


def inline_svg(name: str, figure: Figure) -> str:
    """The figure as an inline element.

    Args:
        name: what the figure shows, for readers who do not see it; other than those of the page's other figures, as the
            names of the elements inside are made from it.
        figure: what to draw.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    element = text[text.index("<svg") :]
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)
