"""Charts as files: SVG, PNG and PDF, drawn by vl-convert, without a browser or a network."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from PIL import Image

from normzoo.report.charts import Chart
from normzoo.report.vega import FILE_POINTS, specification

FORMATS = ("svg", "png", "pdf")
# At what is no XML vl-convert ends the process, and of what needs two code units it may cut one off and then fail
_NOT_DRAWN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")

_first_process: int | None = None  # that has drawn: vl-convert's thread does not live on in its forks


def save(chart: Chart, path: str | Path, scale: float = 1.5) -> Path:
    """Write a chart as a file.

    Args:
        chart: what to draw.
        path: ending in ``.svg``, ``.png`` or ``.pdf``.
        scale: pixels of a PNG file to one of the chart, which is 900 wide.

    Returns:
        the path.

    Raises:
        ValueError: for another ending.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise ValueError(f"a chart is written as {', '.join('.' + f for f in FORMATS)}, not as {path.name!r}")
    path.write_bytes(to_bytes(chart, kind, scale))
    return path


def pixels(chart: Chart, scale: float = 1.0) -> np.ndarray:
    """The chart as an image of shape (height, width, 3) and dtype uint8, ``scale`` times 900 pixels wide."""
    with Image.open(io.BytesIO(to_bytes(chart, "png", scale))) as image:
        return np.asarray(image.convert("RGB"))


def to_bytes(chart: Chart, kind: str, scale: float = 1.5, points: int = FILE_POINTS) -> bytes:
    """The chart as a file.

    Args:
        chart: what to draw.
        kind: ``"svg"``, ``"png"`` or ``"pdf"``.
        scale: pixels of a PNG file to one of the chart.
        points: of all lines of a panel together, about, of which those with extreme values are drawn.
    """
    global _first_process
    text = _readable(specification(chart, points=points))
    if _first_process is not None and _first_process != os.getpid():
        return _in_new_process(text, kind, scale)
    _first_process = os.getpid()
    return _drawn(text, kind, scale)


def _readable(data: Any) -> Any:
    """Plain data without the characters that cannot be drawn, as of names that are no text."""
    if isinstance(data, str):
        return _NOT_DRAWN.sub("\ufffd", data)
    if isinstance(data, dict):
        return {name: _readable(value) for name, value in data.items()}
    return [_readable(value) for value in data] if isinstance(data, list | tuple) else data


def _drawn(text: dict[str, Any], kind: str, scale: float) -> bytes:
    if kind == "svg":
        return vl_convert.vega_to_svg(text).encode("utf-8")
    if kind == "png":
        return bytes(vl_convert.vega_to_png(text, scale=scale))
    return bytes(vl_convert.vega_to_pdf(text))


_PROGRAM = """
import json, sys
import vl_convert
given = json.load(sys.stdin)
draw = {"svg": vl_convert.vega_to_svg, "png": vl_convert.vega_to_png, "pdf": vl_convert.vega_to_pdf}[given["kind"]]
drawn = draw(given["text"], **({"scale": given["scale"]} if given["kind"] == "png" else {}))
sys.stdout.buffer.write(drawn.encode() if isinstance(drawn, str) else drawn)
"""


def _in_new_process(text: dict[str, Any], kind: str, scale: float) -> bytes:
    given = json.dumps({"text": text, "kind": kind, "scale": scale}).encode()
    done = subprocess.run([sys.executable, "-c", _PROGRAM], input=given, capture_output=True, check=True)
    return done.stdout
