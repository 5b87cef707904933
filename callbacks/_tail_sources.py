"""The tensors whose tails are followed: gradients, updates, and what a micro-batch's gradient is off the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._taps import check_several_gradients, gradients, is_sharded, loss_factor

Named = Mapping[str, Tensor]


class UpdateTap:
    """The change that one optimizer step makes to parameters, handed over right after it.

    Args:
        optimizer: about to make a step.
        params: by name; copied.
        take: called with the changes, by name, unless the step is skipped.
    """

    def __init__(self, optimizer: Optimizer, params: Named, take: Callable[[dict[str, Tensor]], None]) -> None:
        self._params, self._take = params, take
        self._before = {name: p.detach().clone() for name, p in params.items() if p.numel()}
        self._handle = optimizer.register_step_post_hook(self._after)

    def _after(self, *_: Any) -> None:
        before, self._before = self._before, {}
        if before:
            self._take({name: self._params[name].detach() - start for name, start in before.items()})

    def remove(self) -> None:
        """Remove the hook, whether or not a step was made; not from within it, as others are called after it."""
        self._handle.remove()


class NoiseTap:
    """The gradient that the last backward pass brought on this rank, before accumulation and reduction.

    A hook of a parameter is given the gradient of that pass alone; it is copied, since it may become ``.grad`` itself.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._last: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def listen(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Before a backward pass."""
        self.stop()
        self._last = {}
        self._handles = [p.register_hook(partial(self._keep, name)) for name, p in params]

    def _keep(self, name: str, g: Tensor) -> None:
        self._last[name] = self._last[name] + g.detach() if name in self._last else g.detach().clone()

    def stop(self) -> None:
        """After it."""
        self.passes += bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Forget all, after an optimizer step or when a run breaks off."""
        self.stop()
        self.passes, self._last = 0, {}

    def differences(self, trainer: Trainer, optimizer: Optimizer, params: Named) -> dict[str, Tensor]:
        """What the last micro-batch's gradient is off the mean of the step's, by name, both of the plain loss."""
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)  # else Lightning has unscaled .grad
        found: dict[str, Tensor] = {}
        if trainer.world_size * self.passes < 2:  # an epoch's last step may be of one micro-batch
            return found
        for name, mean in gradients(params.items()).items():
            wide = mean.to(torch.promote_types(mean.dtype, torch.float32))
            found[name] = -wide / (self.passes * loss_factor(trainer, wide, scaled))
            if name in self._last:  # else the last pass, or this rank, did not use it
                own = self._last[name]
                own = own.to_dense() if own.is_sparse else own
                found[name] += own.to(wide.dtype) / loss_factor(trainer, wide)
        return found


def check_noise(trainer: Trainer, module: LightningModule) -> None:
    """Raise a ValueError unless a step's gradient is the mean of several, each of which a hook sees; at its start."""
    if not module.automatic_optimization:
        raise ValueError(
            "GradientTails cannot know how manual optimization weighs the losses of a step's backward passes; "
            'of="noise" supports automatic optimization only'
        )
    check_several_gradients(trainer, 'of="noise"')
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError('of="noise" needs whole gradients of each rank; with sharded parameters there are none')
