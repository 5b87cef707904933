"""``metrics.csv`` of a run, which a run that goes on continues where its checkpoint was saved."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from normzoo._files import write_whole


class RunMetrics(CSVLogger):
    """Lightning's CSVLogger, which keeps the first rows of a file that is there, in place of deleting the file.

    Args:
        folder: of the run.
        kept: how many rows to keep.
    """

    def __init__(self, folder: Path, kept: int = 0) -> None:
        super().__init__(str(folder), name="metrics", version="")
        self._kept = kept

    @property
    @rank_zero_experiment
    def experiment(self) -> _MetricsFile:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _MetricsFile(self.log_dir, self._kept)
        return self._experiment  # type: ignore[return-value]

    def rows(self) -> int:
        """How many rows were logged so far, all of them in the file after this."""
        self.experiment.save()
        return self.experiment.rows


class _MetricsFile(ExperimentWriter):
    """Writes the rows; a process that is killed leaves whole rows, and at most a part of the last one."""

    def __init__(self, log_dir: str, kept: int) -> None:
        self.rows = kept
        super().__init__(log_dir)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record a row."""
        super().log_metrics(metrics_dict, step)
        self.rows += 1

    def _check_log_dir_exists(self) -> None:
        """Cut the file to the rows that are kept; Lightning would delete it."""
        path = Path(self.metrics_file_path)
        if not path.exists():
            if self.rows:
                raise ValueError(f"{path} is not there, and {self.rows} rows of it are to be kept")
            return
        text = path.read_text(encoding="utf-8")
        header, *lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        if len(lines) < self.rows:
            raise ValueError(f"{path} has {len(lines)} rows, and {self.rows} are to be kept")
        self.metrics_keys = header
        self._write(header, [dict(zip(header, line, strict=True)) for line in lines[: self.rows]])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        self._write(fieldnames, rows)

    def _write(self, fieldnames: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(Path(self.metrics_file_path), text.getvalue())
