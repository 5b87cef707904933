"""Charts as plain data: what is drawn where, before any library draws it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SIGNED_DECADES = 30  # that a signed logarithm shows on each side of 0, at most
_ROOM = 0.05  # of an axis, beyond the data at each end
LARGEST, _SMALLEST = 1e300, 1e-300  # magnitudes for which there is room, the smallest on a logarithmic axis
_MOST_TICKS = 7
_LONGEST_NAME = 32


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Args:
        label: what stands beside it.
        scale: ``"linear"``, ``"log"``, or ``"signed log"``, which is linear up to ``linear_to`` on both sides of 0.
        domain: from where to where it goes, upwards.
        linear_to: where a signed logarithm begins.
        whole: whether it has ticks on whole numbers only.
        names: of an axis of text: the name of each place, which are 0, 1, 2, ...; the first is at the top or left.
        places: where it has ticks; empty to choose.
    """

    label: str = ""
    scale: str = "linear"
    domain: tuple[float, float] = (0.0, 1.0)
    linear_to: float = 1.0
    whole: bool = False
    names: tuple[str, ...] = ()
    places: tuple[float, ...] = ()

    @property
    def ticks(self) -> list[float]:
        """Ticks of a logarithmic axis, at least two, at whole powers of ten if there are enough; of a linear one none.

        An axis with ``places`` has its ticks there.
        """
        if self.places:
            return [*self.places]
        low, high = map(float, self.domain)
        if self.scale == "log":
            return _log_ticks(low, high)
        if self.scale == "signed log":
            first = math.ceil(math.log10(self.linear_to) - 1e-9)
            above = _powers(first, math.floor(math.log10(high) + 1e-9)) if high > self.linear_to else []
            below = _powers(first, math.floor(math.log10(-low) + 1e-9)) if -low > self.linear_to else []
            ticks = [tick for tick in (*(-x for x in reversed(below)), 0.0, *above) if low <= tick <= high]
            return ticks if len(ticks) >= 3 else _even_ticks(low, high)
        return []


@dataclass(frozen=True)
class Series:
    """One line of a panel, with its band or bars.

    Args:
        label: what stands in the legend; empty for a line that is not named there.
        run: the run or group of runs it belongs to, with which it is hidden; empty if it belongs to none.
        x: (n,) places, ascending.
        y: (n,) values; NaN leaves a gap.
        low: (n,) lower end of a band, if there is one.
        high: (n,) upper end of a band.
        count: (n,) how many runs a point is of, if it is of several.
        names: (n,) what each point is of, such as a layer; empty if that has no name.
        base: a value down to which the area below the line is filled.
        bars: whether ``low`` and ``high`` are bars at each point rather than a band.
        color: of the line, a hexadecimal RGB colour.
        dash: lengths of dashes and gaps in pixels; empty for a solid line.
        marker: the symbol at each point; empty for none.
        width: of the line, in pixels; 0 for points alone.
        opacity: of the line.
    """

    label: str
    run: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    count: np.ndarray | None = None
    names: tuple[str, ...] = ()
    base: float | None = None
    bars: bool = False
    color: str = "#000000"
    dash: tuple[float, ...] = ()
    marker: str = ""
    width: float = 1.5
    opacity: float = 1.0

    def thinned(self, most: int) -> Series:
        """The line with about ``most`` points: of each stretch the smallest and the largest value, and gaps."""
        if len(self.x) <= max(most, 4):
            return self
        kept = _extremes(self.y, self.low, self.high, most)
        chosen: dict[str, Any] = {
            name: None if (of := getattr(self, name)) is None else of[kept] for name in ("low", "high", "count")
        }
        names = tuple(self.names[place] for place in kept) if self.names else ()
        return replace(self, x=self.x[kept], y=self.y[kept], names=names, **chosen)


@dataclass(frozen=True)
class Rule:
    """A straight line across a panel: horizontal at a value of y, or vertical at a value of x.

    Args:
        at: the value.
        along: the axis that has it, ``"x"`` or ``"y"``.
        label: what stands in the legend; empty for none.
        run: the run it belongs to, with which it is hidden.
        color: a hexadecimal RGB colour.
        dash: lengths of dashes and gaps in pixels.
        width: in pixels.
        outlined: whether it has a dark outline, to be seen on colours.
    """

    at: float
    along: str = "y"
    label: str = ""
    run: str = ""
    color: str = "#808080"
    dash: tuple[float, ...] = (1, 3)
    width: float = 1.0
    outlined: bool = False


@dataclass(frozen=True)
class Note:
    """A symbol or a text at one place of a panel.

    Args:
        x: its place.
        y: its value; with ``from_bottom`` it is unused.
        text: what stands beside the symbol, or alone.
        run: the run it belongs to, with which it is hidden.
        color: a hexadecimal RGB colour.
        cross: whether there is a cross.
        from_bottom: pixels above the lower end of the panel, in place of ``y``; ``None`` if ``y`` says where.
        label: what stands in the legend; empty for none.
    """

    x: float
    y: float = 0.0
    text: str = ""
    run: str = ""
    color: str = "#808080"
    cross: bool = False
    from_bottom: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Colors:
    """The colours of cells: a scale with its bar.

    Args:
        axis: the values from the lowest to the highest colour.
        palette: hexadecimal RGB colours, the lowest value's first.
        label: what the colour means.
        below: whether values below the axis have the lowest colour.
    """

    axis: Axis
    palette: tuple[str, ...]
    label: str
    below: bool = False


@dataclass(frozen=True)
class Cells:
    """A heat map: the value of each cell of a grid.

    Args:
        x: (columns + 1,) edges, ascending, in places of the panel's x axis.
        y: (rows + 1,) edges, ascending, in places of the panel's y axis.
        z: (rows, columns) values; NaN and infinities are hatched.
        there: (rows, columns) whether a cell has a value at all.
        colors: the scale of colours.
        bar: whether the bar stands beside this panel.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    there: np.ndarray
    colors: Colors
    bar: bool = True

    @property
    def odd(self) -> np.ndarray:
        """The cells whose value is not finite."""
        return self.there & ~np.isfinite(self.z)


@dataclass(frozen=True)
class Panel:
    """One pair of axes, and what is drawn in them."""

    x: Axis
    y: Axis
    title: str = ""
    series: tuple[Series, ...] = ()
    rules: tuple[Rule, ...] = ()
    notes: tuple[Note, ...] = ()
    cells: Cells | None = None


@dataclass(frozen=True)
class Chart:
    """One figure: panels in rows.

    Args:
        panels: one or several.
        heading: what stands above all panels.
        shared_y: whether the panels have one y axis.
        height: of a panel, in pixels.
        over_steps: whether x is the optimizer step of training, by which figures of a page are linked.
    """

    panels: tuple[Panel, ...]
    heading: str = ""
    shared_y: bool = False
    height: int = 280
    over_steps: bool = False

    @property
    def columns(self) -> int:
        """How many panels stand side by side where there is room."""
        return len(self.panels) if len(self.panels) <= 3 else (len(self.panels) + 1) // 2

    def legend(self) -> list[Series | Rule | Note]:
        """What the legend has, each label once."""
        found: dict[str, Series | Rule | Note] = {}
        for panel in self.panels:
            marks: tuple[Series | Rule | Note, ...] = (*panel.series, *panel.rules, *panel.notes)
            for mark in marks:
                if mark.label:
                    found.setdefault(mark.label, mark)
        return [*found.values()]


def axis_of(values: np.ndarray, scale: str, label: str, whole: bool = False, room: bool = True) -> Axis:
    """An axis on which all values have a place.

    Args:
        values: of any shape; those that are not finite, and on a logarithmic axis those at or below 0, have none.
        scale: as :class:`Axis`. A signed logarithm of values that are all positive is a logarithm.
        label: of the axis.
        whole: whether it is of whole numbers.
        room: whether there is some room beyond the outermost values.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)].clip(-LARGEST, LARGEST)
    if scale == "signed log" and (values > 0).all() and values.size:
        scale = "log"
    if scale == "log":
        values = values[values > 0].clip(_SMALLEST)
        low, high = (float(values.min()), float(values.max())) if values.size else (0.1, 1.0)
        if high < 1.1 * low:  # whose ticks would all read the same
            return Axis(label, "log", (low / 2, high * 2))
        factor = math.exp((math.log(high) - math.log(low)) * _ROOM * room)
        return Axis(label, "log", (max(low / factor, _SMALLEST / 2), min(high * factor, 2 * LARGEST)))
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if scale == "signed log" and (sizes := np.abs(values[values != 0])).size:
        largest = float(sizes.max())
        smallest = 10.0 ** math.ceil(math.log10(max(sizes.min(), _SMALLEST)))
        linear = min(max(smallest, largest / 10.0**SIGNED_DECADES), largest)
        return Axis(label, "signed log", _with_signed_room(min(low, 0.0), max(high, 0.0), linear, _ROOM * room), linear)
    if low == high:
        part = 1.0 if whole and abs(low) < 1e15 else abs(low) / 2 or 0.5
        return Axis(label, "linear", (low - part, high + part), whole=whole)
    return Axis(label, "linear", _with_room(low, high, _ROOM * room), whole=whole)


def rounded(value: float, digits: int) -> float:
    """A finite value to some digits, itself if that would be infinite."""
    shorter = float(f"{value:.{digits}g}")
    return shorter if math.isfinite(shorter) else value


def limited(text: str) -> str:
    """A name that fits, by its end: names of modules differ there."""
    return text if len(text) <= _LONGEST_NAME else f"…{text[1 - _LONGEST_NAME :]}"


def text_width(text: str, size: float = 11.0) -> float:
    """About how many pixels a text is wide."""
    return 0.56 * size * len(text)


def _with_room(low: float, high: float, part: float) -> tuple[float, float]:
    return low - part * (high - low), high + part * (high - low)


def _with_signed_room(low: float, high: float, linear: float, part: float) -> tuple[float, float]:
    """As much room beyond the ends of a signed logarithm as beyond those of a linear axis."""
    if not part:
        return low, high
    below, above = (math.copysign(math.log1p(abs(end) / linear), end) for end in (low, high))
    below, above = _with_room(below, above, part)
    return tuple(math.copysign(linear * math.expm1(abs(end)), end) for end in (below, above))  # type: ignore[return-value]


def _powers(first: int, last: int) -> list[float]:
    """Powers of ten, of many a few."""
    every = max(1, math.ceil((last - first + 1) / _MOST_TICKS))
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [power for power in _powers(first, last) if low <= power <= high]
    if len(powers) >= 3:
        return powers
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [round(d * 10.0**e, 12 - e) if e < 12 else d * 10.0**e for e in decades for d in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    """A few ticks at equal distances, which are 1, 2 or 5 times a power of ten; both ends if they are too close."""
    base = 10.0 ** math.floor(math.log10((high - low) / 4)) if high - low > 4e-300 else 0.0
    for step in (base, 2 * base, 5 * base, 10 * base) if base else ():
        count = math.floor(high / step) - math.ceil(low / step) + 1
        if count <= _MOST_TICKS:
            ticks = {float(f"{(math.ceil(low / step) + i) * step:.15g}") for i in range(count)}
            inside = sorted(tick for tick in ticks if low <= tick <= high)
            return inside if len(inside) >= 2 else [low, high]
    return [low, high]


def _extremes(y: np.ndarray, low: np.ndarray | None, high: np.ndarray | None, most: int) -> np.ndarray:
    """Places to keep: of each stretch the smallest and the largest value, one of each gap between them; both ends."""
    y = np.asarray(y, dtype=float)
    lower, upper = (y if of is None else np.where(np.isfinite(of), of, y) for of in (low, high))
    gaps = ~np.isfinite(y)
    kept = {0, len(y) - 1}
    for places in np.array_split(np.arange(len(y)), max(most // (4 if gaps.any() else 2), 2)):
        known = places[~gaps[places]]
        if len(known):
            kept |= {int(known[lower[known].argmin()]), int(known[upper[known].argmax()])}
    for before, after in itertools.pairwise(sorted(kept)):
        between = np.flatnonzero(gaps[before + 1 : after])
        if between.size and not gaps[before] and not gaps[after]:
            kept.add(before + 1 + int(between[0]))
    return np.array(sorted(kept))


def all_values(series: Sequence[Series]) -> Iterator[np.ndarray]:
    """Values of y that an axis needs room for."""
    for one in series:
        yield from (np.asarray(part, dtype=float) for part in (one.y, one.low, one.high) if part is not None)
