"""``normzoo report``: a table in the terminal, one HTML page, and CSV files, for the runs in folders."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from normzoo._errors import RecipeError, UnknownNameError, one_line
from normzoo.capsules import Capsule
from normzoo.cli._terminal import printable, terminal
from normzoo.report import Run, Runs, read_runs, summary_rows, write_page
from normzoo.report.capsules import sentence_of
from normzoo.report.csv_files import write_csv
from normzoo.report.findings import causes_of, findings
from normzoo.report.overview import Overview, fitted, overview

_LONGEST_CAUSE = 1000  # characters of the cause with what would refute it, and what to do
_MOST_ROWS = 40  # of the table
_MOST_TOLD = 5  # runs whose capsules are told


def execute(arguments: argparse.Namespace) -> int:
    """Report on the runs in folders; 2 if none of them can be read."""
    folders = [Path(folder) for folder in arguments.folders]
    page = Path(arguments.out) if arguments.out else None
    table = Path(arguments.csv) if arguments.csv else None
    try:
        written = write_report(*folders, page=page, csv=table, metrics=arguments.metric or (), everything=arguments.all)
    except OSError as error:
        raise RecipeError(f"cannot write {error.filename or 'the report'}: {error.strerror}") from None
    return 0 if written else 2


def try_report(folder: Path, code: int) -> int:
    """Report on runs that have just ended with ``code``; 1 if that was 0 and there can be no report."""
    try:
        written = write_report(folder)
    except (OSError, RecipeError) as error:  # a full disk, or a terminal that is gone
        with contextlib.suppress(OSError):
            print(f"normzoo: no report on {folder}: {error}", file=sys.stderr)
        written = False
    return code if written else code or 1


def write_report(
    *folders: Path,
    page: Path | None = None,
    csv: Path | None = None,
    metrics: Sequence[str] = (),
    everything: bool = False,
) -> bool:
    """Write the page; print the table of runs, what capsules tell, what is damaged, the path.

    Args:
        *folders: at least one, with runs.
        page: file to write; by default ``report.html`` in the folder, of several folders in the current one.
        csv: folder for the runs, their metrics and their records as CSV files; None to write none.
        metrics: columns of the table; by default the metric that stands for a run, and the loss.
        everything: all rows of the table, and what all capsules tell, rather than the first.

    Returns:
        whether there is a run that is not damaged.

    Raises:
        RecipeError: if there are no runs, ``folders`` is one run and damaged, or no run has logged a metric.
        OSError: if a file cannot be written.
    """
    try:
        runs, damaged = read_runs(*folders)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not runs and len(damaged) == 1:
        raise RecipeError(damaged[0].problem)
    frames = Runs(runs, damaged)
    if runs:
        try:
            most = None if everything else _MOST_ROWS
            shown = overview(frames.comparison, summary_rows(runs), metrics, most)
        except UnknownNameError as error:
            raise RecipeError(f"--metric: {error}") from error
        shown = fitted(shown, terminal().width)
        terminal().print(_table(shown))
        for note in shown.notes:
            terminal().print(printable(note), soft_wrap=True)
    _print_told(runs, everything)
    problems = [run.problem for run in damaged] + [p for run in runs for p in run.capsule_problems + run.problems]
    for problem in problems:
        print(f"normzoo: left out: {one_line(problem)}", file=sys.stderr)
    if runs:
        if csv is not None:
            for path in write_csv(frames, csv):
                terminal().print(f"csv: {printable(str(path))}", soft_wrap=True)
        target = page or (folders[0] if len(folders) == 1 else Path()) / "report.html"
        written = write_page(runs, target, damaged)
        terminal().print(f"report: {printable(str(written))}", soft_wrap=True)
    return bool(runs)


def _print_told(runs: Sequence[Run], everything: bool) -> None:
    """What capsules tell, of all runs or of the first that have any."""
    telling = [run for run in runs if run.capsules]
    shown = telling if everything else telling[:_MOST_TOLD]
    for text in (text for run in shown for capsule in run.capsules for text in _told(run, capsule)):
        terminal().print(printable(text), soft_wrap=True)
    if len(shown) < len(telling):
        rest = len(telling) - len(shown)
        terminal().print(f"the capsules of {rest} more runs are told in the page; --all prints them", soft_wrap=True)


def _told(run: Run, capsule: Capsule) -> Iterator[str]:
    """A line for what happened, for each sentence on the last steps, and for each cause that a replay has found."""
    yield f"{capsule.path}: {one_line(sentence_of(capsule))}"
    yield from (f"- {one_line(sentence)}" for sentence in findings(capsule))
    if replay := run.replays.get(capsule.path):
        yield from (f"- {one_line(cause, longest=_LONGEST_CAUSE)}" for cause in causes_of(replay.findings))


def _table(shown: Overview) -> Table:
    # Headers of several words take several lines, to leave room for names in 80 characters
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in shown.rows[0]:
        text = column in ("run", "state", "ended by") or not any(row[column][:1].isdigit() for row in shown.rows)
        table.add_column(
            printable(column).replace(" ", "\n"),
            justify="left" if text else "right",
            no_wrap=column not in ("run", "ended by") and not text,
            overflow="fold",
        )
    for row, troubled in zip(shown.rows, shown.troubled, strict=True):
        table.add_row(*map(printable, row.values()), style="red" if troubled else None)
    return table
