"""The axes of runs: settings that differ by themselves, and those that only move with another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normzoo.report.settings import identity, is_number, short_key

Settings = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Axis:
    """A setting against which runs can be compared.

    Attributes:
        key: its dotted key.
        label: the last part of the key, if that is no other key's, else the key.
        numeric: whether all values are numbers (None, for runs that lack it, aside).
        values: numbers in ascending order, names in that of the runs; without None.
        along: keys of settings that move with it, and with nothing else.
    """

    key: str
    label: str
    numeric: bool
    values: list[Any]
    along: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: str, settings: Settings, along: Sequence[str] = ()) -> Axis:
        """The axis of a key.

        Args:
            key: of the setting.
            settings: of each group of runs.
            along: keys that move with it.
        """
        keys = [*dict.fromkeys(k for setting in settings for k in setting)]
        values = {identity(v): v for setting in settings if (v := setting.get(key)) is not None}
        numeric = bool(values) and all(map(is_number, values.values()))
        ordered = sorted(values.values()) if numeric else [*values.values()]
        return cls(key, short_key(key, keys), numeric, ordered, tuple(along))


def axes_of(settings: Settings, sweeps: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """The axes of groups of runs, those of sweeps first.

    A setting moves along with another one, and is no axis, if that one's value says which value it has, as for an
    option of the norm that is swept, or epochs that are set for each rate. A setting that has another value in every
    group says that of any other one: those move along only that are options of it, that say its value too, or that the
    sweep moves together with it. Text that is another one in every group names the group, and is no axis, if settings
    all of whose values come more than once tell the groups apart. If no setting differs by itself, the first that has
    another value in every group is the axis, and all others move along.

    Args:
        settings: in which the groups differ, of each.
        sweeps: the section ``sweep`` of each group's sweep, or an empty one.
    """
    together = [[key.strip() for key in str(axis).split(",")] for sweep in sweeps for axis in sweep]
    rank = {key: place for place, key in enumerate(dict.fromkeys(key for keys in together for key in keys))}
    keys = sorted(dict.fromkeys(k for setting in settings for k in setting), key=lambda k: _rank(k, rank))
    columns = {key: [identity(setting.get(key)) for setting in settings] for key in keys}
    named = {key for key in keys if _names_groups(key, columns, settings)}
    keys = [key for key in keys if key not in named]
    leaders: dict[str, list[str]] = {}
    for place, key in enumerate(keys):
        earlier, later = keys[:place], keys[place + 1 :]
        leader = next((other for other in earlier if _determines(other, key, columns, together)), None)
        one_way = (o for o in later if _determines(o, key, columns, together) and not says(columns, key, o))
        leader = leader or next(one_way, None)
        leaders.setdefault(key, [])
        if leader is not None:
            leaders.setdefault(leader, []).append(key)
    followers = {key for along in leaders.values() for key in along}
    axes = []
    for key in (key for key in keys if key not in followers):
        others = [other for other in keys if other not in followers and other != key]
        if _differs_alone(key, others, columns):
            axes.append(Axis.of(key, settings, _all_along(key, leaders)))
    telling = [key for key in keys if len({*columns[key]}) == len(settings) > 1]
    if not axes and telling:
        axes.append(Axis.of(telling[0], settings, [key for key in keys if key != telling[0]]))
    return axes


def _rank(key: str, ranks: Mapping[str, int]) -> tuple[int, int]:
    """Keys of sweeps come first, in their order, and each before its options."""
    return min(
        ((place, key != swept) for swept, place in ranks.items() if _within(key, swept)), default=(len(ranks), 0)
    )


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith(f"{outer}.")


def says(columns: Mapping[str, Sequence[Any]], key: str, other: str) -> bool:
    """Whether each value of a key stands beside one value of the other only."""
    pairs = {*zip(columns[key], columns[other], strict=True)}
    return len(pairs) == len({*columns[key]})


def _determines(key: str, other: str, columns: Mapping[str, Sequence[Any]], together: Sequence[Sequence[str]]) -> bool:
    if not says(columns, key, other):
        return False
    if says(columns, other, key) or _within(other, key):
        return True
    swept = any(any(_within(key, k) for k in keys) and any(_within(other, k) for k in keys) for keys in together)
    return swept or len({*columns[key]}) < len(columns[key])


def _names_groups(key: str, columns: Mapping[str, Sequence[Any]], settings: Settings) -> bool:
    size = len(settings)
    if len({*columns[key]}) < size or is_number(next((s[key] for s in settings if key in s), None)):
        return False
    repeated = [column for column in columns.values() if all(number > 1 for number in Counter(column).values())]
    return bool(repeated) and len({*zip(*repeated, strict=True)}) == size


def _differs_alone(key: str, others: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether two groups are the same in the other keys and not in this one."""
    values: dict[tuple[Any, ...], set[Any]] = {}
    for place, value in enumerate(columns[key]):
        values.setdefault(tuple(columns[other][place] for other in others), set()).add(value)
    return any(len(different) > 1 for different in values.values())


def _all_along(key: str, leaders: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys that move with a key, and those that move with these."""
    found: list[str] = []
    for follower in leaders[key]:
        found += [follower, *_all_along(follower, leaders)]
    return found
