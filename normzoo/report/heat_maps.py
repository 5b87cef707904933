"""Heat maps of records: a value by colour over two columns, such as channels against the length of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from normzoo.records.schema import Figure as Specification
from normzoo.report.style import COLORS, MOST_PANELS, STYLE, as_label

_ONE_ROW, _TWO_ROWS = (9, 4.2), (9, 7.2)
# Lighter from end to end, to be read in grey, and from blue to yellow, for colour-blind readers; few, for small files
_COLORS = colormaps["cividis"].resampled(64)
_TWO_SIGNS = colormaps["RdBu_r"].resampled(65)  # negative blue, 0 white, positive red, for colour-blind readers too
_NOT_FINITE: Any = {"facecolor": COLORS[1], "edgecolor": "black", "hatch": "/////", "linewidth": 0}  # hatched: in grey
_ALARM: Any = {
    "color": "white",
    "linewidth": 1.2,
    "linestyle": "--",
    "path_effects": [withStroke(linewidth=2.6, foreground="black")],
}
_LINEAR = 0.1  # quantile of magnitudes below which a signed logarithm is linear: where most values are has most colours
_SIGNED_DECADES = 30  # that a signed logarithm shows on each side of 0, at most
_NARROW = 1.1  # ratio of largest and smallest value, below which colours would show rounding
_SMALLEST = 1e-280  # that a logarithm shows: matplotlib takes ranges below for empty
_MOST_NAMES = 24  # of an axis of text
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
) -> Figure | None:
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
    with rc_context(STYLE):
        rows = 1 + (len(panels) > 3)
        figure = Figure(figsize=(_ONE_ROW, _TWO_ROWS)[rows - 1], layout="constrained")
        drawn: list[Axes] = [*figure.subplots(rows, len(panels) // rows, squeeze=False).flatten()]
        together = [range(len(panels))] if _alike(what, panels) else [[place] for place in range(len(panels))]
        for places in together:
            values = np.concatenate([panels[place].finite for place in places])
            norm = _norm(what.z_scale, values)
            for place in places:
                _draw_cells(drawn[place], what, panels[place], norm)
                _finish(drawn[place], what, panels[place])
            if _drawable(what, values).size:
                _add_bar(figure, what, [drawn[place] for place in places], norm, values)
        if len(every) > len(panels):
            figure.suptitle(f"{len(panels)} of {len(every)} panels, from first to last", fontsize="medium")
        if marks and what.x == "step":
            for axes, panel in zip(drawn, panels, strict=True):
                if panel.run in marks:
                    axes.axvline(marks[panel.run], label=f"alarm at step {marks[panel.run]}", **_ALARM)
        _add_legend(figure, drawn, any(len(panel.finite) < panel.there.sum() for panel in panels))
        return figure


def _panels(what: Specification, frames: Mapping[str, pd.DataFrame]) -> Iterator[_Panel]:
    for run, frame in frames.items():
        placed = frame.dropna(subset=[what.x, what.y])
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


def _norm(scale: str, values: np.ndarray) -> Normalize:
    """The range of colours of values that are finite, of which a logarithm has those above 0."""
    if scale == "log":
        above = values[values >= _SMALLEST]
        low, high = (above.min(), above.max()) if above.size else (0.1, 1.0)
        return LogNorm(low / 2, high * 2) if high < _NARROW * low else LogNorm(low, high)
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if scale == "diverging":
        largest = max(abs(low), abs(high)) or 1.0
        return Normalize(-largest, largest)
    if scale == "linear":
        room = (
            max(abs(low), abs(high), 1e-300) * (_NARROW - 1) if high - low <= 1e-6 * max(abs(low), abs(high)) else 0.0
        )
        return Normalize(low - room, high + room)
    sizes = np.abs(values[values != 0])
    largest = sizes.max() if sizes.size else 1.0
    linear = max(np.quantile(sizes, _LINEAR) if sizes.size else 1.0, largest / 10.0**_SIGNED_DECADES)
    return SymLogNorm(linear, vmin=-largest if low < 0 else 0.0, vmax=largest if high > 0 or low >= 0 else 0.0)


def _colors(what: Specification) -> Colormap:
    return _TWO_SIGNS if what.z_scale == "diverging" else _COLORS


def _draw_cells(axes: Axes, what: Specification, panel: _Panel, norm: Normalize) -> None:
    """The cells, as an image in a file of vectors; those that are not finite hatched, those without a row empty."""
    x, y = _edges(panel.x, what.x_scale), _edges(panel.y, what.y_scale)
    finite = panel.there & np.isfinite(panel.z)
    z = np.ma.masked_where(~finite, np.clip(panel.z, norm.vmin, norm.vmax))
    axes.pcolormesh(x, y, z, cmap=_colors(what), norm=norm, rasterized=True)
    if odd := [*_runs(panel.there & ~finite)]:
        corners = [[(x[a], y[i]), (x[b], y[i]), (x[b], y[i + 1]), (x[a], y[i + 1]), (x[a], y[i])] for i, a, b in odd]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(odd)
        path = Path(np.concatenate(corners), codes)
        axes.add_patch(
            PathPatch(path, rasterized=True, color=_NOT_FINITE["facecolor"], linewidth=1)
        )  # one of 512 rows too
        axes.add_patch(PathPatch(path, rasterized=True, **_NOT_FINITE))
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.grid(visible=False)


def _runs(cells: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """A row, and the first cell and the end of each of its runs of true cells."""
    changes = np.diff(np.pad(cells.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    for row, (starts, ends) in enumerate(zip(changes > 0, changes < 0, strict=True)):
        for start, end in zip(np.flatnonzero(starts), np.flatnonzero(ends), strict=True):
            yield row, int(start), int(end)


def _edges(places: np.ndarray, scale: str) -> np.ndarray:
    """The borders of cells, halfway between their places; of text, which has no places, from 0 by ones."""
    if not np.issubdtype(places.dtype, np.number):
        return np.arange(len(places) + 1) - 0.5
    logarithmic = _axis_scale(places, scale) == "log"
    at = np.log(places.astype(float)) if logarithmic else places.astype(float)
    if len(at) == 1:
        edges = np.array([at[0] - 0.5, at[0] + 0.5])
    else:
        middles = (at[1:] + at[:-1]) / 2
        edges = np.concatenate([[2 * at[0] - middles[0]], middles, [2 * at[-1] - middles[-1]]])
    return np.exp(edges) if logarithmic else edges


def _finish(axes: Axes, what: Specification, panel: _Panel) -> None:
    """Title, labels, scales and ticks."""
    odd = panel.there & ~np.isfinite(panel.z)
    names = [_shortened(text) for text in (panel.run, panel.facet) if text]
    told = names if sum(map(len, names)) > _LONGEST_NAME else [", ".join(names)]
    if odd.any():
        first = panel.x[odd.any(axis=0)][0]
        where = f"\nfirst at {first:.4g}" if np.issubdtype(panel.x.dtype, np.number) else ""
        told.append(f"{odd.sum()} of {panel.there.sum()} not finite{where}")
    if what.z_scale == "log" and panel.finite.size and not _drawable(what, panel.finite).size:
        told.append("no value above 0")
    axes.set_title("\n".join(filter(None, told)), fontsize="medium")
    axes.set(xlabel=what.x_label or what.x, ylabel=what.y_label or what.y)
    axes.set(xscale=_axis_scale(panel.x, what.x_scale), yscale=_axis_scale(panel.y, what.y_scale))
    for axis, places, scale in ((axes.xaxis, panel.x, what.x_scale), (axes.yaxis, panel.y, what.y_scale)):
        if not np.issubdtype(places.dtype, np.number):
            shown = np.linspace(0, len(places) - 1, min(len(places), _MOST_NAMES)).round().astype(int)
            axis.set_ticks(shown, [_shortened(str(places[place])) for place in shown])
            axis.set_inverted(axis is axes.yaxis)
        elif scale == "linear" and (places == np.round(places)).all():
            axis.set_major_locator(MaxNLocator(integer=True))


def _axis_scale(places: np.ndarray, scale: str) -> str:
    if scale == "linear" or not np.issubdtype(places.dtype, np.number):
        return "linear"
    return "log" if scale == "log" and (places > 0).all() else "symlog"


def _shortened(text: str) -> str:
    """A name that fits, by its end: names of modules differ there."""
    return as_label(text if len(text) <= _LONGEST_NAME else f"…{text[1 - _LONGEST_NAME :]}")


def _add_bar(figure: Figure, what: Specification, panels: Sequence[Axes], norm: Normalize, values: np.ndarray) -> None:
    below = "min" if what.z_scale == "log" and (values <= 0).any() else "neither"
    bar = figure.colorbar(
        ScalarMappable(norm, _colors(what)), ax=list(panels), label=what.z_label or what.z, extend=below
    )
    if bar.solids is not None:
        bar.solids.set_rasterized(True)


def _add_legend(figure: Figure, panels: Sequence[Axes], odd: bool) -> None:
    handles: dict[str, Any] = {"not finite": Patch(**_NOT_FINITE)} if odd else {}
    for axes in panels:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
