"""Where results go: a record on disk, written by rank zero, and the loggers of the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from normzoo._errors import one_line, shown
from normzoo._files import existing_folder
from normzoo.callbacks._run.facts import Run
from normzoo.records.schema import Schema
from normzoo.records.segments import Segment

if TYPE_CHECKING:
    import numpy as np

_Path = TypeVar("_Path", str | None, str | Path | None)
_LABEL = re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 255  # bytes of a folder's name on common file systems


def _asks_for_few(logger: Any) -> bool:
    """Whether a logger takes no values of single layers or parameters."""
    return getattr(logger, "few", False) is True


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


def of_rank_zero(folder: Path | OSError | None, device: torch.device) -> Path | None:
    """The folder that rank zero gives; all ranks must ask together, each with the device of its tensors.

    Raises:
        OSError: on all ranks, if it is what rank zero gives.
    """
    shared = [folder]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(shared, src=0, device=device)
    if isinstance(shared[0], OSError):
        raise shared[0]
    return shared[0]


class Record:
    """Adds samples to a segment of its own on rank zero, and sends them to the loggers of the run.

    Args:
        run: what is measured.
        schema: of the record.
        dirpath: folder; by default that of the run.
        label: name of a folder inside of that one, if the record is to go there.
        prefix: what log keys begin with.
    """

    def __init__(self, run: Run, schema: Schema, dirpath: str | None, label: str | None, prefix: str) -> None:
        self.schema, self.writes, self.loggers = schema, run.writes, run.loggers
        self.folder: Path | None = None
        self._dirpath, self._label, self._prefix = dirpath, label, prefix
        self._segment: Segment | None = None

    def locate(self, run: Run) -> None:
        """Find the folder; all ranks must do so together."""
        folder = run.folder(self._dirpath)
        self.folder = folder / self._label if folder is not None and self._label else folder

    def start(self, step: int) -> None:
        """Open a segment in the folder; readers leave out what earlier ones hold from ``step`` on."""
        if self.writes and self.folder is not None:
            self._segment = Segment(self.folder, self.schema, step)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a sample of one or more rows, in one write."""
        if self._segment is not None and rows:
            self._segment.append(rows)

    def stop(self) -> None:
        """Write and send nothing from here on."""
        self._segment, self.loggers = None, []

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send scalars to every logger; one that asks for ``few`` gets none that are of a single layer or parameter."""
        for logger in self.loggers:
            named = scalars
            if _asks_for_few(logger):
                named = {name: value for name, value in named.items() if name.count("/") == 1}
            if self._prefix:
                named = {self._key(name): value for name, value in named.items()}
            if named:
                logger.log_metrics(named, step)

    def log_histograms(self, histograms: Callable[[], Mapping[str, Mapping[str, Any]]], step: int) -> None:
        """Send histograms, as ``add_histogram_raw`` takes them, to those loggers that write for TensorBoard.

        They are of single layers, so that a logger that asks for ``few`` gets none.

        Args:
            histograms: makes them, by key; called only if there is such a logger.
            step: optimizer steps made.
        """
        for writer in self._writers("add_histogram_raw", also_few=False):
            for name, histogram in histograms().items():
                writer.add_histogram_raw(self._key(name), **histogram, global_step=step)

    def log_figure(self, name: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        """Send a figure to those loggers that write for TensorBoard.

        Args:
            name: its key.
            draw: makes its pixels, (height, width, 3) of uint8, or None if there is nothing to draw; called only if
                there is such a logger.
            step: optimizer steps made.
        """
        for writer in self._writers("add_image"):
            if (pixels := draw()) is not None:
                writer.add_image(self._key(name), pixels, global_step=step, dataformats="HWC")

    def _key(self, name: str) -> str:
        """A log key, apart from those of other measurements of the same class."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def _writers(self, method: str, also_few: bool = True) -> list[Any]:
        """The loggers' writers that have a method."""
        loggers = [logger for logger in self.loggers if also_few or not _asks_for_few(logger)]
        writers = [getattr(logger, "experiment", None) for logger in loggers]
        return [writer for writer in writers if hasattr(writer, method)]


class LateRecord(Record):
    """Keeps samples in memory until :meth:`write`: a full disk then fails no rank while others wait for it."""

    def start(self, step: int) -> None:
        """Training starts; nothing is written yet."""
        self._start = step
        self._samples: list[Sequence[Mapping[str, Any]]] = []

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a sample of one or more rows."""
        if self.writes:
            self._samples.append(rows)

    def write(self) -> None:
        """Write all samples.

        Raises:
            OSError: if they could not be written.
        """
        super().start(self._start)
        for rows in self._samples:
            super().append(rows)


def checked_label(label: str | None) -> str | None:
    """The label that an argument gives, or None.

    Raises:
        ValueError: unless it can be the name of a folder and a part of a log key.
    """
    if label is None:
        return None
    if not (isinstance(label, str) and _LABEL.fullmatch(label)):
        raise ValueError(
            f"label must be letters, digits, '_', '-' and '.', such as 'late', as it names a folder, not {shown(label)}"
        )
    if (size := len(label.encode())) > _LONGEST_NAME:
        raise ValueError(
            f"label must be at most {_LONGEST_NAME} bytes long, as it names a folder; {shown(label)} has {size}, so "
            "give a shorter one"
        )
    return label


def checked_dirpath(dirpath: _Path) -> _Path:
    """The folder that an argument gives, or None.

    Raises:
        TypeError: unless it is a path.
        ValueError: if no folder can be made there, as where a file of that name exists.
    """
    if dirpath is None:
        return None
    if not isinstance(dirpath, str | os.PathLike):
        raise TypeError(
            f"dirpath must be the path of a folder, such as 'logs/tails', or None for the default, not {shown(dirpath)}"
        )
    try:
        existing_folder(dirpath)
    except ValueError as error:
        why = one_line(error, longest=120)
        raise ValueError(
            f"dirpath must be the path of a folder, existing or new, not {shown(str(dirpath))}: {why}; give "
            "another path"
        ) from None
    return dirpath
