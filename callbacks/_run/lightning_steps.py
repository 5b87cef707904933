"""Steps of a Trainer made once more, by its own loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from normzoo.callbacks._run.isolation import HostCopies, Snapshot
from normzoo.callbacks._run.modules import overrides

# Hooks of callbacks that the loop calls in a step; those at the start and end of a batch are not called again
_CALLED = ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step")


def place_in_loop(trainer: Trainer, batch_idx: int) -> dict[str, Any]:
    """What :meth:`normzoo.callbacks._run.facts.Run.place` returns."""
    return {
        "batch_idx": batch_idx,
        "epoch": trainer.current_epoch,
        "is_last": trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
        "accumulation": trainer.accumulate_grad_batches,
    }


def set_place(trainer: Trainer, step: int, place: Mapping[str, Any]) -> None:
    """Put the counters of a Trainer's loop to where :func:`place_in_loop` was called, before that step's update."""
    _set_step(trainer, step)
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.current.ready = place["batch_idx"] + 1
    epoch_loop.batch_progress.is_last_batch = place["is_last"]
    trainer.fit_loop.epoch_progress.current.completed = place["epoch"]
    trainer.accumulate_grad_batches = place["accumulation"]


def _set_step(trainer: Trainer, step: int) -> None:
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    epoch_loop.manual_optimization.optim_step_progress.total.completed = step


@contextmanager
def steps_again(
    trainer: Trainer, module: LightningModule, instead: Mapping[int, Any], more: Sequence[Any], step: int
) -> Iterator[Callable[..., Tensor | None]]:
    """See :meth:`normzoo.callbacks._run.facts.Run.steps_again`.

    Args:
        trainer: whose loop makes the steps.
        module: that it trains.
        instead: by the ``id`` of each of its callbacks the one in its place, or None.
        more: further callbacks; these and those that stand in the place of others are measurements.
        step: optimizer steps that had been made before the first one.
    """
    owner: Any = trainer
    epoch_loop = trainer.fit_loop.epoch_loop
    automatic, manual = epoch_loop.automatic_optimization, epoch_loop.manual_optimization
    counters: list[Any] = [
        automatic.optim_progress,
        manual.optim_step_progress,
        epoch_loop.batch_progress,
        trainer.fit_loop.epoch_progress,
    ]
    saved = [counter.state_dict() for counter in counters]
    callbacks, accumulation = owner.callbacks, trainer.accumulate_grad_batches
    standing = [instead[id(c)] for c in callbacks]
    measurements = [*(c for c, own in zip(standing, callbacks, strict=True) if c is not own and c is not None), *more]
    others = [c for c in standing if c is not None and any(overrides(c, hook) for hook in _CALLED)]
    kept = Snapshot(nn.Module(), [vars(c) for c in others if c not in measurements], copies=HostCopies())
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    @torch.enable_grad()  # it may be validation that an alarm interrupts
    def train_on(step: int, place: dict[str, Any], batch: Any) -> Tensor | None:
        batch_idx = place["batch_idx"]
        set_place(trainer, step, place)
        for measurement in measurements:
            measurement.on_train_batch_start(trainer, module, batch, batch_idx)
        if module.on_train_batch_start(batch, batch_idx) == -1:  # the module skips the rest of the epoch
            return None
        arguments = OrderedDict(batch=batch, **({"batch_idx": batch_idx} if takes_index else {}))
        if module.automatic_optimization:
            outputs = automatic.run(trainer.optimizers[0], batch_idx, arguments)
        else:
            outputs = manual.run(arguments)
        for measurement in measurements:
            measurement.on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        module.on_train_batch_end(outputs, batch, batch_idx)
        loss = outputs.get("loss")
        divided = place["accumulation"] if module.automatic_optimization else 1
        return loss.detach() * divided if isinstance(loss, Tensor) else None

    owner.callbacks = [*(c for c in standing if c is not None), *more]
    profiler, owner.profiler = owner.profiler, PassThroughProfiler()  # one may be in the middle of a step
    owner.save_checkpoint = _ignore  # a hook's, which would go over the one that it saved at this step
    _set_step(trainer, step)
    try:
        yield train_on
    finally:
        owner.callbacks, owner.profiler = callbacks, profiler
        del owner.save_checkpoint
        kept.restore()
        trainer.accumulate_grad_batches = accumulation
        for counter, state in zip(counters, saved, strict=True):
            counter.load_state_dict(state)


def _ignore(*args: Any, **options: Any) -> None:
    """Stands in for ``Trainer.save_checkpoint``."""
