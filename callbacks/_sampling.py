"""When callbacks sample a step: each optimizer's own steps are counted, and the schedule is asked about that count."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from normzoo.callbacks._recording import RecordingCallback
from normzoo.callbacks._schedule import Schedule


class OptimizerStep(NamedTuple):
    """A step that is about to be made: the optimizer's index in ``trainer.optimizers``, and its steps made before."""

    optimizer: int
    made: int


class OptimizerSteps:
    """Counts the steps of each optimizer of a trainer, whose ``global_step`` is the sum over all optimizers.

    With one optimizer its count is ``trainer.global_step``. With several, as under manual optimization, the sum says
    little of each: of two that take turns, one has all the even numbers. Nor has every step to be in the sum: modules
    take steps out of it by replacing a LightningOptimizer's ``_on_before_step`` and ``_on_after_step``.
    """

    def __init__(self) -> None:
        self._made: list[int] = []
        self._current: tuple[int, int] | None = None  # the sum and the optimizer of the step being made
        self._restored = False

    def start(self, trainer: Trainer) -> None:
        """Training starts, or goes on: keep counts that were restored, or that agree with ``trainer.global_step``."""
        optimizers, total = max(len(trainer.optimizers), 1), trainer.global_step
        if len(self._made) != optimizers or not (self._restored or sum(self._made) == total):
            self._made = [total // optimizers] * optimizers
        self._current, self._restored = None, False

    def begin(self, trainer: Trainer, optimizer: Optimizer) -> OptimizerStep | None:
        """A step of an optimizer begins; None if it goes on, as when LBFGS evaluates its closure again."""
        index = next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), None)
        if index is None or (trainer.global_step, index) == self._current:
            return None
        self._current = (trainer.global_step, index)
        step = self.next(trainer, index)
        if len(self._made) > 1:
            self._made[index] = step.made + 1
        return step

    def next(self, trainer: Trainer, index: int) -> OptimizerStep:
        """The step that an optimizer makes next."""
        return OptimizerStep(index, self._made[index] if len(self._made) > 1 else trainer.global_step)

    def end_batch(self) -> None:
        """A batch has ended, and with it the steps that were made in it."""
        self._current = None

    def state_dict(self) -> dict[str, Any]:
        """The counts; nothing for one optimizer, whose steps the trainer counts."""
        return {"steps": list(self._made)} if len(self._made) > 1 else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was."""
        self._made, self._restored = list(state_dict.get("steps", [])), "steps" in state_dict


class BatchesDue:
    """Asks a schedule about batches, each of which may bring several optimizer steps, of one optimizer or more.

    A batch is due if ``trainer.global_step`` has reached a step that is due, or passed it since the last batch started.
    Batches that start at the same step, as gradients are accumulated over them, are sampled alike.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._asked, self._is_due = schedule, -1, False

    def start(self, trainer: Trainer) -> None:
        """Training starts, or goes on after a batch that brought a step of each optimizer."""
        self._asked = trainer.global_step - max(len(trainer.optimizers), 1)

    def __call__(self, step: int) -> bool:
        """Whether the batch that starts when this many steps have been made is to be sampled."""
        if step != self._asked:
            self._is_due = any(map(self._schedule, range(max(self._asked + 1, 0), step + 1)))
            self._asked = step
        return self._is_due


class SamplingCallback(RecordingCallback):
    """Base of the callbacks that sample the steps of optimizers when a schedule says."""

    _is_due: Schedule
    _steps: OptimizerSteps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a segment of the record, and count from here."""
        super().on_train_start(trainer, pl_module)
        self._steps.start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The steps of this batch have been made."""
        self._steps.end_batch()

    def state_dict(self) -> dict[str, Any]:
        """The steps that each optimizer has made, if there are several."""
        return self._steps.state_dict()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self._steps.load_state_dict(state_dict)

    def _forget_run(self) -> None:
        self._steps = OptimizerSteps()
