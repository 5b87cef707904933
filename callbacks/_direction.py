"""The step of an optimizer along which the loss is followed: its learning rate times the gradient, or its update."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._recording import RecordingCallback
from normzoo.callbacks._taps import grad_scaler, gradients_in_use, overrides

# Hooks of a module that may change the gradient, or the step, after it is measured
_CHANGING = ("configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step")


def direction(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> str:
    """``"gradient"`` where that is known to be all there is of the update, else ``"update"``.

    It is known for ``torch.optim.SGD`` itself, without momentum, weight decay and ``maximize``, where nothing comes
    between gradient and step: clipping by the Trainer, a GradScaler, hooks of the module, or other callbacks' hooks.
    """
    changed = bool(getattr(trainer, "gradient_clip_val", None)) or grad_scaler(trainer) is not None
    changed |= any(overrides(pl_module, hook) for hook in _CHANGING)
    callbacks = (c for c in trainer.callbacks if not isinstance(c, RecordingCallback))  # type: ignore[attr-defined]
    changed |= any(overrides(callback, "on_before_optimizer_step") for callback in callbacks)
    options = ("momentum", "weight_decay", "maximize")
    plain = type(optimizer) is torch.optim.SGD and not any(g[name] for g in optimizer.param_groups for name in options)
    return "gradient" if plain and not changed else "update"


def gradient_step(trainer: Trainer, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters with a gradient, and the learning rate of their group times it."""
    params, steps = [], []
    for group in optimizer.param_groups:
        found = gradients_in_use(trainer, optimizer, enumerate(group["params"]))
        params += [group["params"][i] for i in found]
        steps += [g * group["lr"] for g in found.values()]
    return params, steps
