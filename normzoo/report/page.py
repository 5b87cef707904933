"""The table of runs, and the page that holds it with the figures."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from normzoo._files import write_whole
from normzoo._yaml_text import dump
from normzoo.records.headroom import headroom_quantile, headroom_text
from normzoo.report.axes import group_settings
from normzoo.report.capsules import alarms_section, capsules_section
from normzoo.report.comparison import Comparison
from normzoo.report.elements import table_element
from normzoo.report.figures import draw_logged, draw_recorded, first_tail, samples_by_optimizer, tail_layer
from normzoo.report.gallery import Gallery, packed
from normzoo.report.layer_maps import LayerMap, layer_maps, page_data
from normzoo.report.metric_names import better, is_accuracy, main_metric
from normzoo.report.overview import Overview, diverged_at_text, filled, overview
from normzoo.report.runs import DamagedRun, Run
from normzoo.report.seeds import Group
from normzoo.report.style import line

# Of the columns that a run may have no data for: a column that no run has data for is left out
NOTES = {
    "accuracy": "Accuracy: on the test set, at the end.",
    "best": "Best: the best value over all steps.",
    "diverged at": "Diverged at: the step of the first alarm, or from which on the loss of an unwatched run is not "
    "finite.",
    "last loss": "Last loss: the training loss of the last step of which it is known.",
    "ended by": "Ended by: the error or signal that has cut the run short, and the steps made before it.",
    "kurtosis": "Kurtosis: excess kurtosis of the gradient of $layer at its first sampled step; 0 for a Gaussian.",
    "headroom": "Headroom: the largest multiple of the learning rate up to which a step does not raise the mini-batch "
    "loss, median over sampled steps, of each optimizer if there are several; < and > where the grid of multiples "
    "bounds it.",
    "low headroom": "Low headroom: the 10 % quantile (unless the recipe says otherwise) of the last sampled steps, at "
    "the end of the run.",
}


def summary_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row of text for each run: its state, what it was measured by, and its time; without columns of no data."""
    layer = tail_layer(runs)
    alarms = any(run.has_diverged for run in runs)  # after which a loss may have come back
    metric = main_metric(name for run in runs for name in run.logged) or ""
    best = min if better(metric) == "lower" else max
    rows = []
    for run in runs:
        values = run.curve(metric)[1]
        tail = first_tail(run, layer)
        kurtosis = tail["kurtosis"] if tail else None
        headroom, low_headroom = _headroom(run)
        seconds = run.status.get("seconds")
        rows.append(
            {
                "run": run.name,
                "state": run.state,
                _heading(metric): _metric_text(metric, values[-1]) if values else "–",
                "best": _metric_text(metric, best(values)) if values else "–",
                "diverged at": diverged_at_text([run]),
                "last loss": "–" if run.last_loss is None or not alarms else f"{run.last_loss:.3g}",
                "ended by": run.ended_by or "–",
                "kurtosis": _number(kurtosis),
                "headroom": headroom,
                "low headroom": low_headroom,
                "seconds": f"{seconds:.0f}" if seconds else "–",
            }
        )
    return filled(rows)


def _heading(metric: str) -> str:
    return "accuracy" if metric == "test/accuracy" else metric or "metric"


def _metric_text(metric: str, value: float) -> str:
    """A value of a metric; accuracies that are parts of 1 in percent."""
    return f"{value:.1%}" if is_accuracy(metric) and 0.0 <= value <= 1.0 else f"{value:.4g}"


def write_page(runs: Sequence[Run], target: Path, damaged: Sequence[DamagedRun] = ()) -> Path:
    """Write one HTML page, with figures inside, that opens without a network, and shows them without a script too.

    Args:
        runs: at least one.
        target: the file to write.
        damaged: runs that the page lists with the file that cannot be read.

    Returns:
        ``target``.

    Raises:
        OSError: if the file cannot be written; one that was there before is then still there.
    """
    summaries = summary_rows(runs)
    comparison = Comparison(runs)
    table = overview(comparison, summaries)
    gallery = Gallery()
    logged = draw_logged(runs)
    first = [gallery.element(title, chart) for title, chart in logged.items()]
    figures = [gallery.element(title, chart) for title, chart in draw_recorded(runs, logged).items()]
    maps = layer_maps(runs)
    if maps:
        figures.append(gallery.element("Every layer over steps", maps[0].chart(), explorer=True))
    capsules = "\n".join(capsules_section(run, gallery) for run in runs)
    files = resources.files("normzoo.report")
    vega, script = ((files / path).read_text(encoding="utf-8") for path in ("vendor/vega.min.js", "page.js"))
    page = string.Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(target.resolve().parent.name),
        style=(files / "page.css").read_text(encoding="utf-8"),
        summary=html.escape(_summary(runs)),
        table=_table(table),
        damaged="\n".join(f'<p class="error">{html.escape(f"{d.name} is left out: {d.problem}")}</p>' for d in damaged),
        note=html.escape(" ".join([*map(_sentence, table.notes), _note(runs, table.rows[0])])),
        single=_single(runs, summaries, table),
        alarms=alarms_section(runs),
        logged="\n".join(first),
        capsules=capsules,
        figures="\n".join(figures),
        recipes=_recipes([run for run in runs if run.of_recipe]),
        hashes=" ".join(map(_hash, (vega, script))),
        data=packed(_data(comparison.groups, gallery, maps)),
        vega=vega,
        script=script,
    )
    write_whole(target, page, errors="xmlcharrefreplace")
    return target


def _table(table: Overview) -> str:
    """A row for the runs that differ only in their seed."""
    header = "<th></th>" + "".join(f"<th>{html.escape(column)}</th>" for column in table.rows[0])
    rows = []
    for row, group in zip(table.rows, table.groups, strict=True):
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in row.values())
        state = "diverged" if group.diverged else next((run.trouble for run in group.runs if run.trouble), "finished")
        name = html.escape(group.name)
        rows.append(f'<tr class="{state}" data-group="{name}"><td><span class="swatch"></span></td>{cells}</tr>')
    return (
        '<div class="scroll" id="runs-box"><table id="runs" class="sortable">\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _single(runs: Sequence[Run], summaries: Sequence[Mapping[str, str]], table: Overview) -> str:
    """A table of all runs by themselves, where the first has several in one row."""
    if all(len(group.runs) == 1 for group in table.groups):
        return ""
    order = sorted(range(len(runs)), key=lambda i: runs[i].trouble is None)  # runs in trouble stand at the top
    rows = [summaries[i] for i in order]
    note = html.escape(_note(runs, rows[0]))
    return (
        f"<details><summary>The {len(runs)} runs one by one</summary>"
        f'{table_element(rows, look="named sortable")}<p class="note">{note}</p></details>'
    )


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def _summary(runs: Sequence[Run]) -> str:
    """How many runs there are, in which states."""
    states = Counter(run.state for run in runs if run.state != "–")
    diverged = sum(run.has_diverged for run in runs)
    told = [f"{count} {state}" for state, count in states.items()]
    told += [f"{diverged} diverged at some step"] if diverged > states["diverged"] else []
    return f"{len(runs)} run{'s' * (len(runs) > 1)}{': ' if told else ''}{', '.join(told)}."


def _data(groups: Sequence[Group], gallery: Gallery, maps: Sequence[LayerMap]) -> dict[str, Any]:
    """What the script of the page needs."""
    return {
        "charts": gallery.charts,
        "groups": [group.name for group in groups],
        "looks": {group.name: {**line(i), "width": 2, "marker": ""} for i, group in enumerate(groups)},
        "axes": [{"name": name, "values": values} for name, values in group_settings(groups).items()],
        **page_data(maps),
    }


def _hash(script: str) -> str:
    """What a content security policy names a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"


def _recipes(runs: Sequence[Run]) -> str:
    """The recipe of each run that has one, and the environment of the first."""
    if not runs:
        return ""
    recipes = "\n".join(
        f"<details><summary>{html.escape(run.name)}</summary><pre>"
        f"{html.escape(dump(run.config))}</pre>"
        + (f"<p class='error'>{html.escape(run.status['error'])}</p>" if run.status.get("error") else "")
        + "</details>"
        for run in runs
    )
    environment = dump(runs[0].environment) if runs[0].environment else "not recorded"
    return f"<h2>Recipes</h2>\n{recipes}\n<h2>Environment</h2>\n<pre>{html.escape(environment)}</pre>"


def _note(runs: Sequence[Run], columns: Collection[str]) -> str:
    """What the columns of the table mean."""
    text = " ".join(sentence for column, sentence in NOTES.items() if column in columns)
    return string.Template(text).substitute(layer=tail_layer(runs))


def _headroom(run: Run) -> tuple[str, str]:
    """The median over sampled steps, and the last of the running low quantiles; of each optimizer."""
    record = run.record("relative_loss")
    if record.empty:
        return "–", "–"
    medians, low = [], []
    for samples in samples_by_optimizer(record).values():
        medians.append(headroom_quantile(_headrooms(samples, "headroom"), 0.5))
        low.append(_headrooms(samples, "headroom_low")[-1])
    return _joined(medians), _joined(low)


def _headrooms(samples: pd.DataFrame, column: str) -> list[tuple[float, str | None]]:
    """The values and bounds of a column; NaN and None in records of versions that did not write them."""
    values, bounds = (samples.get(name, pd.Series(None, samples.index, object)) for name in (column, f"{column}_bound"))
    known = (bound if bound in ("below", "above") else None for bound in bounds)
    return list(zip(values.astype(float).tolist(), known, strict=True))


def _joined(headrooms: Sequence[tuple[float, str | None]]) -> str:
    return " / ".join("–" if math.isnan(value) else f"{headroom_text(value, bound)}×" for value, bound in headrooms)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"
