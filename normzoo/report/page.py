"""The table of runs, and the page that holds it with the figures."""

from __future__ import annotations

import html
import math
import string
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

import pandas as pd

from normzoo._files import write_whole
from normzoo._yaml_text import dump
from normzoo.records.headroom import headroom_quantile, headroom_text
from normzoo.report.capsules import capsules_section
from normzoo.report.elements import inline_svg, table_element
from normzoo.report.figures import draw, first_tail, samples_by_optimizer, tail_layer
from normzoo.report.runs import DamagedRun, Run
from normzoo.report.seeds import seed_groups, seed_rows

# Of the columns that a run may have no data for: a column that no run has data for is left out
NOTES = {
    "accuracy": "Accuracy: on the test set, at the end.",
    "best": "Best: the largest accuracy on the test set.",
    "diverged at": "Diverged at: the step of the first alarm.",
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
    alarms = any(run.diverged_at is not None for run in runs)  # after which a loss may have come back
    rows = []
    for run in runs:
        accuracy = run.curve("test/accuracy")[1]
        tail = first_tail(run, layer)
        kurtosis = tail["kurtosis"] if tail else None
        headroom, low_headroom = _headroom(run)
        seconds = run.status.get("seconds")
        not_diverged = "no" if run.watched else "not watched"
        rows.append(
            {
                "run": run.name,
                "state": run.state,
                "accuracy": f"{accuracy[-1]:.1%}" if accuracy else "–",
                "best": f"{max(accuracy):.1%}" if accuracy else "–",
                "diverged at": not_diverged if run.diverged_at is None else str(run.diverged_at),
                "last loss": "–" if run.last_loss is None or not alarms else f"{run.last_loss:.3g}",
                "ended by": run.ended_by or "–",
                "kurtosis": _number(kurtosis),
                "headroom": headroom,
                "low headroom": low_headroom,
                "seconds": f"{seconds:.0f}" if seconds else "–",
            }
        )
    nothing = {"–", "not watched"}
    empty = [c for c in rows[0] if all(row[c] in nothing for row in rows)]
    return [{c: text for c, text in row.items() if c not in empty} for row in rows]


def write_page(runs: Sequence[Run], target: Path, damaged: Sequence[DamagedRun] = ()) -> Path:
    """Write one HTML page, with figures inside, that opens without a network.

    Args:
        runs: at least one.
        target: the file to write.
        damaged: runs that the page lists with the file that cannot be read.

    Returns:
        ``target``.

    Raises:
        OSError: if the file cannot be written; one that was there before is then still there.
    """
    rows = summary_rows(runs)
    header = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    body = "\n".join(
        f'<tr class="{run.state}">' + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>"
        for run, row in zip(runs, rows, strict=True)
    )
    figures = "\n".join(
        f"<figure><h2>{html.escape(title)}</h2>{inline_svg(title, figure)}</figure>"
        for title, figure in draw(runs).items()
    )
    template = (resources.files("normzoo.report") / "page.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(
        title=html.escape(target.resolve().parent.name),
        header=header,
        body=body,
        damaged="\n".join(f'<p class="error">{html.escape(f"{d.name} is left out: {d.problem}")}</p>' for d in damaged),
        note=html.escape(_note(runs, rows[0])),
        seeds=_seeds(runs),
        capsules="\n".join(map(capsules_section, runs)),
        figures=figures,
        recipes=_recipes([run for run in runs if run.of_recipe]),
    )
    write_whole(target, page, errors="xmlcharrefreplace")
    return target


def _seeds(runs: Sequence[Run]) -> str:
    """A table of the runs that differ only in their seed, together; nothing if there are none."""
    rows = seed_rows(seed_groups(runs))
    if not rows:
        return ""
    note = (
        "Accuracy: on the test set, at the end, of the seeds that finished and did not diverge: mean ± standard "
        "deviation, and range. Diverged: how many seeds, and at which steps."
    )
    return f'<h2>Over seeds</h2>\n{table_element(rows, look="numbers named")}\n<p class="note">{note}</p>'


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
