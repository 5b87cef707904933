"""When a run diverges, and whether to stop it."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from normzoo.callbacks._record import key
from normzoo.callbacks._recording import RecordingCallback, checked_dirpath, checked_label
from normzoo.callbacks._schedule import is_number, is_whole
from normzoo.callbacks._taps import Reading, batch_loss, check_strategy
from normzoo.functional.spikes import modified_z_score


class Divergence(RecordingCallback):
    """Records, and on request stops, a run whose mini-batch loss passes a threshold or is not finite.

    It holds for the job if it holds on any rank: the largest loss over ranks is taken, so all ranks decide alike, at
    the same step. The loss is read one step late, so a stop comes one step after. Written to the record
    ``divergence``, and logged as ``divergence/loss`` at the step where it happened.

    Args:
        threshold: of the mini-batch loss; above it, or not finite, the run has diverged.
        spike: also diverged if the loss is further than this above the median of the last ``window`` losses, in robust
            standard deviations of these, 1.4826 times the median absolute deviation
            (:func:`normzoo.functional.modified_z_score`); 5 passes Gaussian noise, 15 skewed noise. None
            leaves the rule out.
        window: how many losses the median is over; the rule waits until there are as many. Losses that are not finite
            or that a rule calls a divergence are left out.
        two_sided: a loss that is as far below the median has diverged too (the rule ``drop``).
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
        two_sided: bool = False,
        stop: bool = False,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        for name, value in (("threshold", threshold), ("spike", 1.0 if spike is None else spike)):
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if not (is_whole(window) and window > 0):
            raise ValueError(f"window must be a whole number of losses above 0, not {window!r}")
        if two_sided and spike is None:
            raise ValueError("two_sided=True is about the rule spike; pass spike=, how far a loss may be off")
        self.threshold, self.spike, self.two_sided, self.stop = threshold, spike, two_sided, stop
        self.dirpath, self.label = checked_dirpath(dirpath), checked_label(label)
        self.step: int | None = None
        self.loss: float | None = None
        self._rule: str | None = None
        self._recent: deque[float] = deque(maxlen=window)  # the largest over ranks
        self._smallest: deque[float] = deque(maxlen=window)
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
        extremes = torch.full((2,), -math.inf, dtype=torch.float32, device=pl_module.device)
        if loss is not None:
            value = loss.float().reshape(())
            extremes = torch.nan_to_num(torch.stack([value, -value]), math.inf, math.inf, math.inf)
        self._pending = (self._step_now, Reading(extremes, dist.ReduceOp.MAX))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        recent = {"recent": list(self._recent), "smallest": list(self._smallest)}
        return {"step": self.step, "loss": self.loss, "rule": self._rule, **recent}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self.step, self.loss, self._rule = state_dict["step"], state_dict["loss"], state_dict["rule"]
        largest = state_dict["recent"]
        smallest = state_dict.get("smallest", largest)
        kept = [pair for pair in zip(largest, smallest, strict=True) if all(map(math.isfinite, pair))]
        self._forget_losses()
        self._recent.extend(high for high, _ in kept)
        self._smallest.extend(low for _, low in kept)

    def _forget_run(self) -> None:
        self.step = self.loss = self._rule = None
        self._forget_losses()

    def _forget_losses(self) -> None:
        self._recent.clear()
        self._smallest.clear()

    def verdict(self, loss: float, smallest: float | None = None) -> str | None:
        """Which rule says that a loss, after the recent ones, is a divergence; None if none does.

        Args:
            loss: the largest over ranks.
            smallest: the smallest over ranks; by default ``loss``.
        """
        if not math.isfinite(loss):
            return "not finite"
        if loss > self.threshold:
            return "threshold"
        if self.spike is None or len(self._recent) < self._recent.maxlen:  # type: ignore[operator]
            return None
        if modified_z_score(loss, self._recent) > self.spike:
            return "spike"
        lowest = loss if smallest is None else smallest
        return "drop" if self.two_sided and modified_z_score(lowest, self._smallest) < -self.spike else None

    def flush(self, trainer: Trainer) -> None:
        """Judge the last loss, if it has not been."""
        if self._pending is None:
            return
        (step, reading), self._pending = self._pending, None
        loss, negated = reading.read().tolist()
        if loss == -math.inf:  # no rank had one
            return
        rule = self.verdict(loss, -negated)
        if rule is None:
            self._recent.append(loss)
            self._smallest.append(-negated)
        if rule is None or self.step is not None:
            return
        self.step, self.loss, self._rule = step, -negated if rule == "drop" else loss, rule
        self._write()
        self._record.log({key("divergence", "loss"): self.loss}, step)
        if self.stop:
            trainer.should_stop = True

    def _write(self) -> None:
        self._record.append({"step": self.step, "loss": self.loss, "rule": self._rule, "stopped": self.stop})
