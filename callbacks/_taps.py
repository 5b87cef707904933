"""Access to what a run computes, without stalling it: supported strategies, losses, copies to the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

Key = TypeVar("Key")
_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy"}


def check_strategy(trainer: Trainer, callback: object) -> None:
    """Raise a ValueError unless every rank holds whole parameters and whole reduced gradients."""
    # By name, so that the classes of pytorch_lightning are recognized as well.
    names = {c.__name__ for c in type(trainer.strategy).__mro__}
    if not names & _SUPPORTED:
        raise ValueError(
            f"{type(callback).__name__} supports one device and DDP; under {type(trainer.strategy).__name__} "
            "a rank does not hold whole gradients, and its figures would be wrong"
        )


def batch_loss(outputs: Any, trainer: Trainer) -> Tensor | None:
    """The mini-batch loss from what Lightning passes to ``on_train_batch_end``; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor):
        return None
    automatic = trainer.lightning_module.automatic_optimization
    # Lightning has divided it by the number of accumulated batches
    return loss.detach() * (trainer.accumulate_grad_batches if automatic else 1)


def gradients(params: Iterable[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """The gradients that have any values, dense, by the keys of their parameters."""
    found = {name: p.grad.detach() for name, p in params if p.grad is not None and p.grad.numel()}
    return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}


class Reading:
    """A small tensor on its way to the host, reduced over ranks if asked, to be read a step later.

    Args:
        value: a tensor of this call's own; it is overwritten by the reduction.
        reduce: ``dist.ReduceOp``, or None to leave each rank its own. Every rank must construct alike.
    """

    def __init__(self, value: Tensor, reduce: dist.ReduceOp.RedOpType | None = None) -> None:
        self._value, self._work, self._event = value, None, None
        if reduce is not None and dist.is_available() and dist.is_initialized():
            self._work = dist.all_reduce(value, op=reduce, async_op=True)
        if value.is_cuda:
            if self._work is not None:
                self._work.wait()  # orders the streams, does not block the host
                self._work = None
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value = host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The value on the host; waits if it has not arrived."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return self._value
