"""Values of a JSON file as cells of tables. Values of a form that is not expected are shown as text, or passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normzoo._errors import one_line, shown

_MOST_ROWS = 30
_MOST_VALUES = 20  # of a list, in a cell
_LONGEST = 300  # characters of a cell


@dataclass(frozen=True)
class Table:
    """Rows of text with the same columns, sentences on them, and the look of ``table_element``."""

    rows: list[dict[str, str]]
    note: str = ""
    look: str = "numbers named"


def table_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], note: str = "") -> Table:
    """The first rows.

    Args:
        rows: facts.
        columns: key of a fact -> heading; a column is left out if no row has a value for it.
        note: sentences on the table.
    """
    known_keys = [key for key in columns if any(row.get(key) not in (None, "", []) for row in rows)]
    cells = [{columns[key]: text_of(row.get(key)) for key in known_keys} for row in rows[:_MOST_ROWS]]
    return Table(cells if known_keys else [], note)


def listing_of(facts: Mapping[str, str]) -> Table:
    """A table of names and texts, without those that are empty."""
    return Table([{"": name, " ": text} for name, text in facts.items() if text], look="texts")


def value_at(value: Any, *path: str | int) -> Any:
    """What stands under keys and indices; None where there is nothing."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def mapping_at(value: Any, *path: str | int) -> Mapping[str, Any]:
    """The object there, or an empty one."""
    found = value_at(value, *path)
    return found if isinstance(found, Mapping) else {}


def rows_at(value: Any, *path: str | int) -> list[Mapping[str, Any]]:
    """The objects in the list there."""
    found = value_at(value, *path)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def is_number(value: Any) -> bool:
    """Whether it is a number, and neither True nor False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A number; 0 for what is none."""
    return float(value) if is_number(value) and abs(value) < 10**300 else 0.0


def known(value: Any) -> str:
    """The text of a value; empty if it is not known."""
    return "" if value is None else text_of(value)


def percent(value: Any) -> str:
    """A fraction in per cent; empty if it is not known.

    Example:
        >>> percent(0.35), percent(None)
        ('35 %', '')
    """
    return f"{text_of(100 * value)} %" if isinstance(value, float | int) and abs(value) < math.inf else ""


def text_of(value: Any, digits: int = 4) -> str:
    """A value in a cell: numbers with few digits, yes and no, the values of a list with commas.

    Example:
        >>> text_of(0.123456), text_of(65504.0), text_of([1, None, True]), text_of({"a": 1})
        ('0.1235', '65504', '1, –, yes', "{'a': 1}")
    """
    if isinstance(value, list):
        few = [_text_of_one(part, digits) for part in value[:_MOST_VALUES]]
        return ", ".join([*few, "…"] if len(value) > _MOST_VALUES else few)
    return _text_of_one(value, digits)


def _text_of_one(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) < 10**7 and value == int(value):
        return str(int(value))
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**300):
        return f"{value:.{digits}g}"
    return one_line(value, longest=_LONGEST) if isinstance(value, str) else shown(value)
