"""The record on disk: one JSON object a line, appended and flushed, written by rank zero."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer


def key(quantity: str, stat: str, layer: str = "") -> str:
    """The one place where log keys are made: ``quantity/stat`` or ``quantity/stat/layer``.

    Example:
        >>> key("gradient", "kurtosis", "layer2.0.conv1.weight")
        'gradient/kurtosis/layer2.0.conv1.weight'
    """
    return "/".join(part for part in (quantity, stat, layer) if part)


class Record:
    """Appends to ``dirpath/name`` on rank zero, and sends scalars to the trainer's loggers.

    Args:
        trainer: asked for its folder; all ranks must construct the record together.
        name: file name.
        dirpath: folder; by default the trainer's log folder.
    """

    def __init__(self, trainer: Trainer, name: str, dirpath: str | None = None) -> None:
        folder = dirpath or trainer.log_dir or trainer.default_root_dir
        self.path = Path(folder) / name
        self.loggers = trainer.loggers if trainer.is_global_zero else []
        self.writes = trainer.is_global_zero
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_broken_line(self.path)

    def rewind(self, step: int) -> None:
        """Drop the lines from ``step`` on, which a run resumed there will write again."""
        if self.writes and step and self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) < step]
            partial = self.path.with_name(self.path.name + ".part")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self.path)

    def append(self, *rows: dict[str, Any]) -> None:
        """Add a line for each row, in one write; numbers that are not finite are written as null."""
        if self.writes:
            text = "".join(json.dumps(_strict(row), separators=(",", ":"), allow_nan=False) + "\n" for row in rows)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars to every logger of the trainer."""
        for logger in self.loggers:
            logger.log_metrics(scalars, step)


def trainable_parameters(pl_module: LightningModule) -> dict[str, Any]:
    """Trainable parameters by name, without the prefixes that ``torch.compile`` inserts."""
    return {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters() if p.requires_grad}


def _end_broken_line(path: Path) -> None:
    """A process killed while writing leaves half a line; end it, so that the next one is whole."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _step(line: str) -> float:
    """The step of a line; infinite if the line is broken."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON does not have, as values and in lists of numbers."""
    return {k: [_finite(v) for v in value] if isinstance(value, list) else _finite(value) for k, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
