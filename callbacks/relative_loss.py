"""How the loss changes along the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._isolation import isolated
from normzoo.callbacks._record import Record, key
from normzoo.callbacks._recording import RecordingCallback
from normzoo.callbacks._schedule import Schedule, as_schedule
from normzoo.callbacks._taps import Reading, check_strategy, gradients
from normzoo.functional.relative_loss import learning_rate_headroom, relative_loss

LossFunction = Callable[[LightningModule, Any], Tensor]


class RelativeLoss(RecordingCallback):
    """Records L(theta - s * lr * g; batch) / L(theta; batch) for multiples s of the step about to be taken.

    The loss is that of the mini-batch being trained on (the last, when accumulating), in training mode, with the
    same random draws (dropout) for every s; parameters are restored bit for bit, and running statistics, metrics,
    logs and random streams are left as they were. Under DDP it is the mean over ranks. A row of
    the record ``relative_loss`` for each sampled step holds ``multiples``, ``relative``, ``loss`` (the denominator),
    ``lr`` and ``headroom``, the largest s up to which the relative loss stays at or below 1; logged as
    ``relative_loss/headroom``. A sampled step costs one forward pass for each multiple and one more.

    Args:
        every_n_steps: sample when the number of optimizer steps taken is a multiple of this; or a schedule.
        multiples: s, as multiples of the learning rate (of each parameter group).
        loss: ``loss(module, batch)``, a 0-d tensor; by default the module's own ``training_step``. What that does
            outside the module (files, direct calls of a logger) happens again at each evaluation: give ``loss`` then.
        dirpath: folder of the record; by default the trainer's log folder.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies, or for manual optimization
            without ``loss``.

    Source: Bjorck et al. 2018, arXiv 1806.02375, section 3.1 and figure 3.
    """

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        multiples: list[float] | tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        loss: LossFunction | None = None,
        dirpath: str | None = None,
    ) -> None:
        self._is_due = as_schedule(every_n_steps)
        self.multiples = sorted(float(s) for s in multiples)
        if not self.multiples or self.multiples[-1] <= 0:
            raise ValueError(f"multiples must hold at least one value above 0, got {list(multiples)}")
        self.loss, self.dirpath = loss, dirpath
        self._batch: tuple[Any, int] | None = None
        self._pending: tuple[int, list[float], Reading] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self)
        if not pl_module.automatic_optimization and self.loss is None:
            raise ValueError(
                "RelativeLoss evaluates training_step, which under manual optimization takes optimizer steps of "
                "its own; pass loss=, a function of (module, batch)"
            )
        if stage == "fit":
            self._record = Record(trainer, "relative_loss", self.dirpath)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the step."""
        self._batch = (batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if due, without waiting for the result."""
        self.flush(trainer)
        if not self._is_due(trainer.global_step) or self._batch is None:
            return
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        params, steps = [], []
        for group in optimizer.param_groups:
            found = gradients((i, p) for i, p in enumerate(group["params"]))
            params += [group["params"][i] for i in found]
            steps += [g * group["lr"] for g in found.values()]
        losses = relative_loss(lambda: self._evaluate(trainer, pl_module), params, steps, self.multiples)
        self._pending = (trainer.global_step, lrs, Reading(losses, dist.ReduceOp.SUM))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the batch."""
        self._batch = None

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        assert self._batch is not None
        batch, batch_idx = self._batch
        with isolated(pl_module), trainer.precision_plugin.train_step_context():
            if self.loss is not None:
                return self.loss(pl_module, batch)
            output = pl_module.training_step(batch, batch_idx)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            return torch.full((), torch.nan, device=pl_module.device) if loss is None else loss.reshape(())

    def flush(self, trainer: Trainer) -> None:
        """Write the last sample, if it has not been."""
        if self._pending is None:
            return
        (step, lrs, reading), self._pending = self._pending, None
        start, *losses = reading.read().tolist()
        # The sum over ranks cancels in the ratio, and the mean is the loss of the whole batch
        relative = [loss / start if start else float("nan") for loss in losses]
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        headroom = learning_rate_headroom(self.multiples, relative)
        self._record.append(
            {
                "step": step,
                "lr": lrs[0],
                "loss": start / world,
                "multiples": self.multiples,
                "relative": relative,
                "headroom": headroom,
            }
        )
        self._record.log({key("relative_loss", "headroom"): headroom}, step)
