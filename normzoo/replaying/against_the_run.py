"""Compares steps made again with those of the run, as they are made, and remembers the first difference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normzoo.callbacks._run.batches import checksums
from normzoo.callbacks._run.frames import module_tensors
from normzoo.callbacks._run.gradients import local_values, trainable_parameters
from normzoo.replaying.comparison import difference_of_losses, relative_difference, standing_out
from normzoo.replaying.stage import Stage

_OF_NORMS = 1e-4  # relative: how far norms that are measured in another way may differ by rounding
_OF_SUMS = 0.01  # relative: losses of a job of fewer ranks, which sums in another order


@dataclass(frozen=True)
class Difference:
    """The first difference from the run: before which step, of ``"loss"``, ``"norm"`` or ``"weights"``, how large."""

    step: int
    of: str
    relative: float


class Compared:
    """Compares the steps of a stage with those of the run as they are made.

    Attributes:
        difference: the first one; None if there is none.
        tensor: the element that deviates most (see :func:`normzoo.replaying.comparison.standing_out`), at the first
            time after the difference for which the capsule has weights; None where these are the same, or not there.
        tensor_step: the step that these weights are before.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.difference: Difference | None = None
        self.tensor: dict[str, Any] | None = None
        self.tensor_step: int | None = None
        self.whole = stage.ranks == stage.recorded_ranks
        self.tolerance = 0.0 if self.whole else _OF_SUMS
        self.end = (stage.capsule.now(stage.rank) if self.whole else None) or {}
        if not self.whole:
            stage.notes.append(
                f"The run had {stage.recorded_ranks} ranks, and its steps were made again on {stage.ranks}: sums are "
                f"made in another order, so losses are compared to {_OF_SUMS:.0%} and weights not at all."
            )

    def step(self, step: int, norm: float | None) -> None:
        """Compare the losses of the step that has been made, and its norm, where they are known."""
        recorded = self.stage.frame(step)
        self._differ(step, "loss", difference_of_losses(recorded.losses, self.stage.last_losses, self.tolerance))
        if norm is not None and recorded.norm is not None:
            relative = relative_difference(recorded.norm, norm)
            self._differ(step, "norm", relative if relative > max(self.tolerance, _OF_NORMS) else None)

    def weights(self, step: int) -> None:
        """Compare the weights before a step, if the capsule has them or their checksums."""
        if not self.whole or step == self.stage.steps[0]:
            return
        if step in self.stage.snapshots:
            self._compare(step, self.stage.capsule.state(self.stage.rank, step))
        elif self.end.get("step") == step:
            self._compare(step, self.end)

    def _compare(self, step: int, recorded: Mapping[str, Any]) -> None:
        now = module_tensors(self.stage.run)
        sums, trained = checksums(now), trainable(self.stage)
        known = recorded.get("checksums") or {}
        differ = any(sums[name] != known[name] for name in trained if name in known)
        if not any(self.stage.gather(differ)):
            return
        self._differ(step, "weights", 0.0)
        module = recorded.get("module")
        if self.tensor_step is None and isinstance(module, Mapping):
            tensors = {name: t for name, t in module.items() if isinstance(t, Tensor)}
            own = standing_out(tensors, {name: local_values(t.detach()) for name, t in now.items()})
            of_ranks = [found for found in self.stage.gather(own) if found]
            self.tensor = max(of_ranks, key=lambda found: found["times"], default=None)
            self.tensor_step = step

    def _differ(self, step: int, of: str, relative: float | None) -> None:
        if relative is not None and self.difference is None:
            self.difference = Difference(step, of, relative)


def trainable(stage: Stage) -> dict[str, Tensor]:
    """The trainable parameters by name, as those of a capsule are named."""
    optimized = [trainable_parameters(stage.run, optimizer) for optimizer in stage.run.optimizers]
    return dict(itertools.chain.from_iterable(of_one.items() for of_one in optimized))
