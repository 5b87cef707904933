"""The Trainer of a run: its loggers and its progress bar."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from normzoo.cli.build import Training


def make_trainer(training: Training, folder: Path, *callbacks: Callback) -> Trainer:
    """The Trainer of a run that writes into ``folder``, with callbacks beside those of the recipe."""
    more = [*_progress_bar(training), *callbacks]
    return training.trainer(logger=_loggers(folder), callbacks=more, default_root_dir=str(folder))


def _loggers(folder: Path) -> list[Logger]:
    # The callbacks write where the first logger does
    return [
        CSVLogger(str(folder), name="metrics", version=""),
        TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False),
    ]


def _progress_bar(training: Training) -> list[Callback]:
    """Rich's progress bar, unless the recipe has one of its own or wants none."""
    wanted = training.trainer_component.arguments.get("enable_progress_bar") in (None, True)
    own = any(isinstance(callback, ProgressBar) for callback in training.callbacks)
    return [RichProgressBar(leave=True)] if wanted and not own else []
