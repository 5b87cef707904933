"""``normzoo report``: a table in the terminal and one HTML page for the runs in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from normzoo._errors import RecipeError
from normzoo.report import load_runs, summary_rows, write_page


def execute(arguments: argparse.Namespace) -> int:
    """Report on the runs in a folder."""
    write_report(Path(arguments.folder))
    return 0


def write_report(folder: Path) -> None:
    """Write ``report.html`` into the folder, and print the table of runs and the page's path."""
    try:
        runs = load_runs(folder)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    page = write_page(runs, folder / "report.html")
    rows = summary_rows(runs)
    finished = all(row["state"] == "finished" for row in rows)
    columns = [c for c in rows[0] if c != "best" and not (finished and c == "state")]  # to fit 80 characters
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        text = column in ("run", "state")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(row[c] for c in columns))
    console = Console()
    console.print(table)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
