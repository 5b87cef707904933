"""The terminal that commands print on."""

from __future__ import annotations

import sys

from rich.console import Console

_PLAIN = str.maketrans({"–": "-", "×": "x", "…": "..."})


def terminal(file_width: int | None = None, stderr: bool = False) -> Console:
    """A console that prints names as they are: ``[red]`` is not a colour in them, nor ``:smile:`` a picture.

    Args:
        file_width: characters in a line if the output goes to a file or pipe; None for rich's default of 80.
        stderr: print on standard error, as standard output is for data.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if file_width is not None and not console.is_terminal:
        console.width = file_width
    return console


def printable(text: str) -> str:
    """The text, or where the terminal cannot show it, the nearest that it can."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text
