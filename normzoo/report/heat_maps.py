"""Heat maps of records: a value by colour over two columns, such as channels against the length of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normzoo.records.schema import Figure as Specification
from normzoo.report.charts import LARGEST, SIGNED_DECADES, Axis, Cells, Chart, Colors, Panel, Rule, limited
from normzoo.report.palettes import palette
from normzoo.report.style import MOST_PANELS

_COLORS = palette("cividis", 64)  # lighter from end to end, to be read in grey; few, for small files
_TWO_SIGNS = palette("red-blue", 65)  # negative blue, 0 white, positive red
_LINEAR = 0.1  # quantile of magnitudes below which a signed logarithm is linear: where most values are has most colours
_NARROW = 1.1  # ratio of largest and smallest value, below which colours would show rounding
_SMALLEST = 1e-280  # that a logarithm shows
_LONGEST_NAME = 32


@dataclass(frozen=True)
class _Panel:
    """Cells of one run and one value of the facet: ``z`` and ``there`` of shape (len(y), len(x))."""

    run: str
    facet: str
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    there: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The finite values of all cells, in one dimension."""
        return self.z[self.there & np.isfinite(self.z)]


def draw_heat_map(
    what: Specification, frames: Mapping[str, pd.DataFrame], marks: Mapping[str, int] | None = None
) -> Chart | None:
    """Draw a heat map of each run and each value of the facet, four at most; None if there is nothing to draw.

    The panels share one range of colours, as they are to be compared, unless some would then be of one colour: on a
    linear or diverging scale if the largest values of two panels are more than tenfold apart, on a logarithmic one if
    all values of a panel are more than tenfold those of another. Each panel then has a range of its own, and a bar that
    shows it.

    Args:
        what: the specification, of kind ``"heat map"``.
        frames: the record of each run, by the run's name; the empty name is left out of titles.
        marks: for runs that have diverged, by their names, the step of the alarm, which a figure over steps marks.
    """
    every = list(_panels(what, frames))
    panels = [every[place] for place in spread(len(every))]
    if not panels:
        return None
    together = [range(len(panels))] if _alike(what, panels) else [[place] for place in range(len(panels))]
    drawn: list[Panel] = []
    for places in together:
        values = np.concatenate([panels[place].finite for place in places])
        colors = _color_scale(what, values)
        for place in places:
            bar = place == places[-1] and bool(_drawable(what, values).size)
            drawn.append(_drawn(what, panels[place], colors, bar, marks or {}))
    some = f"{len(panels)} of {len(every)} panels, from first to last" if len(every) > len(panels) else ""
    return Chart((*drawn,), some, over_steps=what.x == "step")


def _panels(what: Specification, frames: Mapping[str, pd.DataFrame]) -> Iterator[_Panel]:
    for run, frame in frames.items():
        placed = frame.dropna(subset=[what.x, what.y])
        for column in (what.x, what.y):
            if pd.api.types.is_numeric_dtype(placed[column]):
                placed = placed[np.isfinite(placed[column])]
        groups = placed.groupby(what.facet, sort=False) if what.facet else [("", placed)]
        for value, rows in groups:
            if not rows.empty:
                yield _panel(what, run, str(value), rows)


def _panel(what: Specification, run: str, facet: str, rows: pd.DataFrame) -> _Panel:
    (x, columns), (y, lines) = _places(rows[what.x]), _places(rows[what.y])
    z = np.full((len(y), len(x)), np.nan)
    there = np.zeros(z.shape, dtype=bool)
    z[lines, columns] = rows[what.z].astype(float)  # of several rows of a cell the last
    there[lines, columns] = True
    return _Panel(run, facet, x, y, z, there)


def _places(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The different values, numbers in ascending order and text as it comes, and the place of each row among them."""
    if pd.api.types.is_numeric_dtype(values):
        return np.unique(values.to_numpy(), return_inverse=True)
    places, names = pd.factorize(values)
    return np.asarray(names), places


def spread(count: int) -> list[int]:
    """The places of the panels to draw: all, or of many some from first to last."""
    return (
        list(range(count))
        if count <= MOST_PANELS
        else [i * (count - 1) // (MOST_PANELS - 1) for i in range(MOST_PANELS)]
    )


def _drawable(what: Specification, values: np.ndarray) -> np.ndarray:
    return values[values >= _SMALLEST] if what.z_scale == "log" else values


def _alike(what: Specification, panels: Sequence[_Panel]) -> bool:
    """Whether each panel shows more than one colour in the range of all."""
    known = [values for panel in panels if (values := _drawable(what, np.abs(panel.finite))).size]
    if what.z_scale in ("linear", "diverging"):
        largest = [values.max() for values in known]
        return not largest or max(largest) <= 10 * min(largest)
    return all(one.min() <= 10 * other.max() for one in known for other in known)


def _color_scale(what: Specification, values: np.ndarray) -> Colors:
    """The colours for values that are finite, of which a logarithm has those above 0."""
    label = what.z_label or what.z
    below = what.z_scale == "log" and bool((values <= 0).any())
    return Colors(
        _color_axis(what.z_scale, values), _TWO_SIGNS if what.z_scale == "diverging" else _COLORS, label, below
    )


def _color_axis(scale: str, values: np.ndarray) -> Axis:
    values = values.clip(-LARGEST, LARGEST)
    if scale == "log":
        above = values[values >= _SMALLEST]
        low, high = (above.min(), above.max()) if above.size else (0.1, 1.0)
        return Axis("", "log", (low / 2, high * 2) if high < _NARROW * low else (low, high))
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if scale == "diverging":
        return Axis("", "linear", (-(largest or 1.0), largest or 1.0))
    if scale == "linear":
        room = max(largest, 1e-300) * (_NARROW - 1) if high - low <= 1e-6 * largest else 0.0
        return Axis("", "linear", (low - room, high + room))
    sizes = np.abs(values[values != 0])
    linear = max(np.quantile(sizes, _LINEAR) if sizes.size else 1.0, (largest or 1.0) / 10.0**SIGNED_DECADES)
    largest = largest or 1.0
    domain = (-largest if low < 0 else 0.0, largest if high > 0 or low >= 0 else 0.0)
    return Axis("", "signed log", domain, float(linear))


def _drawn(what: Specification, panel: _Panel, colors: Colors, bar: bool, marks: Mapping[str, int]) -> Panel:
    x, y = _axis(panel.x, what.x_scale, what.x_label or what.x), _axis(panel.y, what.y_scale, what.y_label or what.y)
    at = marks.get(panel.run) if what.x == "step" else None
    alarms = () if at is None else (alarm_rule(at, panel.run, f"alarm at step {at}"),)
    cells = Cells(edges_of(panel.x, x.scale), edges_of(panel.y, y.scale), panel.z, panel.there, colors, bar)
    return Panel(x, y, _title(what, panel), rules=alarms, cells=cells)


def alarm_rule(step: int, run: str, label: str = "") -> Rule:
    """A vertical line at the step of an alarm, outlined so that it is seen on every colour of a heat map."""
    return Rule(step, "x", label, run, "#ffffff", (6, 4), 1.2, outlined=True)


def _axis(places: np.ndarray, scale: str, label: str) -> Axis:
    """An axis from the first edge of cells to the last."""
    scale = _axis_scale(places, scale)
    edges = edges_of(places, scale)
    if not np.issubdtype(places.dtype, np.number):
        return Axis(label, "linear", (edges[0], edges[-1]), names=tuple(map(str, places)))
    whole = scale == "linear" and bool((places == np.round(places)).all())
    sizes = np.abs(places[places != 0])
    linear = 10.0 ** math.ceil(math.log10(sizes.min())) if scale == "signed log" and sizes.size else 1.0
    return Axis(label, scale, (edges[0], edges[-1]), linear, whole)


def edges_of(places: np.ndarray, scale: str) -> np.ndarray:
    """The borders of cells, halfway between their places; of text, which has no places, from 0 by ones."""
    if not np.issubdtype(places.dtype, np.number):
        return np.arange(len(places) + 1) - 0.5
    logarithmic = scale == "log"
    at = np.log(places.astype(float)) if logarithmic else places.astype(float)
    if len(at) == 1:
        edges = np.array([at[0] - 0.5, at[0] + 0.5])
    else:
        middles = (at[1:] + at[:-1]) / 2
        edges = np.concatenate([[2 * at[0] - middles[0]], middles, [2 * at[-1] - middles[-1]]])
    return np.exp(edges) if logarithmic else edges


def _axis_scale(places: np.ndarray, scale: str) -> str:
    if scale == "linear" or not np.issubdtype(places.dtype, np.number):
        return "linear"
    return "log" if scale == "log" and (places > 0).all() else "signed log"


def _title(what: Specification, panel: _Panel) -> str:
    """The run and the value of the facet, in two lines if they are long; and what has no colour."""
    odd = panel.there & ~np.isfinite(panel.z)
    names = [limited(text) for text in (panel.run, panel.facet) if text]
    told = names if sum(map(len, names)) > _LONGEST_NAME else [", ".join(names)]
    if odd.any():
        first = panel.x[odd.any(axis=0)][0]
        where = f"\nfirst at {first:.4g}" if np.issubdtype(panel.x.dtype, np.number) else ""
        told.append(f"{odd.sum()} of {panel.there.sum()} not finite{where}")
    if what.z_scale == "log" and panel.finite.size and not _drawable(what, panel.finite).size:
        told.append("no value above 0")
    return "\n".join(filter(None, told))
