"""Messages for people: what was given, what is accepted, and the nearest valid names."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_LONGEST = 290  # characters of a message, which the command prints after its name
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 60


class RecipeError(ValueError):
    """A recipe cannot be read or run as written; the message names the file, the key and what is accepted.

    The message is one line of at most 290 characters, whatever it is made from.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: object, longest: int = _LONGEST) -> str:
    r"""A message on one line: white space as single spaces, control characters escaped, a long middle left out.

    Example:
        >>> one_line("a file\n\twith \x1b[31m red")
        'a file with \\x1b[31m red'
        >>> one_line("0123456789" * 9, longest=30)
        '012345678901234567 ... 3456789'
    """
    # A few characters more than are kept, as white space goes
    line = " ".join(str(text)[: 100 * longest].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    if len(line) <= longest:
        return line
    end = (longest - 5) * 3 // 10
    return f"{line[: longest - 5 - end]} ... {line[-end:]}"


def shown(value: object) -> str:
    """A value as a message quotes it: its repr, with ``...`` for what is long or deep.

    Example:
        >>> shown("x" * 200), shown([[1] * 9])
        ("'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'", '[[1, 1, 1, 1, 1, 1, ...]]')
    """
    return "null" if value is None else one_line(_VALUES.repr(value), longest=100)


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
    return f"{shown(str(name))} is not a known {kind}{hint}{listing}"
