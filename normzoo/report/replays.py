"""What a page says of the replay of a capsule: causes, facts, and the figures and tables that causes point at."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from normzoo.causes import CAUSES, Finding, titles
from normzoo.report.cells import Table
from normzoo.report.charts import Chart
from normzoo.report.elements import anchor, list_element, table_element
from normzoo.report.figures import draw_records
from normzoo.report.gallery import Gallery
from normzoo.report.replay_reading import Replay
from normzoo.report.replay_tables import tables_of

_OTHERS = "Other figures"
_RECORDS = {  # record -> the title below which its figures stand
    "replay_losses": titles.COURSE,
    "replay_course": titles.GRADIENT,
    "replay_samples": titles.SAMPLES,
    "replay_parameters": titles.PARAMETERS,
    "replay_fractions": titles.FRACTIONS,
    "replay_updates": titles.FRACTIONS,
    "replay_gradient_tails": titles.FRACTIONS,
    "replay_channels": titles.CHANNELS,
    "replay_depth": titles.DEPTH,
    "replay_modules": titles.MODULES,
    "replay_trials": titles.TRIALS,
}
_OPEN = (titles.COURSE, titles.BATCH_AND_WEIGHTS, titles.TRIALS)  # the others are folded unless a cause points at them


def replay_section(name: str, replay: Replay, alarm: int | None, gallery: Gallery) -> str:
    """The section of a page.

    Args:
        name: of the capsule, other than those of the page's other capsules.
        replay: its replay.
        alarm: the step of the alarm, which figures over steps mark.
        gallery: of the page.
    """
    tables, figures = tables_of(replay.evidence), _figures(replay, alarm)
    shown = [title for title in (*titles.TITLES, _OTHERS) if title in tables or title in figures]
    causes, facts, notes = replay.findings.causes, replay.findings.facts, replay.findings.notes
    pointed_at = {finding.figure for finding in causes}
    parts = [
        f'<section class="replay" id="{anchor("replay", name)}"><h2>{html.escape(name)}, replayed</h2>',
        f"<ol>{''.join(_cause(name, finding, shown) for finding in causes)}</ol>",
        *([f"<h3>Facts</h3>{list_element(facts)}"] if facts else []),
        *([f"<h3>Limits of this replay</h3>{list_element(notes)}"] if notes else []),
    ]
    for title in shown:
        inside = [*_tables(tables.get(title, []))]
        inside += _drawn(name, title, figures.get(title, {}), gallery, alone=not inside)
        link = html.escape(anchor(title, name))
        if title in pointed_at or title in _OPEN:
            parts += [f'<section id="{link}"><h3>{html.escape(title)}</h3>', *inside, "</section>"]
        else:
            parts += [f'<details id="{link}"><summary>{html.escape(title)}</summary>', *inside, "</details>"]
    return "\n".join([*parts, "</section>"])


def _cause(name: str, finding: Finding, shown: Sequence[str]) -> str:
    """An item of the list of causes; it links the figure or table that shows it, if the page has that."""
    title = html.escape(finding.figure)
    if finding.figure in shown:
        title = f'<a href="#{html.escape(anchor(finding.figure, name))}">{title}</a>'
    what = CAUSES[finding.cause]
    return (
        f"<li><p><strong>{html.escape(what[:1].upper() + what[1:])}</strong>, {finding.confidence} confidence. "
        f"{html.escape(finding.sentence)}</p><p>{html.escape(finding.suggestion)}</p>"
        f'<p class="note">{html.escape(finding.refuted_by)} See: {title}</p></li>'
    )


def _figures(replay: Replay, alarm: int | None) -> dict[str, dict[str, Chart]]:
    """The figures of the records below each title, by their own titles."""
    below: dict[str, dict[str, Chart]] = {}
    drawn: list[str] = []
    for record, frame in replay.records.items():
        figures = draw_records({"": {record: frame}}, titles=drawn, marks={} if alarm is None else {"": alarm})
        drawn += figures
        if figures:
            below.setdefault(_RECORDS.get(record, _OTHERS), {}).update(figures)
    return below


def _tables(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        yield table_element(table.rows, look=table.look)
        if table.note:
            yield f'<p class="note">{html.escape(table.note)}</p>'


def _drawn(name: str, heading: str, figures: dict[str, Chart], gallery: Gallery, alone: bool) -> Iterator[str]:
    """The figures below their titles, which are left out where the heading says the same, or all there is below it."""
    for title, chart in figures.items():
        said = title == heading or (alone and len(figures) == 1 and heading != _OTHERS)
        yield gallery.element(title, chart, 0 if said else 4, name)
