"""Where results go: a record on disk, written by rank zero, and the trainer's loggers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from normzoo.records.quantities import QUANTITIES
from normzoo.records.segments import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def key(quantity: str, stat: str, layer: str = "") -> str:
    """The one place where log keys are made: ``quantity/stat`` or ``quantity/stat/layer``.

    Example:
        >>> key("gradient", "kurtosis", "layer2.0.conv1.weight")
        'gradient/kurtosis/layer2.0.conv1.weight'
    """
    return "/".join(part for part in (quantity, stat, layer) if part)


class Record:
    """Adds samples to a segment of its own in ``dirpath`` on rank zero, and sends scalars to the trainer's loggers.

    Under ``fast_dev_run`` nothing is written, as Lightning logs nothing.

    Args:
        trainer: asked for its folder; all ranks must construct the record together.
        quantity: name of the record, a key of :data:`normzoo.records.quantities.QUANTITIES`.
        dirpath: folder; by default the trainer's log folder.
    """

    def __init__(self, trainer: Trainer, quantity: str, dirpath: str | None = None) -> None:
        self.quantity = QUANTITIES[quantity]
        self.folder = Path(dirpath or trainer.log_dir or trainer.default_root_dir)
        self.loggers = trainer.loggers if trainer.is_global_zero else []
        self.writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
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

    def log_histograms(self, histograms: Callable[[], Mapping[str, Mapping[str, Any]]], step: int) -> None:
        """Send histograms, as ``add_histogram_raw`` takes them, to those loggers that write for TensorBoard.

        Args:
            histograms: makes them, by key; called only if there is such a logger.
            step: optimizer steps made.
        """
        for writer in self._writers("add_histogram_raw"):
            for name, histogram in histograms().items():
                writer.add_histogram_raw(name, **histogram, global_step=step)

    def log_figure(self, name: str, draw: Callable[[Figure], None], step: int) -> None:
        """Send a figure to those loggers that write for TensorBoard.

        Args:
            name: its key.
            draw: puts it on an empty figure; called only if there is such a logger.
            step: optimizer steps made.
        """
        for writer in self._writers("add_figure"):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 4), layout="constrained")
            draw(figure)
            writer.add_figure(name, figure, global_step=step)

    def _writers(self, method: str) -> list[Any]:
        """The loggers' writers that have a method."""
        writers = [getattr(logger, "experiment", None) for logger in self.loggers]
        return [writer for writer in writers if hasattr(writer, method)]


def trainable_parameters(pl_module: LightningModule) -> dict[str, Any]:
    """Trainable parameters by name, without the prefixes that ``torch.compile`` inserts."""
    return {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters() if p.requires_grad}
