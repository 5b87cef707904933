"""Where results go: a record on disk, written by rank zero, and the trainer's loggers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

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


def new_folder(root: Path) -> Path:
    """``version_N`` in ``root``, made here so that nobody else gets it; numbered as Lightning's loggers do."""
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in root.iterdir() if (match := re.fullmatch(r"version_(\d+)", path.name))]
    number = max(taken, default=-1) + 1
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # made by another process since
            number += 1
            continue
        return folder


def of_rank_zero(folder: Path | None, device: torch.device) -> Path | None:
    """The folder that rank zero gives; all ranks must ask together, each with the device of its tensors."""
    if not (dist.is_available() and dist.is_initialized()):
        return folder
    shared = [folder]
    dist.broadcast_object_list(shared, src=0, device=device)
    return shared[0]


def run_folder(trainer: Trainer) -> Path | None:
    """Where records go by default; all ranks must ask together.

    That is the folder that the first logger made for the run, or without such a logger a new one,
    ``normzoo_logs/version_N``, in the logger's ``save_dir`` or the trainer's ``default_root_dir``.
    """
    made: Path | None = getattr(trainer, "records_folder", None)
    if made is not None:
        return made
    log_dir = trainer.log_dir
    folder = None
    if trainer.is_global_zero:
        own = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
        if isinstance(own, str | os.PathLike) and log_dir is not None and os.fspath(own) == log_dir:
            folder = Path(log_dir)
        else:
            folder = new_folder(Path(log_dir or trainer.default_root_dir, "normzoo_logs"))
            rank_zero_info(f"normzoo writes its records to {folder}")
    folder = of_rank_zero(folder, trainer.strategy.root_device)
    trainer.records_folder = folder  # type: ignore[attr-defined]  # for other callbacks, and the next fit
    return folder


class Record:
    """Adds samples to a segment of its own in ``folder`` on rank zero, and sends scalars to the trainer's loggers.

    Under ``fast_dev_run`` nothing is written, as Lightning logs nothing.

    Args:
        trainer: whose loggers get the scalars.
        quantity: name of the record, a key of :data:`normzoo.records.quantities.QUANTITIES`.
        dirpath: folder; by default that of :func:`run_folder`.
        label: name of a folder inside of that one, if the record is to go there.
        prefix: what log keys begin with.
    """

    def __init__(
        self, trainer: Trainer, quantity: str, dirpath: str | None = None, label: str | None = None, prefix: str = ""
    ) -> None:
        self.quantity = QUANTITIES[quantity]
        self.folder: Path | None = None
        self.loggers = trainer.loggers if trainer.is_global_zero else []
        self.writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._dirpath, self._label, self._prefix = dirpath, label, prefix
        self._segment: Segment | None = None

    def locate(self, trainer: Trainer) -> None:
        """Find the folder; all ranks must do so together."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self._dirpath) if self._dirpath else run_folder(trainer)
        self.folder = folder / self._label if folder is not None and self._label else folder

    def start(self, step: int) -> None:
        """Open a segment in the folder; readers leave out what earlier ones hold from ``step`` on."""
        if self.writes:
            assert self.folder is not None
            self._segment = Segment(self.folder, self.quantity, step)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add a sample of one or more rows, in one write."""
        if self._segment is not None and rows:
            self._segment.append(rows)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars to every logger of the trainer."""
        named = {self._own(name): value for name, value in scalars.items()}
        for logger in self.loggers:
            logger.log_metrics(named, step)

    def log_histograms(self, histograms: Callable[[], Mapping[str, Mapping[str, Any]]], step: int) -> None:
        """Send histograms, as ``add_histogram_raw`` takes them, to those loggers that write for TensorBoard.

        Args:
            histograms: makes them, by key; called only if there is such a logger.
            step: optimizer steps made.
        """
        for writer in self._writers("add_histogram_raw"):
            for name, histogram in histograms().items():
                writer.add_histogram_raw(self._own(name), **histogram, global_step=step)

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
            writer.add_figure(self._own(name), figure, global_step=step)

    def _own(self, name: str) -> str:
        """A log key, apart from those of other callbacks of the same class."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def _writers(self, method: str) -> list[Any]:
        """The loggers' writers that have a method."""
        writers = [getattr(logger, "experiment", None) for logger in self.loggers]
        return [writer for writer in writers if hasattr(writer, method)]


def trainable_parameters(pl_module: LightningModule) -> dict[str, Any]:
    """Trainable parameters by name, without the prefixes that ``torch.compile`` inserts."""
    return {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters() if p.requires_grad}
