"""The facts about a run that measurements may ask, whichever driver tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

NEEDS = {
    "loss": "the loss of each micro-batch",
    "batch": "the mini-batch that is trained on",
    "gradients": "the gradients that an optimizer is about to use",
    "applied": "the gradients that an optimizer applies, after clipping",
    "backward": "the gradients of single backward passes",
    "update": "what an optimizer's step changes",
    "activations": "what modules are given and return",
    "extra_pass": "passes over the mini-batch beside the run",
}


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def plain_name(name: str) -> str:
    """A module's or parameter's name without the prefixes that ``torch.compile`` inserts."""
    return f"{name}.".replace("_orig_mod.", "")[:-1]


class Run:
    """One run, as a driver sees it; a driver makes a subclass of it.

    Attributes:
        module: what is trained; parameters and modules are named from here.
        optimizers: whose steps are made, in their order.
        step: optimizer steps made so far, of all optimizers.
        device: where the module computes.
        ranks: how many processes train together.
        layout: how ranks hold parameters and gradients: ``"whole"``, reduced over ranks; ``"sharded"``, DTensors; or
            ``""``, in a way of which no figures would be right.
        strategy: the name of that way.
        tells: which of :data:`NEEDS` the driver can tell.
        automatic: whether it is known how the loss of each backward pass is weighed.
        accumulation: micro-batches of which the present step is made.
        most_accumulation: the largest number of them in any step to come.
        schedulers: of hyperparameters, which steps may move.
        scaler: the GradScaler that skips steps whose gradients are not finite; or None.
        averages_locally: whether ranks step by themselves, and only average parameters now and then.
        changes_steps: whether something may change gradients or the update between measuring and the step.
        complete: whether the module has all its layers yet: at setup not if it has a ``configure_model``, then yes.
        compiled: whether ``torch.compile`` has made what calls the module.
        writes: whether this process writes records.
        loggers: sinks of scalars, of the process that writes.
        measurements: all that measure the run.
    """

    module: Any
    optimizers: Sequence[Optimizer]
    step: int
    device: torch.device
    layout: str
    strategy: str
    tells: frozenset[str]
    automatic = True
    accumulation = 1
    most_accumulation = 1
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    averages_locally = False
    changes_steps = False
    complete = True
    compiled = False
    writes: bool
    loggers: Sequence[Any]
    measurements: Sequence[Any]

    @property
    def ranks(self) -> int:
        """How many processes train together."""
        return rank_and_ranks()[1]

    @property
    def shares_batches(self) -> bool:
        """Whether a batch may bring several steps, or none, which is known only when they are made."""
        return len(self.optimizers) > 1 or not self.automatic

    def named_modules(self) -> dict[str, nn.Module]:
        """The modules inside of :attr:`module`, by names without the prefixes that ``torch.compile`` inserts."""
        found = self.module.named_modules()
        return {plain_name(name): m for name, m in found if name and not hasattr(m, "_orig_mod")}

    def folder(self, dirpath: str | None = None) -> Path | None:
        """Where records go: ``dirpath``, or the folder of the run; None for nowhere. All ranks must ask together."""
        raise NotImplementedError

    def untold(self, need: str) -> str:
        """Why the driver cannot tell one of :data:`NEEDS`, and what to do."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """What ``training_step`` returns for a batch, at the precision of the run."""
        raise NotImplementedError

    def check_training_step(self, who: str, instead: str) -> None:
        """Raise a ValueError unless ``training_step`` can be evaluated once more; its message ends with ``instead``."""
        raise NotImplementedError

    def forward(self, batch: Any, batch_idx: int) -> Any:
        """Pass a batch through the module, as training does."""
        return self.training_step(batch, batch_idx)

    def check_forward(self, who: str, instead: str) -> None:
        """Raise a ValueError unless :meth:`forward` can be evaluated once more; its message ends with ``instead``."""
        self.check_training_step(who, instead)

    def precision(self) -> AbstractContextManager[Any]:
        """In which a loss is computed."""
        raise NotImplementedError

    def aside(self) -> AbstractContextManager[Any]:
        """In which the run takes no notice of what its module logs or asks."""
        raise NotImplementedError

    def before_update(self, applies: Callable[[Optimizer], None]) -> list[Any]:
        """Have a function called when an optimizer is about to apply its gradients, clipped; the handles of hooks."""
        raise NotImplementedError

    def stop(self) -> None:
        """End training after this step."""
        raise NotImplementedError

    def save_checkpoint(self, path: Path) -> None:
        """Save the run, so that it can be looked at or continued; all ranks together."""
        raise NotImplementedError

    def exit(self, error: SystemExit) -> None:
        """Raise this once training has ended without an error, in the place of returning from it; all ranks alike."""
        raise NotImplementedError

    def place(self, batch_idx: int) -> dict[str, Any]:
        """Where in the run a micro-batch stands: its index, the epoch, whether it is the last, the accumulation."""
        return {"batch_idx": batch_idx, "epoch": None, "is_last": None, "accumulation": self.accumulation}

    def state(self) -> dict[str, Any]:
        """What the driver knows of the state of the run beside module and optimizers: containers and tensors."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What a capsule says of how the run was set up: plain data."""
        return {}

    def why_not_again(self) -> str:
        """Why steps cannot be made again, for people; empty if they can."""
        raise NotImplementedError

    def loaders(self) -> Sequence[Any]:
        """The loaders of training batches, if the driver knows them."""
        return []

    def steps_again(
        self, copies: Mapping[int, Any], more: Sequence[Any], step: int
    ) -> AbstractContextManager[Callable[..., Tensor | None]]:
        """In which a step's micro-batches may be trained on once more, measured by copies of the measurements.

        The caller puts back module, optimizers, random streams and what else such a step moves.

        Args:
            copies: by the ``id`` of each of :attr:`measurements` the copy in its place; others are left out.
            more: further measurements.
            step: optimizer steps that had been made before the first one.

        Returns:
            a function of the step, what :meth:`place` returned and the batch, which trains on it, and makes the
            optimizer's step if it is the last of a step; it returns the detached loss, or None if there is none.
        """
        raise NotImplementedError


def loss_factor(run: Run, like: Tensor, scaled: bool = True) -> Tensor:
    """What the loss of a micro-batch is multiplied by before its backward pass, 0-d like ``like``, on its device."""
    factor = like.new_full((), 1 / run.accumulation)
    return run.scaler.scale(factor) if scaled and run.scaler is not None else factor
