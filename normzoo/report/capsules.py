"""What a page says of a run's capsules."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from normzoo.capsules import Capsule
from normzoo.causes import CAUSES
from normzoo.report.elements import anchor, list_element, table_element
from normzoo.report.figures import draw_records
from normzoo.report.findings import COMMON_UPDATE, before_not_finite, by_gradient, findings
from normzoo.report.gallery import Gallery
from normzoo.report.replays import replay_section
from normzoo.report.runs import Run

_MOST_ALARMS = 6  # told at the top of the page
_MOST_ROWS = 12  # the last ones
_MOST_LAYERS = 10  # those with the largest gradients
_MOST_LEFT_OUT = 50  # the first ones
_NOTES = {  # of the columns of the last steps
    "loss": "loss, the largest over ranks",
    "on rank": "on rank, the rank that had it",
    "lr": "lr, the learning rate of the first parameter group",
    "norm": "norm, that of the gradient before clipping",
    "applied": "applied, the norm of the gradient as the optimizer applied it",
    "scale": "scale, that of the GradScaler",
}
_LAYERS_NOTE = (
    "The parameters with the largest gradients: the norm of the gradient, and that of the update relative to the "
    f"weight's. In training that goes well, {COMMON_UPDATE} is common for weight matrices; the figure marks 0.001."
)
_OTHERS = "figures of the other measurements at these steps"


def capsules_section(run: Run, gallery: Gallery) -> str:
    """The capsules of a run, and a sentence for each that cannot be read; empty if it has none."""
    problems = [f'<p class="error">{html.escape(f"{run.name}: {problem}")}</p>' for problem in run.capsule_problems]
    sections = [section for capsule in run.capsules for section in _sections(run, capsule, gallery)]
    return "\n".join([*sections, *problems])


def alarms_section(runs: Sequence[Run]) -> str:
    """What happened in runs that left capsules, in a paragraph each that links the rest; empty if none did."""
    told = [(run, capsule) for run in runs for capsule in run.capsules]
    parts = []
    for run, capsule in told[:_MOST_ALARMS]:
        name = _name(run, capsule)
        replay = run.replays.get(capsule.path)
        cause = ""
        if replay is not None:
            first = replay.findings.causes[0]
            what = CAUSES[first.cause]
            cause = f" Likeliest cause ({first.confidence} confidence): {what}. {first.suggestion}"
        link = html.escape(anchor("replay" if replay else "capsule", name))
        text = f"{sentence_of(capsule).rstrip('.')}.{cause}"
        parts.append(
            f'<p class="alarm"><strong>{html.escape(run.name)}</strong>: {html.escape(text)} '
            f'<a href="#{link}">What led there</a></p>'
        )
    if len(told) > _MOST_ALARMS:
        parts.append(f'<p class="note">{len(told) - _MOST_ALARMS} more capsules are further down.</p>')
    return "\n".join(parts)


def _name(run: Run, capsule: Capsule) -> str:
    return f"{run.name}, capsule {capsule.path.name}"


def _sections(run: Run, capsule: Capsule, gallery: Gallery) -> Iterator[str]:
    """That of the capsule, and of its replay if it has one."""
    name = _name(run, capsule)
    yield _section(name, capsule, gallery)
    if replay := run.replays.get(capsule.path):
        step = capsule.about.get("step")
        yield replay_section(name, replay, step if isinstance(step, int) else None, gallery)


def _section(name: str, capsule: Capsule, gallery: Gallery) -> str:
    step = capsule.about.get("step")
    parts = [
        f'<section id="{html.escape(anchor("capsule", name))}"><h2>{html.escape(name)}</h2>',
        f"<p>{html.escape(sentence_of(capsule))}</p>",
        list_element(findings(capsule)),
    ]
    if rows := last_steps(capsule.rows):
        parts += [table_element(rows, marked=str(step)), f'<p class="note">{_note(rows[0])}</p>']
    norms = capsule.records.get("parameter_norms", pd.DataFrame())
    if rows := largest_gradients(norms):
        parts += [table_element(rows, look="numbers named"), f'<p class="note">{_LAYERS_NOTE}</p>']
    marks = {"": step} if isinstance(step, int) else {}
    figures = draw_records({"": {"parameter_norms": norms}}, marks=marks)
    others = {other: record for other, record in capsule.records.items() if other != "parameter_norms"}
    more = draw_records({"": others}, titles=figures, marks=marks)
    parts += gallery.elements(name, figures)
    if more:
        parts += [f"<details><summary>{_OTHERS}</summary>", *gallery.elements(name, more), "</details>"]
    if missing := list(_not_there(capsule)):
        parts.append(f"<details><summary>not in the capsule</summary>{list_element(missing)}</details>")
    return "\n".join([*parts, "</section>"])


def _note(columns: Collection[str]) -> str:
    told = [text for column, text in _NOTES.items() if column in columns]
    return f"The last steps, that of the alarm in bold{': ' if told else ''}{'; '.join(told)}."


def sentence_of(capsule: Capsule) -> str:
    """What happened, in a sentence; of a run that was cut short, the error."""
    about = capsule.about
    return str(about.get("sentence") or f"{about.get('kind')} at step {about.get('step')}: {about.get('error')}")


def last_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row of text for each of the last micro-batches, over all ranks; without columns that have no data.

    Args:
        rows: of :attr:`normzoo.capsules.Capsule.rows`, in order.
    """
    micro_batches = [list(group) for _, group in itertools.groupby(rows, lambda row: (row["step"], row["micro_batch"]))]
    several = any(row["micro_batch"] for row in rows)
    table = []
    for of_ranks in micro_batches[-_MOST_ROWS:]:
        known = [row for row in of_ranks if row["loss"] is not None]
        worst = max(known, key=lambda row: math.inf if math.isnan(row["loss"]) else row["loss"], default=None)
        table.append(
            {
                "step": str(of_ranks[0]["step"]),
                "micro-batch": str(of_ranks[0]["micro_batch"]) if several else "–",
                "loss": _text(worst["loss"] if worst else None),
                "on rank": str(worst["rank"]) if worst and len(of_ranks) > 1 else "–",
                **{column: _text(_first_known(of_ranks, column)) for column in ("lr", "norm", "applied", "scale")},
            }
        )
    for row in table if all(row["applied"] == row["norm"] for row in table) else ():
        row["applied"] = "–"
    empty = {column for column in table[0] if all(row[column] == "–" for row in table)} if table else set()
    return [{column: text for column, text in row.items() if column not in empty} for row in table]


def largest_gradients(norms: pd.DataFrame) -> list[dict[str, str]]:
    """A row of text for each of the parameters with the largest gradients at the last step at which all are finite.

    Args:
        norms: a record ``parameter_norms``; of none, or of another form, there are no rows.
    """
    if norms.empty or not {"step", "layer", "gradient", "relative_update"} <= set(norms):
        return []
    norms = before_not_finite(norms)
    first, last = norms["step"].min(), norms["step"].max()
    return [
        {
            "parameter": str(layer),
            f"gradient (before clipping) at {first}": _text(row["gradient_before"]),
            f"at {last}": _text(row["gradient"]),
            f"update/weight at {first}": _text(row["relative_update_before"]),
            f"update/weight at {last}": _text(row["relative_update"]),
        }
        for layer, row in by_gradient(norms).head(_MOST_LAYERS).iterrows()
    ]


def _first_known(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    return next((row[column] for row in rows if row[column] is not None), None)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _not_there(capsule: Capsule) -> Iterator[str]:
    """What a capsule lacks, in a sentence each."""
    for rank in capsule.about["missing"]:
        yield f"rank {rank} of {capsule.about['ranks']}, which had not written in time"
    reasons = [(rank, path, why) for rank, places in capsule.about["left_out"].items() for path, why in places.items()]
    for rank, path, why in reasons[:_MOST_LEFT_OUT]:
        yield f"rank {rank}, {path}: {why}"
    if len(reasons) > _MOST_LEFT_OUT:
        yield f"and {len(reasons) - _MOST_LEFT_OUT} others"
