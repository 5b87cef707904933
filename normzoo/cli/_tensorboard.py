"""The TensorBoard logger of a run: few tags, and the recipe's settings beside the last metrics for the HParams tab."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

_OF_METRICS = ("train/", "test/", "val/", "valid/")  # beginnings of the tags that the HParams tab shows


class RunBoard(TensorBoardLogger):
    """Lightning's logger; once the run has ended it has its settings and the tags of its metrics.

    Args:
        folder: of the run.
        settings: of the recipe, whose numbers, texts and truth values are hyperparameters.
        few: whether measurements leave out what they log of each layer, as ``normzoo.callbacks`` ask loggers.
        purge_step: of a run that goes on, from which on earlier events are left out; None for a new run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], few: bool, purge_step: int | None = None) -> None:
        super().__init__(str(folder), name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step)
        self.few = few
        self._settings = dict(_scalars(settings))
        self._last: dict[str, float] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, and keep the last ones."""
        super().log_metrics(metrics, step)
        self._last.update({tag: float(value) for tag, value in metrics.items() if tag.startswith(_OF_METRICS)})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the settings and which tags are metrics; the values are those of the tags."""
        if self._last:
            for summary in hparams(self._settings, self._last):
                self.experiment._get_file_writer().add_summary(summary)
        super().finalize(status)


def _scalars(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The settings that are no lists, by dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
