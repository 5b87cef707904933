"""What a page says of a run's capsules."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from normzoo.capsules import Capsule
from normzoo.report.figures import draw_records
from normzoo.report.runs import Run
from normzoo.report.svg import inline_svg

_MOST_ROWS = 12  # the last ones
_MOST_LEFT_OUT = 50  # the first ones
_NOTE = (
    "The last steps: loss, the largest over ranks, and which rank had it; lr, the learning rate of the first parameter "
    "group; norm, that of the gradient before clipping, and applied, as the optimizer applied it, where GradientNorm "
    "was among the callbacks."
)


def capsules_section(run: Run) -> str:
    """The capsules of a run, and a sentence for each that cannot be read; empty if it has none."""
    problems = [f'<p class="error">{html.escape(f"{run.name}: {problem}")}</p>' for problem in run.capsule_problems]
    return "\n".join([*(_section(run.name, capsule) for capsule in run.capsules), *problems])


def _section(run: str, capsule: Capsule) -> str:
    name = f"{run}, capsule {capsule.path.name}"
    parts = [f"<section><h2>{html.escape(name)}</h2>", f"<p>{html.escape(sentence_of(capsule))}</p>"]
    if rows := last_steps(capsule.rows):
        parts += [_table(rows), f'<p class="note">{_NOTE}</p>']
    for title, figure in draw_records({"": capsule.records}).items():
        parts.append(f"<figure><h3>{html.escape(title)}</h3>{inline_svg(f'{name}: {title}', figure)}</figure>")
    if missing := list(_not_there(capsule)):
        items = "".join(f"<li>{html.escape(text)}</li>" for text in missing)
        parts.append(f"<details><summary>not in the capsule</summary><ul>{items}</ul></details>")
    return "\n".join([*parts, "</section>"])


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
    empty = {column for column in table[0] if all(row[column] == "–" for row in table)} if table else set()
    return [{column: text for column, text in row.items() if column not in empty} for row in table]


def _first_known(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    return next((row[column] for row in rows if row[column] is not None), None)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    header = "".join(f"<th>{column}</th>" for column in rows[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row.values())}</tr>" for row in rows)
    table = f"<thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="numbers">{table}</table></div>'


def _not_there(capsule: Capsule) -> Iterator[str]:
    """What a capsule lacks, in a sentence each."""
    for rank in capsule.about["missing"]:
        yield f"rank {rank} of {capsule.about['ranks']}, which had not written in time"
    reasons = [(rank, path, why) for rank, places in capsule.about["left_out"].items() for path, why in places.items()]
    for rank, path, why in reasons[:_MOST_LEFT_OUT]:
        yield f"rank {rank}, {path}: {why}"
    if len(reasons) > _MOST_LEFT_OUT:
        yield f"and {len(reasons) - _MOST_LEFT_OUT} others"
