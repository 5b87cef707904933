"""When a run diverges, and whether to stop it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from normzoo.callbacks._record import key
from normzoo.callbacks._recording import RecordingCallback, checked_label
from normzoo.callbacks._taps import Reading, batch_loss, check_strategy


class Divergence(RecordingCallback):
    """Records, and on request stops, a run whose mini-batch loss passes a threshold or is not finite.

    It holds for the job if it holds on any rank: the largest loss over ranks is taken, so all ranks decide alike, at
    the same step. The loss is read one step late, so a stop comes one step after. Written to the record
    ``divergence``, and logged as ``divergence/loss`` at the step where it happened.

    Args:
        threshold: of the mini-batch loss; above it, or not finite, the run has diverged.
        spike: also diverged if the loss exceeds this multiple of the median of the last ``window`` losses.
        window: how many losses the median is over; the rule waits until there are as many.
        stop: end training once the run has diverged; otherwise it is only recorded.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Attributes:
        step: optimizer steps taken when the diverged loss was computed, or None.
        loss: that loss, or None.

    Raises:
        ValueError: for thresholds not above 0; at setup for unsupported strategies; at the first step if
            ``training_step`` returns no loss under manual optimization.

    Source: threshold from Bjorck et al. 2018, arXiv 1806.02375, their experiments on divergence.
    """

    quantity = "divergence"
    needs_optimizer = False

    def __init__(
        self,
        threshold: float = 1e3,
        *,
        spike: float | None = None,
        window: int = 50,
        stop: bool = False,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        for name, value in (("threshold", threshold), ("spike", spike), ("window", window)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        self.threshold, self.spike, self.stop = threshold, spike, stop
        self.dirpath, self.label = dirpath, checked_label(label)
        self.step: int | None = None
        self.loss: float | None = None
        self._rule: str | None = None
        self._recent: deque[float] = deque(maxlen=window)
        self._pending: tuple[int, Reading] | None = None
        self._step_now = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the record; a divergence between two optimizer steps may be older than a checkpoint at its step."""
        super().on_train_start(trainer, pl_module)
        if self.step is not None and self.step >= trainer.global_step:
            self._write()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the step."""
        self._step_now = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the loss of the step before; send this one on its way."""
        self.flush(trainer)
        loss = batch_loss(outputs, trainer)
        if loss is None and not pl_module.automatic_optimization:
            raise ValueError(
                "Divergence reads the loss that training_step returns; under manual optimization return "
                "{'loss': loss} from it"
            )
        # A rank whose step returned no loss still enters the collective
        value = torch.zeros((), device=pl_module.device) if loss is None else loss.float().reshape(())
        largest = torch.nan_to_num(value, nan=math.inf, posinf=math.inf, neginf=math.inf)
        self._pending = (self._step_now, Reading(largest, dist.ReduceOp.MAX))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"step": self.step, "loss": self.loss, "rule": self._rule, "recent": list(self._recent)}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self.step, self.loss, self._rule = state_dict["step"], state_dict["loss"], state_dict["rule"]
        self._recent.clear()
        self._recent.extend(state_dict["recent"])

    def _forget_run(self) -> None:
        self.step = self.loss = self._rule = None
        self._recent.clear()

    def verdict(self, loss: float) -> str | None:
        """Which rule says that ``loss``, after the recent ones, is a divergence; None if none does."""
        if not math.isfinite(loss):
            return "not finite"
        if loss > self.threshold:
            return "threshold"
        full = len(self._recent) == self._recent.maxlen
        if self.spike is not None and full and loss > self.spike * statistics.median(self._recent):
            return "spike"
        return None

    def flush(self, trainer: Trainer) -> None:
        """Judge the last loss, if it has not been."""
        if self._pending is None:
            return
        (step, reading), self._pending = self._pending, None
        loss = float(reading.read())
        rule = self.verdict(loss)
        self._recent.append(loss)
        if rule is None or self.step is not None:
            return
        self.step, self.loss, self._rule = step, loss, rule
        self._write()
        self._record.log({key("divergence", "loss"): loss}, step)
        if self.stop:
            trainer.should_stop = True

    def _write(self) -> None:
        self._record.append({"step": self.step, "loss": self.loss, "rule": self._rule, "stopped": self.stop})
