"""Every layer over the steps of a run, for each quantity on record: heat maps among which a reader picks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from normzoo.report.charts import LARGEST, Axis, Cells, Chart, Colors, Panel
from normzoo.report.drawing import LAYERS, magnitude_density, middle_layer
from normzoo.report.gallery import values_of
from normzoo.report.heat_maps import alarm_rule, edges_of
from normzoo.report.palettes import palette
from normzoo.report.run import Run, bare

PALETTE = palette("cividis", 64)
_MOST_CELLS = 400_000  # of all maps of a page together
_MOST_COLUMNS, _LEAST_COLUMNS = 96, 8  # of a map
_WIDE = 20.0  # ratio of the largest and the smallest value from which colours are logarithmic
_NARROW = 1e-6
_FIRST = ("gradient_norm", "gradient_tails", "parameter_norms", "channel_moments")  # shown until the reader picks


@dataclass(frozen=True)
class LayerMap:
    """One heat map.

    Args:
        run: of which run.
        quantity: record and column, and what else tells rows apart.
        label: the column.
        steps: (columns,) the sampled steps, ascending.
        names: (rows,) layers in the order of the record, or magnitudes.
        axis: what the rows are.
        z: (rows, columns) values.
        there: (rows, columns) whether there is one.
        alarm: the step of the alarm of a run that has diverged.
    """

    run: str
    quantity: str
    label: str
    steps: np.ndarray
    names: tuple[str, ...]
    axis: str
    z: np.ndarray
    there: np.ndarray
    alarm: int | None

    def thinned(self, most: int) -> LayerMap:
        """With at most ``most`` columns: of each stretch of steps the value farthest from the layer's median.

        A value that is not finite is the farthest there is, so that no thinning hides it.
        """
        if len(self.steps) <= most:
            return self
        finite = self.there & np.isfinite(self.z)
        middle = np.zeros((len(self.z), 1))
        some = finite.any(axis=1)
        middle[some] = np.nanmedian(np.where(finite, self.z, np.nan)[some], axis=1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.where(self.there, np.where(np.isfinite(self.z), np.abs(self.z - middle), np.inf), -1.0)
        far = np.where(np.isnan(far), 0.0, far)
        stretches = np.array_split(np.arange(len(self.steps)), most)
        chosen = [part[far[:, part].argmax(axis=1)] for part in stretches]
        z = np.stack([self.z[np.arange(len(self.z)), places] for places in chosen], axis=1)
        there = np.stack([self.there[np.arange(len(self.z)), places] for places in chosen], axis=1)
        steps = self.steps[[part[0] for part in stretches]]
        return LayerMap(self.run, self.quantity, self.label, steps, self.names, self.axis, z, there, self.alarm)

    @property
    def colors(self) -> Colors:
        """The colours of its values: logarithmic if they are all above 0 and spread wide."""
        values = self.z[self.there & np.isfinite(self.z)]
        return Colors(_color_axis(values), PALETTE, self.label)

    def chart(self) -> Chart:
        """The map as a chart."""
        x = Axis("step", domain=(float(self.edges[0]), float(self.edges[-1])), whole=True)
        y = Axis(self.axis, domain=(-0.5, len(self.names) - 0.5), names=self.names)
        cells = Cells(self.edges, np.arange(len(self.names) + 1) - 0.5, self.z, self.there, self.colors)
        alarm = () if self.alarm is None else (alarm_rule(self.alarm, self.run),)
        title = self.run if self.alarm is None else f"{self.run}, alarm at step {self.alarm}"
        return Chart((Panel(x, y, title, rules=alarm, cells=cells),), over_steps=True, height=360)

    @property
    def edges(self) -> np.ndarray:
        """(columns + 1,) borders between the steps."""
        return edges_of(self.steps, "linear")


def layer_maps(runs: Sequence[Run]) -> list[LayerMap]:
    """The maps of all runs, thinned so that a page holds them; the first is the one to show first."""
    found = [one for run in runs for one in _maps(run)]
    rows = sum(len(one.names) for one in found)
    most = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, _MOST_CELLS // max(rows, 1)))
    maps = [one.thinned(most) for one in found]
    order = {name: place for place, name in enumerate(_FIRST)}
    maps.sort(key=lambda one: (one.alarm is None, order.get(one.quantity.split(":")[0], len(order))))
    return maps


def page_data(maps: Sequence[LayerMap]) -> dict[str, Any]:
    """What the script of a page needs of the maps."""
    names = [*dict.fromkeys(one.names for one in maps)]
    return {
        "palette": PALETTE,
        "rowNames": names,
        "maps": [
            {
                "run": one.run,
                "quantity": one.quantity,
                "label": one.label,
                "axis": one.axis,
                "names": names.index(one.names),
                "x": one.edges.tolist(),
                "places": one.steps.tolist(),
                "z": values_of(one.z, one.there),
                "ends": [*one.colors.axis.domain],
                "scale": one.colors.axis.scale,
                "linear": one.colors.axis.linear_to,
                "ticks": one.colors.axis.ticks,
                "alarm": one.alarm,
            }
            for one in maps
        ],
    }


def _maps(run: Run) -> Iterator[LayerMap]:
    for name, record in run.records.items():
        layer = next((column for column in LAYERS if column in record), None)
        if layer is None or record.empty:
            continue
        record = bare(record[record[layer].notna()])
        numbers = [c for c in record if pd.api.types.is_float_dtype(record[c])]
        others = [c for c in record if c != layer and isinstance(record[c].iloc[0], str)] if len(record) else []
        keys = [c for c in others if record[c].nunique(dropna=False) > 1]
        for values, rows in record.groupby(keys, dropna=False, sort=False) if keys else [((), record)]:
            told = ", ".join(str(value) for value in values if pd.notna(value))
            yield from _of_columns(run, name, f" ({told})" if told else "", rows, layer, numbers)
        if "histogram" in record and "mantissa_bits" in record and (first := middle_layer([record], layer)) is not None:
            yield from _histogram(run, name, record[record[layer] == first], str(first))


def _of_columns(
    run: Run, name: str, told: str, rows: pd.DataFrame, layer: str, columns: Sequence[str]
) -> Iterator[LayerMap]:
    """The map of each column that has values, of rows that nothing but layer and step tells apart."""
    places, names = pd.factorize(rows[layer])
    steps, at = np.unique(rows["step"].to_numpy(), return_inverse=True)
    if len(steps) < 2:
        return
    there = np.zeros((len(names), len(steps)), dtype=bool)
    there[places, at] = True
    for column in columns:
        values = rows[column].to_numpy(dtype=float)
        if np.isnan(values).all():
            continue
        z = np.full(there.shape, np.nan)
        z[places, at] = values  # of several rows of a cell the last
        names_of_rows = (*map(str, names),)
        quantity = f"{name}: {column}{told}"
        yield LayerMap(run.name, quantity, column, steps, names_of_rows, layer, z, there, run.diverged_at)


def _histogram(run: Run, name: str, rows: pd.DataFrame, layer: str) -> Iterator[LayerMap]:
    """The density of magnitudes of one layer over steps, in octaves."""
    if "of" in rows:
        rows = rows[rows["of"] == rows["of"].iloc[0]]
    rows = rows[rows["histogram"].map(lambda pairs: pairs is not None and len(pairs) > 0).astype(bool)]
    if rows["step"].nunique() < 2:
        return
    parts = {
        step: magnitude_density(np.asarray([*pairs]), bits)
        for step, pairs, bits in zip(rows["step"], rows["histogram"], rows["mantissa_bits"], strict=True)
    }
    octaves = sorted(
        {round(float(np.log2(m)) - 0.5) for magnitude, _ in parts.values() for m in magnitude}, reverse=True
    )
    if not octaves:
        return
    z = np.full((len(octaves), len(parts)), np.nan)
    for column, (magnitude, density) in enumerate(parts[step] for step in sorted(parts)):
        lines = [octaves.index(round(float(np.log2(m)) - 0.5)) for m in magnitude]
        z[lines, column] = density
    names = tuple(f"{2.0**octave:.2g}" for octave in octaves)
    quantity = f"{name}: histogram of magnitudes, {layer}"
    steps = np.array(sorted(parts))
    yield LayerMap(run.name, quantity, "density", steps, names, "magnitude", z, np.isfinite(z), run.diverged_at)


def _color_axis(values: np.ndarray) -> Axis:
    if not values.size:
        return Axis("", "linear", (0.0, 1.0))
    values = values.clip(-LARGEST, LARGEST)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > _WIDE * low:
        return Axis("", "log", (low, high))
    sizes = np.abs(values[values != 0])
    if sizes.size and sizes.max() > _WIDE**2 * np.quantile(sizes, 0.1):
        linear = max(float(np.quantile(sizes, 0.1)), float(sizes.max()) * 1e-30)
        return Axis("", "signed log", (low, high), linear)
    if high - low <= _NARROW * max(abs(low), abs(high)):
        room = max(abs(low), abs(high)) / 2 or 0.5
        low, high = low - room, high + room
    return Axis("", "linear", (low, high))
