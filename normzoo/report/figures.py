"""The figures of a report, drawn from run folders."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from normzoo.names import SHORT_NAMES
from normzoo.records.schema import Figure as Specification
from normzoo.report.axes import draw_axes
from normzoo.report.charts import Chart
from normzoo.report.drawing import draw_figure, middle_layer
from normzoo.report.metric_figures import draw_metrics
from normzoo.report.run import Run, bare
from normzoo.report.seeds import seed_groups

_NO_ROWS = pd.DataFrame({"step": []})
_EARLIER: dict[str, dict[str, Any]] = {  # what there was before the columns of these records were written
    "gradient_tails": {"of": "gradient"},
    "relative_loss": {"along": "gradient", "optimizer": 0},
}


def draw(runs: Sequence[Run]) -> dict[str, Chart]:
    """Every chart that the runs hold data for: title -> chart. Records say themselves what is to be drawn of them.

    Runs that differ only in their seed are one line, their mean, with a band from the smallest to the largest value.
    """
    logged = draw_logged(runs)
    return logged | draw_recorded(runs, titles=logged)


def draw_logged(runs: Sequence[Run]) -> dict[str, Chart]:
    """The charts of what loggers wrote: where runs end, against each setting, and every metric over steps."""
    groups = seed_groups(runs)
    return draw_axes(groups) | draw_metrics(groups)


def draw_recorded(runs: Sequence[Run], titles: Collection[str] = ()) -> dict[str, Chart]:
    """The charts of the records of runs; ``titles`` are those that other figures have."""
    alarms = {run.name: run.diverged_at for run in runs if run.diverged_at is not None}
    records = {run.name: run.records for run in runs}
    together = {group.name: [run.name for run in group.runs] for group in seed_groups(runs)}
    return draw_records(records, titles=titles, marks=alarms, groups=together)


def draw_records(
    records: Mapping[str, Mapping[str, pd.DataFrame]],
    titles: Collection[str] = (),
    marks: Mapping[str, int] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Chart]:
    """What records ask to be drawn of them: title -> figure.

    Args:
        records: for each run, by its name, the records, by theirs; the empty name is left out of the legend.
        titles: those that other figures have.
        marks: for runs that have diverged, by their names, the step of the alarm, which figures over steps mark.
        groups: names of runs that differ only in their seed, by what stands in the legend.
    """
    figures: dict[str, Chart | None] = {}
    for name in dict.fromkeys(name for of_run in records.values() for name in of_run):
        frames = {run: completed(of_run.get(name, _NO_ROWS), name) for run, of_run in records.items()}
        specifications = next(filter(None, map(_specifications, frames.values())), [])
        frames = {run: bare(frame) for run, frame in frames.items()}
        for place, what in enumerate(specifications):
            if any(_same_values(what, other, frames) for other in specifications[:place]):
                continue
            title = f"{what.title} ({name})" if what.title in {*figures, *titles} else what.title  # of another record
            drawable = {n: f for n, f in frames.items() if what.columns <= {*f} | {*what.lines}}
            figures[title] = draw_figure(what, drawable, marks, groups)
    return {title: figure for title, figure in figures.items() if figure is not None}


def tail_layer(runs: Sequence[Run]) -> str | None:
    """The layer whose gradient stands for a network: the middle one of those that every run with a record has."""
    tails = [run.record("gradient_tails") for run in runs]
    return middle_layer([record for record in tails if not record.empty])


def first_tail(run: Run, layer: str | None) -> Mapping[str, Any] | None:
    """The first sample of a layer's gradient."""
    record = completed(run.record("gradient_tails"), "gradient_tails")
    record = record[record["of"] == "gradient"]
    of_layer = record.index[record["layer"] == layer] if not record.empty else []
    return record.loc[of_layer[0]].to_dict() if len(of_layer) else None


def completed(record: pd.DataFrame, name: str) -> pd.DataFrame:
    """A record with the columns that earlier versions left out."""
    earlier = _EARLIER.get(name, {})
    return record.assign(**{c: record[c].fillna(v) if c in record else v for c, v in earlier.items()})


def _specifications(record: pd.DataFrame) -> Sequence[Specification]:
    """What a record asks to be drawn; of one written when records did not say, what its measurement asks today."""
    figures: Sequence[Specification] = record.attrs.get("figures", [])
    known = SHORT_NAMES["callbacks"].get(record.attrs.get("quantity", ""))
    if record.attrs.get("says_figures") or record.empty or known is None:
        return figures
    module, name = known.rsplit(".", 1)
    return getattr(importlib.import_module(module), name).figures


def _same_values(what: Specification, other: Specification, frames: Mapping[str, pd.DataFrame]) -> bool:
    """Whether two figures differ in nothing but the column they draw, and these columns hold the same values."""
    alike = replace(other, title=what.title, y=what.y, y_label=what.y_label) == what
    return alike and all(f[what.y].equals(f[other.y]) for f in frames.values() if {what.y, other.y} <= {*f})


def samples_by_optimizer(record: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The samples of a record of relative loss, by the index of the optimizer."""
    record = completed(record, "relative_loss")
    return {int(index): record[record["optimizer"] == index] for index in sorted(record["optimizer"].unique())}
