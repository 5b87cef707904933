"""Checkpoints from which a run goes on bit for bit: saved where nothing of an earlier step is still to be done.

Lightning saves at the end of a batch or an epoch, before what it logs there is written and before a validation that is
due, and leaves out random streams and what a module has logged since the epoch began. Here a checkpoint is saved as an
epoch, a batch or a validation begins, and has these as well.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from normzoo.callbacks._run.streams import random_streams, set_random_streams
from normzoo.cli._metrics_file import RunMetrics
from normzoo.cli._results import metrics_state, results_state, set_metrics_state, set_results_state

KEY = "normzoo"  # of what is added to a checkpoint
INTERRUPTED, BESIDE_OTHERS = "interrupted.ckpt", "resume.ckpt"
OF_AN_EPOCH = "epoch={}-step={}.ckpt"


class SafePoints(Callback):
    """Saves a checkpoint as each epoch begins, and once training has ended; the first of a Trainer's callbacks.

    Beside checkpoint callbacks of the recipe there is one file, which is also written after each of their checkpoints
    and is gone once training has ended. :attr:`keeper` belongs to the same Trainer.

    Args:
        folder: in which the checkpoints are.
        beside_others: whether the recipe has checkpoint callbacks.
        earlier: checkpoints that the run has left, which the next one takes the place of.
    """

    def __init__(self, folder: Path, beside_others: bool, earlier: Sequence[Path] = ()) -> None:
        self.keeper = _Keeper(folder, self)
        self._beside_others = beside_others
        self._earlier = {*earlier}
        self._goes_on_from: dict[str, Any] | None = None  # what is still to be restored
        self._trained = False  # since the newest checkpoint
        self._asked = False  # to save one as the next batch begins
        self._loaders: list[Any] = []  # states of the loaders after the last batch
        self._at_validation: dict[str, Any] = {}  # random streams and metrics as the validation that runs began
        self._before_epoch: dict[str, Any] | None = None  # streams before the first epoch of a run that goes on
        self._within_epoch = False  # whether the first batch of a run that goes on is not the first of its epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """All ranks use the folder of the first one."""
        self.keeper.dirpath = trainer.strategy.broadcast(self.keeper.dirpath)

    def save_interrupted(self, trainer: Trainer, point: str) -> None:
        """Save ``interrupted.ckpt`` beside the others; all ranks together.

        Args:
            trainer: that runs.
            point: where: as an ``epoch``, ``batch`` or ``validation`` begins.
        """
        self._save(trainer, point, INTERRUPTED)

    def ask(self, trainer: Trainer) -> None:
        """A checkpoint is to be saved as the next batch begins; asked as a batch ends."""
        self._asked = True
        self._loaders = [loader.state_dict() for loader in _loaders(trainer) if hasattr(loader, "state_dict")]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let Lightning's loops start at the point."""
        self._goes_on_from = checkpoint[KEY]
        _set_loops(checkpoint["loops"]["fit_loop"], checkpoint[KEY])
        trainer.num_sanity_val_steps = 0  # the run has passed them

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random streams of an epoch's start, as making the loader's iterator may draw random numbers."""
        if self._goes_on_from is not None and self._goes_on_from["point"] == "epoch":
            set_random_streams(self._own(trainer)["streams"], trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what the checkpoint has beside Lightning's states."""
        state = self._goes_on_from
        if state is None:
            return
        own, device = self._own(trainer), trainer.strategy.root_device
        self._within_epoch = self._trained = state["point"] != "epoch"
        self._before_epoch = random_streams(device)
        set_metrics_state(pl_module, own["metrics"])
        set_results_state(trainer, pl_module, own["results"])
        trainer.callback_metrics.update({k: v.to(device) for k, v in state["callback_metrics"].items()})
        trainer.accumulate_grad_batches = state["accumulate_grad_batches"]
        for name, parameter in pl_module.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint, or go on from the one that was saved here."""
        if self._goes_on_from is not None:
            assert self._before_epoch is not None
            set_random_streams(self._before_epoch, trainer.strategy.root_device)
            trainer.fit_loop.epoch_loop.restarting = False
            self._restored(trainer)
        elif self._trained:
            self._replace(trainer, "epoch")
        self._within_epoch = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from a checkpoint that was saved here."""
        if trainer.sanity_checking:
            return
        state, device = self._goes_on_from, trainer.strategy.root_device
        if state is not None and state["point"] == "validation":
            set_random_streams(self._own(trainer)["streams"], device)
            self._restored(trainer)
        self._at_validation = {"streams": random_streams(device), "metrics": copy.deepcopy(metrics_state(pl_module))}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on from a checkpoint that was saved here, or save one if it was asked for."""
        if self._within_epoch:
            # Lightning takes the batch for the first one of the epoch, and would drop what was logged before
            trainer._logger_connector._first_loop_iter = False
            self._within_epoch = False
        if (state := self._goes_on_from) is not None:
            set_random_streams(self._own(trainer)["streams"], trainer.strategy.root_device)
            trainer.fit_loop.epoch_loop._batches_that_stepped = state["batches_that_stepped"]
            self._restored(trainer)
        elif self._asked and batch_idx > 0 and self.is_between_steps(trainer, batch_idx) and _can_go_on(trainer):
            self._replace(trainer, "batch")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """There is something to save; keep where the loaders are if it is to be saved as the next batch begins."""
        self._trained = True
        if self._asked:
            self.ask(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint."""
        if self._beside_others:
            self._remove_earlier(trainer)
        elif self._trained:
            self._replace(trainer, "end")

    def _replace(self, trainer: Trainer, point: str) -> None:
        """Save a checkpoint, and then delete the one before."""
        name = OF_AN_EPOCH.format(max(trainer.current_epoch - 1, 0), trainer.global_step)
        path = self._save(trainer, point, BESIDE_OTHERS if self._beside_others else name)
        trainer.strategy.barrier("normzoo.save")
        self._remove_earlier(trainer, path)
        self._trained = self._asked = False

    def _save(self, trainer: Trainer, point: str, name: str) -> Path:
        path, self.keeper.point = Path(self.keeper.dirpath) / name, point
        try:
            trainer.save_checkpoint(path)
        finally:
            self.keeper.point = ""
        self._earlier.add(path)
        return path

    def _remove_earlier(self, trainer: Trainer, but: Path | None = None) -> None:
        for path in self._earlier - {but}:
            if trainer.is_global_zero:
                with contextlib.suppress(OSError):
                    path.unlink()
        self._earlier &= {but}

    @staticmethod
    def is_between_steps(trainer: Trainer, batch_idx: int) -> bool:
        """Whether no gradient is accumulated as a batch begins."""
        return batch_idx % trainer.accumulate_grad_batches == 0

    def add_state(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], point: str) -> None:
        """Add to a checkpoint what Lightning leaves out; all ranks together."""
        own = {
            "streams": random_streams(trainer.strategy.root_device),
            "metrics": metrics_state(pl_module),
            "results": results_state(trainer) if point in ("batch", "validation") else [],
            **(self._at_validation if point == "validation" else {}),
        }
        logger = trainer.loggers[0] if trainer.is_global_zero and trainer.loggers else None
        gradients = {} if pl_module.automatic_optimization else dict(pl_module.named_parameters())
        checkpoint[KEY] = {
            "point": point,
            "ranks": _gathered(move_data_to_device(_plain(own), "cpu")),
            "rows": logger.rows() if isinstance(logger, RunMetrics) else 0,
            "batches_that_stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "positions": _can_go_on(trainer),
            "loaders": self._loaders if point == "batch" else [],
            "callback_metrics": dict(trainer.callback_metrics),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradients": {n: p.grad for n, p in gradients.items() if type(p.grad) is torch.Tensor},
        }

    def _restored(self, trainer: Trainer) -> None:
        """End the restart: a loop of Lightning that is restarting skips schedules at the end of an epoch."""
        trainer.fit_loop._restarting = False
        self._goes_on_from = self._before_epoch = None

    def _own(self, trainer: Trainer) -> dict[str, Any]:
        """The state that the checkpoint holds for this rank."""
        assert self._goes_on_from is not None
        ranks = self._goes_on_from["ranks"]
        if len(ranks) != trainer.world_size:
            raise ValueError(
                f"the checkpoint is of {len(ranks)} ranks, and there are {trainer.world_size}; go on with as many"
            )
        return _from_plain(ranks[trainer.global_rank])


class _Keeper(Checkpoint):
    """Stands among the checkpoint callbacks, which come last, where Lightning would put one of its own."""

    def __init__(self, folder: Path, points: SafePoints) -> None:
        self.dirpath = str(folder)
        self.point = ""  # at which a checkpoint is being saved
        self._points = points

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out; by then other callbacks have written what they had measured."""
        if self.point:
            self._points.add_state(trainer, pl_module, checkpoint, self.point)
        elif self._points._beside_others and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._points.ask(trainer)


def _set_loops(loops: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Change the states of Lightning's loops so that they start at a point."""
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if state["point"] in ("epoch", "end"):
        for progress in (epochs["total"], epochs["current"]):
            progress.update(ready=progress["processed"], started=progress["processed"], completed=progress["processed"])
        loops["state_dict"].pop("combined_loader", None)
    elif state["point"] == "batch":
        # As if the batch before had just ended
        for progress in (batches["total"], batches["current"]):
            done = progress["completed"]
            progress.update(ready=done, started=done, processed=done, completed=done - 1)
        batches["is_last_batch"] = False
        loops["state_dict"]["combined_loader"] = state["loaders"]
    else:
        # As if the first batch of the validation had begun
        validation = loops["epoch_loop.val_loop.batch_progress"]
        made = validation["current"]["completed"]
        for progress, before in (
            (validation["current"], 0),
            (validation["total"], validation["total"]["completed"] - made),
        ):
            progress.update(ready=before + 1, started=before + 1, processed=before, completed=before)
        validation["is_last_batch"] = False


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _can_go_on(trainer: Trainer) -> bool:
    """Whether all loaders tell their position; Lightning fetches a batch ahead from one without a length."""
    needed = ("state_dict", "load_state_dict", "__len__")
    return all(hasattr(loader, name) for loader in _loaders(trainer) for name in needed)


def _gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def _plain(own: dict[str, Any]) -> dict[str, Any]:
    """With NumPy's stream as a tensor, which checkpoints may hold that are read without running code."""
    numpy = own["streams"]["numpy"]
    key = torch.from_numpy(numpy["state"]["key"].astype("int64"))
    return {**own, "streams": {**own["streams"], "numpy": {**numpy, "state": {**numpy["state"], "key": key}}}}


def _from_plain(own: dict[str, Any]) -> dict[str, Any]:
    numpy = own["streams"]["numpy"]
    key = numpy["state"]["key"].numpy().astype("uint32")
    return {**own, "streams": {**own["streams"], "numpy": {**numpy, "state": {**numpy["state"], "key": key}}}}
