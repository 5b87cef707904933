"""Faults on purpose: what breaks a run, at a step and on ranks of one's choice."""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normzoo._errors import unknown_name
from normzoo.recognition import channel_dim, is_norm

POINTS = ("batch start", "before backward", "after backward", "before step", "batch end")


class InjectedFaultError(RuntimeError):
    """What the fault ``"exception"`` raises."""


@dataclass(frozen=True)
class Fault:
    """A fault: what it does in a sentence, and at which of the points it may happen, the first by default."""

    text: str
    points: tuple[str, ...]
    act: Callable[[FaultInjector, pl.Trainer, pl.LightningModule], Any]


class FaultInjector(pl.Callback):
    """Breaks a run on purpose: once, in the micro-batches of one optimizer step, on chosen ranks.

    For tests of what is to survive a fault, or to notice it. What a fault changes for a single step (the learning rate,
    a channel, the loss, the batch) is put back when the micro-batch ends; what it writes into weights and gradients
    stays.

    Args:
        fault: a name in ``FAULTS``.
        step: optimizer steps made before the step in which it happens.
        ranks: on which it happens; None for all.
        point: where in the micro-batch, one of ``POINTS``; None for the fault's own.
        parameter: name of the parameter whose first value is broken; None for the first trainable one.
        module: name of the module whose input loses a channel; None for the first normalization layer.

    Attributes:
        injected: how often the fault has happened on this rank.

    Raises:
        ValueError: for a fault or a point that there is not, a point at which the fault cannot happen, a step below 0;
            at setup for a parameter or module that there is not, and for ``"overflow"`` without 16-bit precision.

    Example:
        >>> from normzoo.testing import FaultInjector
        >>> FaultInjector("loss_nan", step=10, ranks=[0]).fault
        'loss_nan'
    """

    def __init__(
        self,
        fault: str,
        *,
        step: int,
        ranks: Collection[int] | None = None,
        point: str | None = None,
        parameter: str | None = None,
        module: str | None = None,
    ) -> None:
        if fault not in FAULTS:
            raise ValueError(unknown_name("fault", fault, FAULTS))
        if point is not None and point not in POINTS:
            raise ValueError(unknown_name("point", point, POINTS))
        if point is not None and point not in FAULTS[fault].points:
            raise ValueError(
                f"the fault {fault} happens at {' or '.join(map(repr, FAULTS[fault].points))}, not at {point!r}"
            )
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be a whole number of at least 0, not {step!r}")
        self.fault, self.step, self.point = fault, step, point or FAULTS[fault].points[0]
        self.ranks = None if ranks is None else frozenset(ranks)
        self.parameter_name, self.module_name = parameter, module
        self.injected = 0
        self._undo: list[Callable[[], Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot happen in this run."""
        if stage != "fit":
            return
        if self.fault == "overflow" and not str(trainer.precision).startswith("16"):
            raise ValueError(
                f"the fault overflow needs precision='16-mixed' or '16-true', and it is {trainer.precision!r}"
            )
        if self.parameter_name is not None:
            self.parameter(pl_module)
        if self.module_name is not None:
            self.module(pl_module)

    def parameter(self, pl_module: nn.Module) -> nn.Parameter:
        """The parameter that is broken."""
        found = {name: p for name, p in pl_module.named_parameters() if p.requires_grad and p.numel()}
        name = self.parameter_name or next(iter(found), "")
        if name not in found:
            raise ValueError(unknown_name("trainable parameter", name, found))
        return found[name]

    def module(self, pl_module: nn.Module) -> nn.Module:
        """The module whose input loses a channel."""
        found = dict(pl_module.named_modules())
        name = self.module_name or next((name for name, m in found.items() if is_norm(m)), "")
        if not name or name not in found:
            raise ValueError(unknown_name("module", name, found))
        return found[name]

    def until_the_batch_ends(self, undo: Callable[[], Any]) -> None:
        """Have something undone when the micro-batch ends."""
        self._undo.append(undo)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The micro-batch begins."""
        self._put_back()  # after one that was skipped
        self._at("batch start", trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The backward pass begins."""
        self._at("before backward", trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The backward pass has ended."""
        self._at("after backward", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """The optimizer is about to make its step."""
        self._at("before step", trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The micro-batch has ended; the steps that it brought have been made."""
        self._put_back()
        self._at("batch end", trainer, pl_module, made=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training has ended."""
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Training was cut short."""
        self._put_back()

    def _at(self, point: str, trainer: pl.Trainer, pl_module: pl.LightningModule, made: int = 0) -> None:
        here = self.ranks is None or trainer.global_rank in self.ranks
        if point == self.point and trainer.global_step - made == self.step and here:
            self.injected += 1
            FAULTS[self.fault].act(self, trainer, pl_module)

    def _put_back(self) -> None:
        while self._undo:
            self._undo.pop()()


Act = Callable[[FaultInjector, pl.Trainer, pl.LightningModule], Any]
_LOSS, _BATCH, _GRADIENT = POINTS[:1], POINTS[:1], ("after backward", "before step")
_RATE = 1000.0
_SCALE = 1e6


def _first_value(x: Tensor, value: float) -> Tensor:
    """A copy with another first value."""
    broken = x.detach().clone() if not x.requires_grad else x.clone()
    broken.reshape(-1)[:1] = value
    return broken


def _own_values(x: Tensor) -> Tensor:
    """The values of a tensor, of a DTensor those of this rank, in one dimension; autograd does not see them change."""
    x = x.data
    return (x.to_local() if hasattr(x, "to_local") else x).view(-1)


def _change_step(
    of_batch: Callable[[Tensor], Tensor] | None = None, of_loss: Callable[[Tensor], Tensor] | None = None
) -> Act:
    """Change the floating-point tensors of the batch that ``training_step`` is given, or the loss that it returns."""

    def act(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        original: Any
        original, own = module.training_step, vars(module).get("training_step")

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if of_batch is not None:
                change = of_batch
                batch = tree_map_only(Tensor, lambda x: change(x) if x.is_floating_point() else x, batch)
            output = original(batch, *args, **kwargs)
            if of_loss is None:
                return output
            return {**output, "loss": of_loss(output["loss"])} if isinstance(output, Mapping) else of_loss(output)

        vars(module)["training_step"] = training_step

        def undo() -> None:
            vars(module).pop("training_step", None)
            if own is not None:
                vars(module)["training_step"] = own

        injector.until_the_batch_ends(undo)

    return act


def _break_gradient(value: float) -> Act:
    def act(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        gradient = injector.parameter(module).grad
        if gradient is not None:
            _own_values(gradient)[:1] = value

    return act


def _break_weight(value: float) -> Act:
    def act(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        _own_values(injector.parameter(module))[:1] = value

    return act


def _flip_bit(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    p = _own_values(injector.parameter(module))[:1]
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = p.view(kinds[p.element_size()])
    bits ^= 1 << (8 * p.element_size() - 2)


def _raise_rate(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            before = group["lr"]
            group["lr"] = before * _RATE

            def undo(group: dict[str, Any] = group, before: Any = before) -> None:
                # A schedule that multiplies the rate may have moved it meanwhile
                group["lr"] = before if group["lr"] == before * _RATE else group["lr"] / _RATE

            injector.until_the_batch_ends(undo)


def _kill_channel(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    def hook(m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x.select(channel_dim(m, 1), 0).zero_()
        return (x, *args[1:])

    injector.until_the_batch_ends(injector.module(module).register_forward_pre_hook(hook).remove)


def _raise(injector: FaultInjector, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise InjectedFaultError(f"the fault that was asked for, at {injector.point} of step {injector.step}")


def _signal(number: int) -> Act:
    return lambda injector, trainer, module: os.kill(os.getpid(), number)


FAULTS: dict[str, Fault] = {
    "loss_nan": Fault(
        "The loss is NaN, and so are all gradients.", _LOSS, _change_step(of_loss=lambda x: x * math.nan)
    ),
    "loss_inf": Fault("The loss is infinite.", _LOSS, _change_step(of_loss=lambda x: x + math.inf)),
    "batch_nan": Fault(
        "The first value of each floating-point tensor of the batch is NaN.",
        _BATCH,
        _change_step(of_batch=lambda x: _first_value(x, math.nan)),
    ),
    "batch_inf": Fault(
        "The first value of each floating-point tensor of the batch is infinite.",
        _BATCH,
        _change_step(of_batch=lambda x: _first_value(x, math.inf)),
    ),
    "batch_scale": Fault(
        "All floating-point values of the batch are 10^6 times as large.",
        _BATCH,
        _change_step(of_batch=lambda x: x * _SCALE),
    ),
    "gradient_nan": Fault("The first value of a gradient on this rank is NaN.", _GRADIENT, _break_gradient(math.nan)),
    "gradient_inf": Fault(
        "The first value of a gradient on this rank is infinite.", _GRADIENT, _break_gradient(math.inf)
    ),
    "weight_nan": Fault("The first value of a parameter on this rank becomes NaN.", POINTS, _break_weight(math.nan)),
    "weight_inf": Fault(
        "The first value of a parameter on this rank becomes infinite.", POINTS, _break_weight(math.inf)
    ),
    "weight_bit": Fault("The highest bit of the exponent of a parameter's first value is flipped.", POINTS, _flip_bit),
    "learning_rate": Fault("The learning rate is 1000 times as large for one step.", POINTS[:4], _raise_rate),
    "dead_channel": Fault(
        "The first channel that a normalization layer is given is 0, so that its variance is.",
        POINTS[:1],
        _kill_channel,
    ),
    "overflow": Fault(
        "The loss is 10^6 times as large, so that gradients overflow in float16.",
        _LOSS,
        _change_step(of_loss=lambda x: x * _SCALE),
    ),
    "exception": Fault("An InjectedFaultError is raised.", POINTS, _raise),
    "sigterm": Fault("The process gets SIGTERM.", POINTS, _signal(signal.SIGTERM)),
    "sigkill": Fault("The process is killed, without a chance to do anything.", POINTS, _signal(signal.SIGKILL)),
}
