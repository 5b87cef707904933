"""Figures of records, drawn from their specifications: the same in a report, in TensorBoard and in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from normzoo.records.schema import Figure as Specification
from normzoo.report.averages import over_seeds
from normzoo.report.heat_maps import draw_heat_map, spread
from normzoo.report.signed_histogram import signed_shares
from normzoo.report.style import COLORS, MOST_PANELS, STYLE, add_legend, as_label, line, marker

_MOST_LINES = 12  # of a run, in a panel, that have a marker and a place in the legend each
_NAMED_LINES = 6  # of more than that, those that end highest
_SIZE, _TWO_ROWS = (9, 4.2), (9, 7.2)
_NARROW = 1.1  # ratio of largest and smallest value, below which ticks of a logarithmic axis would all read the same
_OVER_SAMPLES, _FIRST = "median over samples, with their range", "at its first sampled step"
_LEVEL = "level"  # marks lines across a panel, which say nothing of where the points are
_RUN = "normzoo.run"  # column of the frame of several runs, with the name of each row's run


def draw_figure(
    what: Specification,
    frames: Mapping[str, pd.DataFrame],
    marks: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Figure | None:
    """Draw a figure of a record of several runs; None if there is nothing to draw.

    Args:
        what: the specification, whose columns the frames have; the columns of ``lines`` may be missing.
        frames: the record of each run, by the run's name; the empty name is left out of the legend.
        marks: for runs that have diverged, by their names, the step of the alarm, which a figure over steps marks.
        groups: names of runs that differ only in their seed, by what stands in the legend: lines and profiles show
            their mean, on a logarithmic axis that of logarithms, with a band from the smallest to the largest, curves
            the median and range over samples of all, histograms the sum of all. A heat map shows runs alone.
    """
    if what.kind == "heat map":
        return draw_heat_map(what, frames, marks)
    frames, alarms = _grouped(frames, marks or {}, groups or {})
    with rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        ends = [*_ends(what, frames)] if what.kind == "line" and what.x == "step" and not what.facet else []
        if what.kind in ("line", "profile") and what.y_range is None:  # which has a place for NaN
            frames = {name: frame.dropna(subset=[what.x, what.y]) for name, frame in frames.items()}
        if what.kind == "curve":  # of which other rows of a record have none
            frames = {name: frame[frame[what.y].map(_has_points).astype(bool)] for name, frame in frames.items()}
        drawn = {name: frame for name, frame in frames.items() if not frame.empty}
        panels = _panels(what, drawn)
        if not panels:
            return None
        values = {c: {v for f in drawn.values() for v in f.get(c, []) if pd.notna(v)} for c in what.lines}
        differ = [column for column, found in values.items() if len(found) > 1]
        alike = [
            f"{c} {v}" for c, found in values.items() if len(found) == 1 for v in found if isinstance(v, str) and v
        ]
        place = {name: index for index, name in enumerate(drawn)}
        for axes, (title, selected) in zip(_axes(what, figure, len(panels)), panels, strict=True):
            for index, (name, frame) in enumerate(selected.items()):
                lines = list(_lines(what, name, frame, differ))
                for label, rows, look in _looks(what, lines, line(place.get(name, index)), alone=len(drawn) == 1):
                    _DRAW[what.kind](axes, what, rows, label, look)
            _finish(axes, what, ", ".join(filter(None, [title, *alike, *ends])))
        if not any(axes.lines for axes in figure.axes):
            return None
        for axes in figure.axes if what.y_scale == "log" else ():
            drawn_lines = [line for line in axes.lines if line.get_gid() != _LEVEL]
            if not any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in drawn_lines):
                axes.text(0.5, 0.5, "no value above 0", transform=axes.transAxes, ha="center", va="center")
        if what.y_scale == "log":
            _widen_y(figure.axes)
        if what.kind == "curve" and what.facet and what.facet != "step":
            figure.suptitle(_OVER_SAMPLES, fontsize="medium")
        figure.axes[0].set_ylabel(what.y_label or what.y)
        if alarms and what.x == "step":
            _mark_alarms(figure, [*drawn], alarms)
        add_legend(figure, *(figure.axes if what.kind == "signed histogram" else figure.axes[:1]))
        return figure


def middle_layer(frames: Sequence[pd.DataFrame], column: str = "layer") -> str | None:
    """The middle one of the convolutions, else of the layers, that every frame has."""
    recorded = [dict.fromkeys(frame[column]) for frame in frames]
    if not recorded:
        return None
    common = [name for name in recorded[0] if all(name in other for other in recorded)]
    weights = [n for n in common if str(n).endswith("weight")] or common
    candidates = [n for n in weights if "conv" in str(n)] or weights
    return candidates[len(candidates) // 2] if candidates else None


def _grouped(
    frames: Mapping[str, pd.DataFrame], marks: Mapping[str, int], groups: Mapping[str, Sequence[str]]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[int]]]:
    """The frame of each line of the legend, one of several runs with the run's name in a column; and its alarms."""
    legend = {run: label for label, runs in groups.items() if len(runs) > 1 for run in runs}
    parts: dict[str, list[pd.DataFrame]] = {}
    alarms: dict[str, list[int]] = {}
    for run, frame in frames.items():
        label = legend.get(run, run)
        parts.setdefault(label, []).append(frame.assign(**{_RUN: run}) if run in legend else frame)
        if run in marks:
            alarms.setdefault(label, []).append(marks[run])
    return {label: _joined(of_label) for label, of_label in parts.items()}, alarms


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    with_rows = [frame for frame in frames if not frame.empty]
    return pd.concat(with_rows, ignore_index=True) if len(with_rows) > 1 else [*with_rows, *frames][0]


def _axes(what: Specification, figure: Figure, panels: int) -> list[Axes]:
    """A row of axes that share their range of y; of signed histograms, which have a range each, up to two rows."""
    if what.kind != "signed histogram":
        return [*np.atleast_1d(figure.subplots(1, panels, sharey=True))]
    rows = 1 + (panels > 3)
    figure.set_size_inches(_TWO_ROWS if rows > 1 else _SIZE)
    return [*figure.subplots(rows, panels // rows, squeeze=False).flatten()]


def _panels(what: Specification, frames: Mapping[str, pd.DataFrame]) -> list[tuple[str, dict[str, pd.DataFrame]]]:
    """The panels: a title, and the rows of each run, by its name, to which a profile adds steps that differ."""
    if not frames:
        return []
    if what.kind == "profile":
        ends = {"first sample": "min", "last sample": "max"}
        if all(frame["step"].nunique() < 2 for frame in frames.values()):
            del ends["last sample"]
        panels = []
        labels = {name: [name] for name in frames}
        for title, end in ends.items():
            steps = {name: frame["step"].agg(end) for name, frame in frames.items()}
            alike = len(set(steps.values())) == 1
            panels.append((f"{title} (step {min(steps.values())})" if alike else title, steps))
            for name, step in () if alike else steps.items():
                labels[name].append(f"{title} at step {step}")
        return [
            (title, {", ".join(filter(None, labels[n])): f[f["step"] == steps[n]] for n, f in frames.items()})
            for title, steps in panels
        ]
    if what.kind == "signed histogram":
        return _panels_of_runs(what, frames, _FIRST)
    if not what.facet:
        titles = {"curve": _OVER_SAMPLES, "histogram": _FIRST}
        return [(titles.get(what.kind, ""), dict(frames))]
    values = list(dict.fromkeys(value for frame in frames.values() for value in frame[what.facet]))
    if what.facet == "step":
        chosen = [sorted(values)[place] for place in spread(len(values))]
        return [
            (f"step {step}", {n: f[f["step"] == step] for n, f in frames.items() if (f["step"] == step).any()})
            for step in chosen
        ]
    if len(values) > MOST_PANELS:
        values = [middle for middle in [middle_layer([*frames.values()], what.facet)] if middle is not None]
    return [
        (
            f"{value} {_FIRST if what.kind == 'histogram' else ''}",
            {name: frame[frame[what.facet] == value] for name, frame in frames.items()},
        )
        for value in values
    ]


def _panels_of_runs(
    what: Specification, frames: Mapping[str, pd.DataFrame], title: str
) -> list[tuple[str, dict[str, pd.DataFrame]]]:
    """A panel for each run, of the middle one of the values of the facet, or of a single run for each of a few."""
    parts = [("", name, frame) for name, frame in frames.items()]
    if what.facet:
        values = list(dict.fromkeys(value for frame in frames.values() for value in frame[what.facet]))
        if len(values) > (MOST_PANELS if len(frames) == 1 else 1):
            values = [middle for middle in [middle_layer([*frames.values()], what.facet)] if middle is not None]
        parts = [(value, name, frame[frame[what.facet] == value]) for value in values for _, name, frame in parts]
    panels = [(f"{value}\n{title}", {name: frame}) for value, name, frame in parts if not frame.empty]
    return [panels[place] for place in spread(len(panels))]


def _lines(
    what: Specification, name: str, frame: pd.DataFrame, differ: Sequence[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The lines of one run: a label, which has the columns of ``what.lines`` that differ, and the rows."""
    by = [column for column in what.lines if column in frame]
    groups = frame.groupby(by, sort=False, dropna=False) if by else [((), frame)]
    for values, rows in groups:
        known = [(c, v) for c, v in zip(by, values, strict=True) if c in differ and pd.notna(v)]
        told = [v if isinstance(v, str) else f"{c} {v:g}" for c, v in known]
        if what.note and not rows.empty and (notes := _firsts(rows)[what.note].dropna()).size:
            told.append(f"{what.note} {notes.mean():.1f}")
        yield as_label(", ".join(filter(None, [name, *told]))), rows


def _firsts(rows: pd.DataFrame) -> pd.DataFrame:
    """The first row, of several runs that of each."""
    return rows.drop_duplicates(_RUN) if _RUN in rows else rows[:1]


def _ends(what: Specification, frames: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """A text for each run whose lines all end in values that are not finite, which are not drawn."""
    for name, frame in frames.items():
        values = frame.loc[np.isfinite(frame[what.y].astype(float)), "step"] if what.y in frame else frame["step"][:0]
        lines = [rows["step"] for _, rows in _lines(what, "", frame, [])]
        drawn = [steps for steps in lines if steps.index.isin(values.index).any()]
        if drawn and all(steps.max() > values.max() for steps in drawn):
            yield as_label(": ".join(filter(None, [name, f"no finite value after step {values.max()}"])))


def _looks(
    what: Specification, lines: Sequence[tuple[str, pd.DataFrame]], of_run: Mapping[str, Any], alone: bool
) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """The lines of a run in the order of drawing, each with label, rows and look; of many lines some have a label.

    Colours tell runs apart, or the lines of a run that is alone.
    """
    if len(lines) <= _MOST_LINES:
        for number, (label, rows) in enumerate(lines):
            yield label, rows, {**(line(number) if alone else of_run), "marker": marker(number)}
        return
    named = _named(what, [rows for _, rows in lines])
    plain = {**of_run, "marker": ""}
    for number, (_, rows) in enumerate(lines):
        if number not in named:
            color = colormaps["viridis"](number / len(lines))
            yield "", rows, {**plain, "color": color, "linewidth": 0.8, "alpha": 0.5}
    for place, number in enumerate(named):
        yield *lines[number], {**plain, "color": COLORS[place]}


def _named(what: Specification, lines: Sequence[pd.DataFrame]) -> list[int]:
    """Which of many lines the legend names: those whose last values are the largest, the largest first."""
    if what.kind != "line":  # which has no last value
        return [0, len(lines) // 2, len(lines) - 1]
    last = [rows[what.y].iloc[-1] for rows in lines]
    return sorted(range(len(lines)), key=lambda i: -last[i] if pd.notna(last[i]) else -math.inf)[:_NAMED_LINES]


def _mark_alarms(figure: Figure, labels: Sequence[str], alarms: Mapping[str, Sequence[int]]) -> None:
    """A vertical line at each alarm, in all panels."""
    for index, name in enumerate(labels):
        steps = sorted({*alarms.get(name, [])})
        alarm = f"alarm at step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
        label = as_label(", ".join(filter(None, [name, alarm])))
        color = line(index)["color"] if len(labels) > 1 else "0.4"
        for axes in figure.axes:
            for place, step in enumerate(steps):
                told = label if place == 0 else ""
                axes.axvline(step, color=color, linewidth=1, linestyle="--", label=told, gid=_LEVEL)


def _draw_line(axes: Axes, what: Specification, rows: pd.DataFrame, label: str, look: Mapping[str, Any]) -> None:
    values = rows[what.y].where(rows[what.y] > 0) if what.y_scale == "log" else rows[what.y]
    x, y = rows[what.x], _within(values.to_numpy(), what)
    if _RUN in rows:
        runs = rows[_RUN].to_numpy()
        to_axis, back = (np.log, np.exp) if what.y_scale == "log" else (np.asarray, np.asarray)
        table = over_seeds([(x[runs == run], to_axis(y[runs == run])) for run in dict.fromkeys(runs)])
        x, y = table["x"], back(table["mean"].to_numpy())
        axes.fill_between(x, back(table["low"]), back(table["high"]), color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(x, y, label=label, **{**look, "marker": look["marker"] if len(x) < 50 else ""})
    if isinstance(what.level, str):
        axes.axhline(rows[what.level].median(), linewidth=1, alpha=0.5, color=look["color"], gid=_LEVEL)


def _draw_curve(axes: Axes, what: Specification, rows: pd.DataFrame, label: str, look: Mapping[str, Any]) -> None:
    # A resumed run may have other points: those of the last sample are drawn
    rows = rows[[np.array_equal(x, rows[what.x].iloc[-1]) for x in rows[what.x]]]
    x = np.asarray(rows[what.x].iloc[0]) * (rows[what.x_unit].iloc[0] if what.x_unit else 1.0)
    curves = _within(np.stack([*rows[what.y]]), what)
    low, middle, high = np.quantile(curves, (0.0, 0.5, 1.0), axis=0)
    axes.plot(x, middle, markersize=4, label=label, **{**look, "marker": look["marker"] if len(x) < 30 else ""})
    axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _draw_histogram(axes: Axes, what: Specification, rows: pd.DataFrame, label: str, look: Mapping[str, Any]) -> None:
    if rows.empty:
        return
    magnitude, density = magnitude_density(*_buckets(what, rows))
    if magnitude.size:  # else every value was zero or not finite
        axes.plot(magnitude, density, label=label, **{**look, "marker": ""})


def _draw_signed(axes: Axes, what: Specification, rows: pd.DataFrame, label: str, look: Mapping[str, Any]) -> None:
    if rows.empty:
        return
    edges, shares = signed_shares(*_buckets(what, rows))
    if edges.size:
        x, y = np.repeat(edges, 2)[1:-1], np.repeat(np.where(shares > 0, shares, np.nan), 2)
        axes.plot(x, y, label=label, **{**look, "marker": "", "linestyle": "-"})
        axes.fill_between(x, y, np.nanmin(y) / 2, color=look["color"], alpha=0.2, linewidth=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _buckets(what: Specification, rows: pd.DataFrame) -> tuple[np.ndarray, int]:
    """The buckets of the first sample, those of several runs together, and how many bits of the mantissa they keep."""
    firsts = _firsts(rows)
    bits = firsts["mantissa_bits"].iloc[0]
    return np.concatenate([*firsts[what.y]]), bits


_DRAW = {
    "line": _draw_line,
    "profile": _draw_line,
    "curve": _draw_curve,
    "histogram": _draw_histogram,
    "signed histogram": _draw_signed,
}


def _has_points(curve: Any) -> bool:
    return isinstance(curve, Sequence | np.ndarray) and len(curve) > 0


def _within(values: np.ndarray, what: Specification) -> np.ndarray:
    if what.y_range is None:
        return values
    clipped: np.ndarray = np.where(np.isnan(values), np.inf, values).clip(*what.y_range)
    return clipped


def _finish(axes: Axes, what: Specification, title: str) -> None:
    if isinstance(what.level, int | float):
        axes.axhline(what.level, color="0.5", linewidth=1, linestyle=":", gid=_LEVEL)
    axes.set_xlabel(what.x_label or what.x)
    axes.set_title(title.strip(), fontsize="medium" if what.kind == "signed histogram" else None)
    if what.y_scale != "linear":
        axes.set_yscale("log" if what.y_scale == "log" else "symlog")
        low, high = axes.get_ylim()
        if not any(low <= y <= high for minor in (False, True) for y in axes.get_yticks(minor=minor)):
            axes.yaxis.set_major_locator(MaxNLocator(5))  # within one decade, where the scale has no tick
            axes.yaxis.set_major_formatter(ScalarFormatter())
    drawn = [np.asarray(line.get_xdata(), dtype=float) for line in axes.lines if line.get_gid() != _LEVEL]
    if what.x_scale != "linear" and drawn:
        _scale_x(axes, np.concatenate(drawn))
    elif drawn and all((x == np.round(x)).all() for x in drawn):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _widen_y(panels: Sequence[Axes]) -> None:
    """Room around values that are nearly the same on a logarithmic axis, which would show their rounding."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for axes in panels for line in axes.lines]
    values = np.concatenate(drawn)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and values.max() < _NARROW * values.min():
        panels[0].set_ylim(values.min() / 2, values.max() * 2)  # which all panels share


def _scale_x(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic x axis; with values at or below 0, one in both directions and linear below a power of ten."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if (values > 0).all():
        axes.set_xscale("log")
        if (
            values == np.round(values)
        ).all() and values.max() < 1000 * values.min():  # as sizes, whose numbers are short
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    elif sizes.size:
        axes.set_xscale("symlog", linthresh=10.0 ** np.ceil(np.log10(sizes.min())))  # no tick between it and 0
        axes.axvline(0.0, color="0.5", linewidth=1, linestyle=":")


def magnitude_density(pairs: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes and the density of their base-10 logarithm, from a record's rows (bucket, count).

    Buckets are a float32's sign, exponent and leading mantissa bits; zero and non-finite values are left out, and
    the buckets of one power of two are taken together. Counts of a bucket that comes several times are added.
    """
    counts = np.zeros(1 << (9 + mantissa_bits))
    pairs = pairs[pairs[:, 0] < counts.size]  # what is beyond has no magnitude
    np.add.at(counts, pairs[:, 0], pairs[:, 1])
    octaves = counts.reshape(2, 256, -1).sum((0, 2))[1:255]  # exponent 0 is zero and subnormal, 255 not finite
    filled = np.flatnonzero(octaves)
    lowest, highest = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    magnitude = 2.0 ** (np.arange(lowest, highest) + 1 - 127 + 0.5)
    density = octaves[lowest:highest] / max(octaves.sum(), 1) / np.log10(2.0)
    return magnitude, np.where(density > 0, density, np.nan)
