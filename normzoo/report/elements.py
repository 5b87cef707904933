"""Figures and tables as elements of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from normzoo.report.charts import Chart
from normzoo.report.export import to_bytes

_POINTS = 3_000  # of all lines of a chart together: the page draws it again with more
_PATH = re.compile(r' d="[^"]*"')
_DIGITS = re.compile(r"(?<=\.\d\d)\d+")  # of a pixel


def inline_svg(name: str, chart: Chart) -> str:
    """The chart as an inline element, which needs no script.

    Args:
        name: what the chart shows, for readers who do not see it.
        chart: what to draw.
    """
    text = to_bytes(chart, "svg", points=_POINTS).decode("utf-8")
    text = _PATH.sub(lambda path: _DIGITS.sub("", path[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)


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
