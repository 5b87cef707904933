"""Where results go: a record on disk, written by rank zero, and the scalars of the trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from normzoo.records.quantities import QUANTITIES
from normzoo.records.segments import Segment


def key(quantity: str, stat: str, layer: str = "") -> str:
    """The one place where log keys are made: ``quantity/stat`` or ``quantity/stat/layer``.

    Example:
        >>> key("gradient", "kurtosis", "layer2.0.conv1.weight")
        'gradient/kurtosis/layer2.0.conv1.weight'
    """
    return "/".join(part for part in (quantity, stat, layer) if part)


class Record:
    """Adds samples to a segment of its own in ``dirpath`` on rank zero, and sends scalars to the trainer's loggers.

    Args:
        trainer: asked for its folder; all ranks must construct the record together.
        quantity: name of the record, a key of :data:`normzoo.records.quantities.QUANTITIES`.
        dirpath: folder; by default the trainer's log folder.
    """

    def __init__(self, trainer: Trainer, quantity: str, dirpath: str | None = None) -> None:
        self.quantity = QUANTITIES[quantity]
        self.folder = Path(dirpath or trainer.log_dir or trainer.default_root_dir)
        self.loggers = trainer.loggers if trainer.is_global_zero else []
        self.writes = trainer.is_global_zero
        self._segment: Segment | None = None

    def start(self, step: int) -> None:
        """Open a segment; readers leave out what earlier ones hold from ``step`` on."""
        if self.writes:
            self._segment = Segment(self.folder, self.quantity, step)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add a sample of one or more rows, in one write."""
        if self._segment is not None and rows:
            self._segment.append(rows)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars to every logger of the trainer."""
        for logger in self.loggers:
            logger.log_metrics(scalars, step)


def trainable_parameters(pl_module: LightningModule) -> dict[str, Any]:
    """Trainable parameters by name, without the prefixes that ``torch.compile`` inserts."""
    return {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters() if p.requires_grad}
