"""From which checkpoint a training run goes on that was killed, interrupted or has failed."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normzoo._errors import RecipeError, one_line
from normzoo.cli._resume import CHECKPOINTS
from normzoo.cli._safe_points import KEY


class DamagedError(Exception):
    """A checkpoint file is damaged. No ValueError, as RecipeError is one, which refuses a run and clears nothing."""


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from.

    Attributes:
        path: of the file.
        point: where it was saved: as an ``epoch``, ``batch`` or ``validation`` began, or at the ``end`` of training.
        epoch: that begins, or goes on, counted from 0.
        steps: optimizer steps made.
        logged: the loggers' count of them.
        rows: of the metrics file that had been logged.
        checkpoints: all files from which the run could go on.
    """

    path: Path
    point: str
    epoch: int
    steps: int
    logged: int
    rows: int
    checkpoints: tuple[Path, ...]

    @property
    def sentence(self) -> str:
        """Where the run goes on."""
        where = {
            "epoch": f"at the start of epoch {self.epoch}",
            "batch": f"within epoch {self.epoch}",
            "validation": f"at the start of the validation in epoch {self.epoch}",
            "end": "with its report, as training has ended",
        }
        return f"goes on {where[self.point]}, after {self.steps} steps, from {self.path.name}"


def newest(folder: Path) -> tuple[Start | None, tuple[str, ...]]:
    """The newest checkpoint in a run's folder that the run can go on from, and sentences on those passed over.

    The same on all ranks, as it depends on the checkpoints alone.

    Raises:
        RecipeError: if a checkpoint holds more than tensors and plain values.
    """
    remarks, found = [], []
    for path in sorted((folder / CHECKPOINTS).glob("*.ckpt")):
        try:
            content = _read(path)
        except DamagedError:
            remarks.append(f"{path.name} is damaged and is not used")
            continue
        if isinstance(content, dict) and isinstance(content.get(KEY), dict):  # else it is one of the recipe's own
            found.append((path, content))
    found.sort(key=lambda item: (item[1]["global_step"], item[0].stat().st_mtime), reverse=True)
    for path, state in found:
        own = state[KEY]
        if own["point"] == "batch" and not own["positions"]:
            remarks.append(
                f"{path.name} is not used, as the training data's loader does not tell its position (it has no "
                "state_dict): the run goes on from the start of an epoch"
            )
            continue
        epoch = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        logged, paths = own["batches_that_stepped"], tuple(path for path, _ in found)
        return Start(path, own["point"], epoch, state["global_step"], logged, own["rows"], paths), tuple(remarks)
    return None, tuple(remarks)


def newest_weights(folder: Path) -> Path | None:
    """The checkpoint of a run with the most steps; None if there is none."""
    steps = []
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        with contextlib.suppress(DamagedError, KeyError, TypeError):  # KeyError, TypeError: no checkpoint of Lightning
            steps.append((int(_read(path)["global_step"]), path.stat().st_mtime, path))
    return max(steps)[2] if steps else None


def _read(path: Path) -> Any:
    """The content of a checkpoint file.

    Raises:
        DamagedError: if the file is damaged.
        RecipeError: if the file cannot be opened, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:  # the file may be whole, and --resume clears a run all of whose checkpoints are damaged
        raise
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch.load has no common class of errors for damaged files
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise RecipeError(
                f"{path} holds more than tensors and plain values, and reading it could run code; allow its classes "
                "by torch.serialization.add_safe_globals in the module of the recipe's model "
                f"({one_line(error, longest=120)})"
            ) from None
        raise DamagedError from error
