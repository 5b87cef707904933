"""Each optimizer's own steps, and the batches that bring them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.optim import Optimizer

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks.schedule import Schedule


class OptimizerStep(NamedTuple):
    """A step that is about to be made: the optimizer's index in ``run.optimizers``, and its steps made before."""

    optimizer: int
    made: int


class OptimizerSteps:
    """Counts the steps of each optimizer of a run, whose ``step`` is the sum over all optimizers.

    With one optimizer its count is ``run.step``. With several, as under manual optimization, the sum says little of
    each: of two that take turns, one has all the even numbers. Nor has every step to be in the sum: modules take steps
    out of it by replacing a LightningOptimizer's ``_on_before_step`` and ``_on_after_step``.
    """

    def __init__(self) -> None:
        self._made: list[int] = []
        self._current: tuple[int, int] | None = None  # the sum and the optimizer of the step being made
        self._restored = False

    def start(self, run: Run) -> None:
        """Training starts, or goes on: keep counts that were restored, or that agree with ``run.step``."""
        optimizers, total = max(len(run.optimizers), 1), run.step
        if len(self._made) != optimizers or not (self._restored or sum(self._made) == total):
            self._made = [total // optimizers] * optimizers
        self._current, self._restored = None, False

    def begin(self, run: Run, optimizer: Optimizer) -> OptimizerStep | None:
        """A step of an optimizer begins; None if it goes on, as when LBFGS evaluates its closure again."""
        index = next((i for i, other in enumerate(run.optimizers) if other is optimizer), None)
        if index is None or (run.step, index) == self._current:
            return None
        self._current = (run.step, index)
        step = self.next(run, index)
        if len(self._made) > 1:
            self._made[index] = step.made + 1
        return step

    def next(self, run: Run, index: int) -> OptimizerStep:
        """The step that an optimizer makes next."""
        return OptimizerStep(index, self._made[index] if len(self._made) > 1 else run.step)

    def end_batch(self) -> None:
        """A batch has ended, and with it the steps that were made in it."""
        self._current = None

    def state_dict(self) -> dict[str, Any]:
        """The counts; nothing for one optimizer, whose steps the run counts."""
        return {"steps": list(self._made)} if len(self._made) > 1 else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the checkpoint was."""
        self._made, self._restored = list(state_dict.get("steps", [])), "steps" in state_dict


class BatchesDue:
    """Asks a schedule about batches, each of which may bring several optimizer steps, of one optimizer or more.

    A batch is due if ``run.step`` has reached a step that is due, or passed it since the last batch started. Batches
    that start at the same step, as gradients are accumulated over them, are sampled alike.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._asked, self._is_due = schedule, -1, False

    def start(self, run: Run) -> None:
        """Training starts, or goes on after a batch that brought a step of each optimizer."""
        self._asked = run.step - max(len(run.optimizers), 1)

    def __call__(self, run: Run) -> bool:
        """Whether the batch that starts now is to be sampled."""
        if run.step != self._asked:
            self._is_due = any(map(self._schedule, range(max(self._asked + 1, 0), run.step + 1)))
            self._asked = run.step
        return self._is_due
