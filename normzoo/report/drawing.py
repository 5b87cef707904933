"""Charts of records, made from their specifications: the same in a report, in TensorBoard and in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from normzoo.records.schema import Figure as Specification
from normzoo.report.averages import over_seeds
from normzoo.report.charts import Axis, Chart, Note, Panel, Rule, Series, all_values, axis_of
from normzoo.report.heat_maps import draw_heat_map, spread
from normzoo.report.palettes import palette
from normzoo.report.signed_histogram import signed_shares
from normzoo.report.style import COLORS, GREY, MOST_PANELS, line, marker

_MOST_LINES = 12  # of a run, that have a marker and a place in the legend each
_NAMED_LINES = 6  # of more than that, those that end highest
_MOST_MARKED = {"line": 50, "profile": 50, "curve": 30}  # points of a line that have a marker
_NO_VALUE = "no value above 0"
_OVER_SAMPLES, _FIRST = "median over samples, with their range", "at its first sampled step"
LAYERS = ("layer", "site", "module", "parameter")  # columns that name a layer
_RUN = "normzoo.run"  # column of the frame of several runs, with the name of each row's run


@dataclass(frozen=True)
class _Line:
    """One line of a run: what its label has beside the run's name, its rows, and the label."""

    run: str
    told: str
    label: str
    rows: pd.DataFrame


def draw_figure(
    what: Specification,
    frames: Mapping[str, pd.DataFrame],
    marks: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Chart | None:
    """The chart of a figure of a record of several runs; None if there is nothing to draw.

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
    place = {name: index for index, name in enumerate(frames)}
    ends = [*_ends(what, frames)] if what.kind == "line" and what.x == "step" and not what.facet else []
    if what.kind in ("line", "profile") and what.y_range is None:  # which has a place for NaN
        frames = {name: frame.dropna(subset=[what.x, what.y]) for name, frame in frames.items()}
    if what.kind == "curve":  # of which other rows of a record have none
        frames = {name: frame[frame[what.y].map(_has_points).astype(bool)] for name, frame in frames.items()}
    frames = {name: frame for name, frame in frames.items() if not frame.empty}
    panels = _panels(what, frames)
    differ, alike = _told(what, [*frames.values()])
    lines = [
        [one for run, label, rows in parts for one in _lines(what, run, label, rows, differ)] for _, parts in panels
    ]
    looks = _looks(what, lines, place, alone=len(frames) == 1)
    drawn = [
        _panel(what, ", ".join(filter(None, [title, *alike, *ends])).strip(), of_panel, looks)
        for (title, _), of_panel in zip(panels, lines, strict=True)
    ]
    if not any(panel.series for panel in drawn):
        return None
    marked = _alarm_rules({name: place[name] for name in frames}, alarms) if alarms and what.x == "step" else ()
    heading = _OVER_SAMPLES if what.kind == "curve" and what.facet and what.facet != "step" else ""
    return Chart(
        (*_with_axes(what, drawn, marked),),
        heading,
        shared_y=what.kind != "signed histogram",
        over_steps=what.x == "step" and what.kind == "line",
    )


def _panel(
    what: Specification, title: str, lines: Sequence[_Line], looks: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Panel:
    """A panel that has no axes yet, with its lines in the order of their looks, those with a name above the others."""
    order = {key: number for number, key in enumerate(looks)}
    series, rules = [], []
    for one in sorted(lines, key=lambda one: order[one.run, one.told]):
        look = looks[one.run, one.told]
        named = {**look, "label": one.label if look["label"] else "", "run": one.run}
        if (found := _SERIES[what.kind](what, one.rows, named)) is not None:
            series.append(found)
            if isinstance(what.level, str):
                rules.append(Rule(one.rows[what.level].median(), run=one.run, color=found.color, dash=()))
    series.sort(key=lambda one: bool(one.label))
    return Panel(Axis(), Axis(), title, (*series,), (*rules,))


def _told(what: Specification, frames: Sequence[pd.DataFrame]) -> tuple[list[str], list[str]]:
    """The columns of ``what.lines`` that differ, which labels have; and texts of those that do not, for titles."""
    values = {c: {v for f in frames for v in f.get(c, []) if pd.notna(v)} for c in what.lines}
    alike = [f"{c} {v}" for c, found in values.items() if len(found) == 1 for v in found if isinstance(v, str) and v]
    return [column for column, found in values.items() if len(found) > 1], alike


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


def _panels(
    what: Specification, frames: Mapping[str, pd.DataFrame]
) -> list[tuple[str, list[tuple[str, str, pd.DataFrame]]]]:
    """The panels: a title, and the parts: a run, its label, to which a profile adds steps that differ, and its rows."""
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
            (title, [(n, ", ".join(filter(None, labels[n])), f[f["step"] == steps[n]]) for n, f in frames.items()])
            for title, steps in panels
        ]
    if what.kind == "signed histogram":
        return _panels_of_runs(what, frames, _FIRST)
    if not what.facet:
        titles = {"curve": _OVER_SAMPLES, "histogram": _FIRST}
        return [(titles.get(what.kind, ""), [(name, name, frame) for name, frame in frames.items()])]
    values = list(dict.fromkeys(value for frame in frames.values() for value in frame[what.facet]))
    if what.facet == "step":
        chosen = [sorted(values)[place] for place in spread(len(values))]
        return [
            (f"step {step}", [(n, n, f[f["step"] == step]) for n, f in frames.items() if (f["step"] == step).any()])
            for step in chosen
        ]
    if len(values) > MOST_PANELS:
        values = [middle for middle in [middle_layer([*frames.values()], what.facet)] if middle is not None]
    return [
        (
            f"{value} {_FIRST if what.kind == 'histogram' else ''}",
            [(name, name, frame[frame[what.facet] == value]) for name, frame in frames.items()],
        )
        for value in values
    ]


def _panels_of_runs(
    what: Specification, frames: Mapping[str, pd.DataFrame], title: str
) -> list[tuple[str, list[tuple[str, str, pd.DataFrame]]]]:
    """A panel for each run, of the middle one of the values of the facet, or of a single run for each of a few."""
    parts = [("", name, frame) for name, frame in frames.items()]
    if what.facet:
        values = list(dict.fromkeys(value for frame in frames.values() for value in frame[what.facet]))
        if len(values) > (MOST_PANELS if len(frames) == 1 else 1):
            values = [middle for middle in [middle_layer([*frames.values()], what.facet)] if middle is not None]
        parts = [(value, name, frame[frame[what.facet] == value]) for value in values for _, name, frame in parts]
    panels = [(f"{value}\n{title}", [(name, name, frame)]) for value, name, frame in parts if not frame.empty]
    return [panels[place] for place in spread(len(panels))]


def _lines(what: Specification, run: str, label: str, frame: pd.DataFrame, differ: Sequence[str]) -> Iterator[_Line]:
    """The lines of one run: the label has the columns of ``what.lines`` that differ."""
    by = [column for column in what.lines if column in frame]
    groups = frame.groupby(by, sort=False, dropna=False) if by else [((), frame)]
    for values, rows in groups:
        known = [(c, v) for c, v in zip(by, values, strict=True) if c in differ and pd.notna(v)]
        told = [v if isinstance(v, str) else f"{c} {v:g}" for c, v in known]
        noted = [f"{what.note} {notes.mean():.1f}"] if what.note and (notes := _notes(what, rows)).size else []
        yield _Line(run, ", ".join(told), ", ".join(filter(None, [label, *told, *noted])), rows)


def _notes(what: Specification, rows: pd.DataFrame) -> pd.Series:
    return rows[what.note] if rows.empty else _firsts(rows)[what.note].dropna()


def _firsts(rows: pd.DataFrame) -> pd.DataFrame:
    """The first row, of several runs that of each."""
    return rows.drop_duplicates(_RUN) if _RUN in rows else rows[:1]


def _ends(what: Specification, frames: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """A text for each run whose lines all end in values that are not finite, which are not drawn."""
    for name, frame in frames.items():
        values = frame.loc[np.isfinite(frame[what.y].astype(float)), "step"] if what.y in frame else frame["step"][:0]
        lines = [one.rows["step"] for one in _lines(what, name, "", frame, [])]
        drawn = [steps for steps in lines if steps.index.isin(values.index).any()]
        if drawn and all(steps.max() > values.max() for steps in drawn):
            yield ": ".join(filter(None, [name, f"no finite value after step {values.max()}"]))


def _looks(
    what: Specification, panels: Sequence[Sequence[_Line]], place: Mapping[str, int], alone: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    """The look of each line, the same in all panels, by run and what the label tells of it, in the order of drawing.

    Colours tell runs apart, or the lines of a run that is alone. Of many lines of a run some have a label.
    """
    of_runs: dict[str, dict[str, list[pd.DataFrame]]] = {}
    for one in (one for lines in panels for one in lines):
        of_runs.setdefault(one.run, {}).setdefault(one.told, []).append(one.rows)
    looks: dict[tuple[str, str], dict[str, Any]] = {}
    for run, lines in of_runs.items():
        of_run = line(place[run])
        if len(lines) <= _MOST_LINES:
            for number, told in enumerate(lines):
                own = line(number) if alone else of_run
                looks[run, told] = {**own, "marker": marker(number), "label": True}
            continue
        named = _named(what, [*lines.values()])
        for number, (told, color) in enumerate(zip(lines, palette("viridis", len(lines)), strict=True)):
            if number not in named:
                looks[run, told] = {"color": color, "width": 0.8, "opacity": 0.5, "label": False}
        for number, of_line in enumerate(named):
            looks[run, [*lines][of_line]] = {**of_run, "color": COLORS[number], "label": True}
    return looks


def _named(what: Specification, lines: Sequence[Sequence[pd.DataFrame]]) -> list[int]:
    """Which of many lines the legend names: those whose last values are the largest, the largest first."""
    if what.kind != "line":  # which has no last value
        return [0, len(lines) // 2, len(lines) - 1]
    ends = [[rows[what.y].iloc[-1] for rows in of_panels if not rows.empty] for of_panels in lines]
    last = [max([end for end in of_line if pd.notna(end)], default=-math.inf) for of_line in ends]
    return sorted(range(len(lines)), key=lambda i: -last[i])[:_NAMED_LINES]


def _alarm_rules(drawn: Mapping[str, int], alarms: Mapping[str, Sequence[int]]) -> tuple[Rule, ...]:
    """A vertical line at each alarm of the runs that are drawn, in the colour of their place among all."""
    rules = []
    for name, index in drawn.items():
        steps = sorted({*alarms.get(name, [])})
        alarm = f"alarm at step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
        label = ", ".join(filter(None, [name, alarm]))
        color = line(index)["color"] if len(drawn) > 1 else GREY
        for number, step in enumerate(steps):
            rules.append(Rule(step, "x", label if number == 0 else "", name, color, dash=(6, 3)))
    return (*rules,)


def _line_series(what: Specification, rows: pd.DataFrame, look: Mapping[str, Any]) -> Series:
    values = rows[what.y].where(rows[what.y] > 0) if what.y_scale == "log" else rows[what.y]
    x, y = rows[what.x].to_numpy(), _within(values.to_numpy(), what)
    band: dict[str, Any] = {}
    if _RUN in rows:
        runs = rows[_RUN].to_numpy()
        to_axis, back = (np.log, np.exp) if what.y_scale == "log" else (np.asarray, np.asarray)
        table = over_seeds([(x[runs == run], to_axis(y[runs == run])) for run in dict.fromkeys(runs)])
        x, y = table["x"].to_numpy(), back(table["mean"].to_numpy())
        band = {name: back(table[name].to_numpy()) for name in ("low", "high")}
    return _marked(Series(x=x, y=y, names=_names(what, rows, x), **band, **look), _MOST_MARKED[what.kind])


def _names(what: Specification, rows: pd.DataFrame, x: np.ndarray) -> tuple[str, ...]:
    """The layer at each place of a profile, if the record names it."""
    column = next((column for column in (*LAYERS, "of") if column in rows and rows[column].nunique() > 1), None)
    if what.kind != "profile" or column is None:
        return ()
    of_place = dict(zip(rows[what.x], rows[column].fillna("").astype(str), strict=True))
    return tuple(of_place.get(place, "") for place in x)


def _curve_series(what: Specification, rows: pd.DataFrame, look: Mapping[str, Any]) -> Series | None:
    if rows.empty:
        return None
    # A resumed run may have other points: those of the last sample are drawn
    rows = rows[[np.array_equal(x, rows[what.x].iloc[-1]) for x in rows[what.x]]]
    x = np.asarray(rows[what.x].iloc[0]) * (rows[what.x_unit].iloc[0] if what.x_unit else 1.0)
    curves = _within(np.stack([*rows[what.y]]), what)
    low, middle, high = np.quantile(curves, (0.0, 0.5, 1.0), axis=0)
    return _marked(Series(x=x, y=middle, low=low, high=high, **look), _MOST_MARKED[what.kind])


def _marked(series: Series, most: int) -> Series:
    """The line with its markers, unless it has many points."""
    return series if len(series.x) < most else replace(series, marker="")


def _histogram_series(what: Specification, rows: pd.DataFrame, look: Mapping[str, Any]) -> Series | None:
    if rows.empty:
        return None
    magnitude, density = magnitude_density(*_buckets(what, rows))
    if not magnitude.size:  # every value was zero or not finite
        return None
    return Series(x=magnitude, y=density, **{**look, "marker": ""})


def _signed_series(what: Specification, rows: pd.DataFrame, look: Mapping[str, Any]) -> Series | None:
    if rows.empty:
        return None
    edges, shares = signed_shares(*_buckets(what, rows))
    if not edges.size:
        return None
    x, y = np.repeat(edges, 2)[1:-1], np.repeat(np.where(shares > 0, shares, np.nan), 2)
    return Series(x=x, y=y, base=float(np.nanmin(y)) / 2, **{**look, "marker": "", "dash": ()})


def _buckets(what: Specification, rows: pd.DataFrame) -> tuple[np.ndarray, int]:
    """The buckets of the first sample, those of several runs together, and how many bits of the mantissa they keep."""
    firsts = _firsts(rows)
    bits = firsts["mantissa_bits"].iloc[0]
    return np.concatenate([*firsts[what.y]]), bits


_SERIES = {
    "line": _line_series,
    "profile": _line_series,
    "curve": _curve_series,
    "histogram": _histogram_series,
    "signed histogram": _signed_series,
}


def _has_points(curve: Any) -> bool:
    return isinstance(curve, Sequence | np.ndarray) and len(curve) > 0


def _within(values: np.ndarray, what: Specification) -> np.ndarray:
    if what.y_range is None:
        return values
    clipped: np.ndarray = np.where(np.isnan(values), np.inf, values).clip(*what.y_range)
    return clipped


def _with_axes(what: Specification, panels: Sequence[Panel], alarms: Sequence[Rule]) -> Iterator[Panel]:
    """The panels with axes on which all has a place: one of y for all, or of signed histograms one for each."""
    shared = what.kind != "signed histogram"
    every = [one for panel in panels for one in panel.series]
    levels = [rule.at for panel in panels for rule in panel.rules]
    if isinstance(what.level, int | float):
        levels.append(float(what.level))
    for panel in panels:
        x = np.concatenate([np.zeros(0), *(one.x for one in (every if what.x == "step" else panel.series))])
        y = np.concatenate([np.zeros(0), *all_values(every if shared else panel.series), levels])
        whole = what.x_scale == "linear" and bool(x.size) and bool((x == np.round(x)).all())
        if what.x == "step":
            x = np.concatenate([x, [rule.at for rule in alarms]])
        x_axis = axis_of(
            x,
            "signed log" if what.x_scale == "log" else what.x_scale,
            what.x_label or what.x,
            whole,
            room=what.kind != "signed histogram",
        )
        y_axis = axis_of(y, what.y_scale, what.y_label or what.y)
        rules = [*panel.rules, *alarms]
        if isinstance(what.level, int | float):
            rules.append(Rule(float(what.level)))
        if x_axis.scale == "signed log":
            rules.append(Rule(0.0, "x"))
        notes = ()
        if what.y_scale == "log" and not any((one.y > 0).any() for one in panel.series):
            notes = (Note(float(x.min()) if x.size else 0.0, text=_NO_VALUE, from_bottom=140),)  # type: ignore[assignment]
        yield replace(panel, x=x_axis, y=y_axis, rules=(*rules,), notes=notes)


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
