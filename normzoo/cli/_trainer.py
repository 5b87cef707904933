"""The Trainer of a run: its loggers, its checkpoints and its progress bar."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger

from normzoo.cli._going_on import Start
from normzoo.cli._interrupts import StopOnSignal
from normzoo.cli._metrics_file import RunMetrics
from normzoo.cli._resume import CHECKPOINTS
from normzoo.cli._safe_points import SafePoints
from normzoo.cli._tensorboard import RunBoard
from normzoo.cli.build import Training


def make_trainer(training: Training, folder: Path, start: Start | None = None) -> Trainer:
    """The Trainer of a run that writes into ``folder``, and begins anew or goes on from a checkpoint there."""
    given = training.trainer_component.arguments
    first: list[Callback] = [StopOnSignal()]
    last: list[Callback] = _progress_bar(training)
    if given.get("enable_checkpointing") in (None, True) and not given.get("fast_dev_run"):
        others = any(isinstance(callback, Checkpoint) for callback in training.callbacks)
        earlier = () if start is None else start.checkpoints
        points = SafePoints(folder / CHECKPOINTS, beside_others=others, earlier=earlier)
        first, last = [StopOnSignal(points), points], [*last, points.keeper]
    loggers = _loggers(folder, start, training)
    return training.trainer(logger=loggers, first=first, callbacks=last, default_root_dir=str(folder))


def _loggers(folder: Path, start: Start | None, training: Training) -> list[Logger]:
    # The callbacks write where the first logger does
    return [
        RunMetrics(folder, 0 if start is None else start.rows),
        RunBoard(folder, training.config, training.board == "few", None if start is None else start.logged),
    ]


def _progress_bar(training: Training) -> list[Callback]:
    """Rich's progress bar, unless the recipe has one of its own or wants none."""
    wanted = training.trainer_component.arguments.get("enable_progress_bar") in (None, True)
    own = any(isinstance(callback, ProgressBar) for callback in training.callbacks)
    return [RichProgressBar(leave=True)] if wanted and not own else []
