"""Reports of what a function changed in a model, what it left, and why."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

Group = TypeVar("Group", bound=Hashable)


@dataclass
class LeftSite:
    """One layer that stayed as it was.

    Attributes:
        name: its dotted name.
        layer: its class and, in brackets, its kind if that is known.
        channels: C; None if it was not read.
        why: the reason.
        recognised: whether its class, or trying it, says what it computes.
    """

    name: str
    layer: str
    channels: int | None
    why: str
    recognised: bool = True


@dataclass(eq=False, repr=False)
class ChangeReport:
    """What a function did to the layers of a model.

    The length is the number of layers changed, the truth value says whether there are any, and iteration goes over
    them. ``print`` shows tables, and :meth:`to_dict` gives plain data.

    Attributes:
        changed: one entry for each layer that was changed, with its dotted ``name``.
        left: one :class:`LeftSite` for each layer of the same sort that stayed as it was, with the reason.
    """

    changed: list[Any] = field(default_factory=list)
    left: list[LeftSite] = field(default_factory=list)

    _old_keys: ClassVar[Mapping[str, str]] = {}  # of to_dict, for one version more

    def __len__(self) -> int:
        """Number of layers changed."""
        return len(self.changed)

    def __bool__(self) -> bool:
        """Whether any layer was changed."""
        return bool(self.changed)

    def __iter__(self) -> Iterator[Any]:
        """The layers changed."""
        return iter(self.changed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} changed, {len(self.left)} left)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings and numbers."""
        return _PlainData(asdict(self), self._old_keys)

    def __rich__(self) -> Any:
        """Tables for rich."""
        from rich.console import Group
        from rich.text import Text

        left = ((s.name, (s.layer, s.why if s.recognised else f"not recognised as a norm: {s.why}")) for s in self.left)
        tables = (
            _table(self._headings(), map(self._row, self.changed)),
            _table(("left", "layer", "why"), ((names, *rest) for names, rest in grouped(left))),
        )
        return Group(Text(self._title()), *(t for t in tables if t.row_count), *map(Text, self._remarks()))

    def __str__(self) -> str:
        """The tables as text."""
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140).print(self)
        return out.getvalue()

    def _title(self) -> str:
        """What was done, to how many layers."""
        raise NotImplementedError

    def _headings(self) -> tuple[str, ...]:
        """Of the table of layers changed."""
        raise NotImplementedError

    def _row(self, site: Any) -> tuple[str, ...]:
        """One layer changed, in the table."""
        raise NotImplementedError

    def _remarks(self) -> list[str]:
        """Lines below the tables."""
        return []


def grouped(pairs: Iterable[tuple[str, Group]]) -> list[tuple[str, Group]]:
    """Each value once, behind the first of its names and how many more there are.

    Example:
        >>> grouped([("a", 1), ("b", 2), ("c", 1)])
        [('a and 1 more', 1), ('b', 2)]
    """
    found: dict[Group, dict[str, None]] = {}
    for name, value in pairs:
        found.setdefault(value, {})[name] = None
    return [
        (f"{next(iter(names))}{f' and {len(names) - 1} more' if len(names) > 1 else ''}", value)
        for value, names in found.items()
    ]


def renamed(old: str, new: str) -> None:
    """Warn of a name that goes on for one version more; called in the attribute that has it."""
    warnings.warn(f"{old} is called {new} now, and goes with the next version", DeprecationWarning, stacklevel=3)


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


class _PlainData(dict[str, Any]):
    """A dictionary that answers to older keys with a warning."""

    def __init__(self, data: Mapping[str, Any], old_keys: Mapping[str, str]) -> None:
        super().__init__(data)
        self._old_keys = old_keys

    def __missing__(self, key: str) -> Any:
        if key not in self._old_keys:
            raise KeyError(key)
        renamed(f"the key {key!r}", repr(self._old_keys[key]))
        return self[self._old_keys[key]]


class CountReport(ChangeReport):
    """A report that older code takes for the number of layers changed, for one version more, with a warning."""

    _function: ClassVar[str]

    def _count(self, stacklevel: int = 3) -> int:
        warnings.warn(
            f"{self._function} returns a {type(self).__name__} and no longer a number: use len(report), or "
            "report.changed",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return len(self)

    def __int__(self) -> int:
        return self._count()

    def __index__(self) -> int:
        return self._count()

    def __eq__(self, other: object) -> bool:
        return self._count() == other if isinstance(other, int | float) else self is other

    __hash__ = object.__hash__

    def __format__(self, spec: str) -> str:
        return format(self._count(), spec) if spec else str(self)


def _as_count(compute: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[CountReport, Any], Any]:
    def method(self: CountReport, other: Any) -> Any:
        if isinstance(other, CountReport):
            other = len(other)
        if not isinstance(other, int | float):
            return NotImplemented
        count = self._count()
        return compute(other, count) if swapped else compute(count, other)

    return method


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(CountReport, f"__{_name}__", _as_count(getattr(operator, _name)))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(CountReport, f"__r{_name}__", _as_count(getattr(operator, _name), swapped=True))
