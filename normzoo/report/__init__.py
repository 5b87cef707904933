"""From run folders to tables, figures and one HTML page. Reads files only; neither torch nor a Trainer."""

from normzoo.report.export import save
from normzoo.report.figures import draw
from normzoo.report.frames import Runs, load_runs
from normzoo.report.page import summary_rows, write_page
from normzoo.report.runs import DamagedRun, Run, RunError, read_runs

__all__ = [
    "DamagedRun",
    "Run",
    "RunError",
    "Runs",
    "draw",
    "load_runs",
    "read_runs",
    "save",
    "summary_rows",
    "write_page",
]
