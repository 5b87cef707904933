"""Messages for people: what was given, what is accepted, and the nearest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A recipe cannot be read or run as written; the message names the file, the key and what is accepted."""


class UnknownNameError(ValueError, KeyError):
    """A name is not among the valid ones; the message gives the nearest.

    Both a ``ValueError`` (a bad argument) and a ``KeyError`` (a failed look-up), so either can be caught.
    """

    def __str__(self) -> str:
        return str(self.args[0])


def near_matches(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names most like ``name``, best first (at most three, possibly none)."""
    by_lower = {v.lower(): v for v in valid}
    return [by_lower[m] for m in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)]


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> str:
    """One sentence for an unknown name: what it is, the near matches, else (or for few) all that is valid.

    Example:
        >>> unknown_name("norm", "gruop", ["batch", "group"])
        "'gruop' is not a known norm; did you mean 'group'? Valid: batch, group."
    """
    valid = sorted(valid)
    near = near_matches(str(name), valid)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    listing = f" Valid: {', '.join(valid)}." if valid and (not near or len(valid) <= 20) else ""
    return f"{str(name)!r} is not a known {kind}{hint}{listing}"
