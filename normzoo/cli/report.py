"""``normzoo report``: a table in the terminal and one HTML page for the runs in a folder."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from normzoo._errors import RecipeError, one_line
from normzoo.capsules import Capsule
from normzoo.cli._terminal import printable, terminal
from normzoo.report import Run, read_runs, summary_rows, write_page
from normzoo.report.capsules import sentence_of
from normzoo.report.findings import causes_of, findings
from normzoo.report.seeds import seed_groups, seed_rows

_LONGEST_CAUSE = 1000  # characters of the cause with what would refute it, and what to do


def execute(arguments: argparse.Namespace) -> int:
    """Report on the runs in a folder; 2 if none of them can be read."""
    folder = Path(arguments.folder)
    try:
        return 0 if write_report(folder) else 2
    except OSError as error:
        raise RecipeError(f"cannot write {error.filename or folder / 'report.html'}: {error.strerror}") from None


def try_report(folder: Path, code: int) -> int:
    """Report on runs that have just ended with ``code``; 1 if that was 0 and there can be no report."""
    try:
        written = write_report(folder)
    except (OSError, RecipeError) as error:  # a full disk, or a terminal that is gone
        with contextlib.suppress(OSError):
            print(f"normzoo: no report on {folder}: {error}", file=sys.stderr)
        written = False
    return code if written else code or 1


def write_report(folder: Path) -> bool:
    """Write ``report.html`` into the folder; print the table of runs, what capsules tell, what is damaged, the path.

    Returns:
        whether there is a run that is not damaged.

    Raises:
        RecipeError: if there are no runs, or ``folder`` is itself one and damaged.
        OSError: if the page cannot be written.
    """
    try:
        runs, damaged = read_runs(folder)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not runs and len(damaged) == 1:
        raise RecipeError(damaged[0].problem)
    if runs:
        terminal().print(_table(summary_rows(runs)))
        if by_seed := seed_rows(seed_groups(runs)):
            terminal().print(_table(by_seed))
    for text in (text for run in runs for capsule in run.capsules for text in _told(run, capsule)):
        terminal().print(printable(text), soft_wrap=True)
    for problem in [run.problem for run in damaged] + [problem for run in runs for problem in run.capsule_problems]:
        print(f"normzoo: left out: {one_line(problem)}", file=sys.stderr)
    if runs:
        page = write_page(runs, folder / "report.html", damaged)
        terminal().print(f"report: {printable(str(page))}", soft_wrap=True)
    return bool(runs)


def _told(run: Run, capsule: Capsule) -> Iterator[str]:
    """A line for what happened, for each sentence on the last steps, and for each cause that a replay has found."""
    yield f"{capsule.path}: {one_line(sentence_of(capsule))}"
    yield from (f"- {one_line(sentence)}" for sentence in findings(capsule))
    if replay := run.replays.get(capsule.path):
        yield from (f"- {one_line(cause, longest=_LONGEST_CAUSE)}" for cause in causes_of(replay.findings))


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    # To leave room for names in 80 characters
    finished = all(row.get("state") == "finished" for row in rows)
    empty = {column for column in rows[0] if all(row[column] == "–" for row in rows)}
    columns = [
        c for c in rows[0] if c not in ("best", "last loss") and c not in empty and not (finished and c == "state")
    ]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        text = column in ("run", "runs", "state", "ended by")
        table.add_column(
            column.replace(" ", "\n"), justify="left" if text else "right", no_wrap=not text, overflow="fold"
        )
    for row in rows:
        table.add_row(*(printable(row[c]) for c in columns))
    return table
