"""The callbacks' measurements in a training loop that is not Lightning's."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from normzoo.callbacks._plain_loop import OnCall, PlainModule, PlainTrainer, as_loggers
from normzoo.callbacks._record import new_folder, of_rank_zero
from normzoo.callbacks._recording import RecordingCallback, checked_dirpath
from normzoo.callbacks._taps import find_modules, runs_step_hooks, scripted_modules
from normzoo.callbacks.channel_moments import ChannelMoments
from normzoo.callbacks.divergence import Divergence
from normzoo.callbacks.gradient_noise import GradientNoise
from normzoo.callbacks.gradient_tails import GradientTails
from normzoo.callbacks.relative_loss import RelativeLoss

_SERVED = (GradientTails, ChannelMoments, Divergence, RelativeLoss)


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *callbacks: RecordingCallback,
    dirpath: str | Path | None = None,
    logger: Any = None,
    start_step: int = 0,
) -> Watch:
    """Measure a plain PyTorch training loop with the callbacks, for as long as the ``with`` block lasts.

    The measurements are those of the callbacks under a Trainer, and perturb as little: nothing. They are taken in the
    optimizer's own step hooks, so ``optimizer.step()`` is a step, one that a GradScaler skips is none, and the gradient
    is what the optimizer is about to use: reduced and unscaled, and after the loop's own clipping.

    Under DistributedDataParallel, and ``fully_shard`` as far as the callbacks support it, the process group is made
    before, all ranks enter, and rank zero writes.

    Of several optimizers each step counts, and ``RelativeLoss`` and ``GradientTails`` sample those of each by its own
    count. What the loop tells by :meth:`Watch.loss` and :meth:`Watch.batch` holds for one step of each optimizer.

    Args:
        model: what the loop calls; may be wrapped in DistributedDataParallel or compiled.
        optimizer: whose steps count; or several.
        callbacks: any of ``GradientTails``, ``ChannelMoments``, ``Divergence`` (the loop tells :meth:`Watch.loss`) and
            ``RelativeLoss(loss=...)`` (the loop tells :meth:`Watch.batch`); by default ``GradientTails()``, and
            ``ChannelMoments()`` if the model has normalization layers that it can follow.
        dirpath: folder of the records, for ``normzoo.load_run``; a callback's own ``dirpath`` goes before it. By
            default a new one, ``normzoo_logs/version_N``, which :attr:`Watch.dirpath` tells.
        logger: also sends scalars to it: anything with ``log_metrics(metrics, step)``, such as Lightning's loggers, or
            a ``SummaryWriter``, or several of these.
        start_step: optimizer steps already made by a loop that is continued.

    Returns:
        what ``with`` is to enter; entered again, it goes on at the step where it was left.

    Raises:
        TypeError: if ``model``, ``optimizer``, ``logger``, ``dirpath`` or a callback is not what it has to be.
        ValueError: for callbacks that need more than a plain loop tells, a model sharded in other ways, an
            optimizer without parameters of the model or without step hooks, a ``dirpath`` where no folder can be made,
            or a ``start_step`` below 0. On entering, for what a callback refuses at setup. At a step, for what the loop
            should have told and has not, for ``optimizer.step(closure)``, and for gradients that the optimizer unscales
            by itself.

    Example:
        >>> import tempfile, torch, normzoo
        >>> from normzoo.callbacks import GradientTails
        >>> model, folder = torch.nn.Linear(3, 1), tempfile.mkdtemp()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with normzoo.watch(model, optimizer, GradientTails(every_n_steps=2), dirpath=folder) as watching:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 3)).square().mean().backward()
        ...         optimizer.step()
        >>> watching.step, normzoo.load_run(folder)["gradient_tails"]["step"].unique().tolist()
        (3, [0, 2])
    """
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    _check_model_and_optimizers(model, optimizers)
    if not isinstance(start_step, int) or isinstance(start_step, bool) or start_step < 0:
        raise ValueError(f"start_step must be a whole number of at least 0, not {start_step!r}")
    module = PlainModule(model)
    ours = {id(p) for p in module.model.parameters()}
    if not all(any(id(p) in ours for group in o.param_groups for p in group["params"]) for o in optimizers):
        raise ValueError(
            "the optimizer has no parameter of the model; make it from model.parameters(), after conversions that "
            "replace layers"
        )
    checked_dirpath(dirpath)
    chosen = list(callbacks) or _default(module)
    for callback in chosen:
        _check_callback(callback)
        if isinstance(callback, ChannelMoments) and module.in_place:
            raise ValueError(
                "ChannelMoments cannot notice calls of a model that was compiled in place, by model.compile(); make "
                "another with torch.compile(model), give that to watch, and call it"
            )
    if len(set(map(id, chosen))) < len(chosen):
        raise ValueError("a callback was given twice; give another instance, with a dirpath of its own")
    folder = _default_folder(module) if dirpath is None else Path(dirpath)
    return Watch(PlainTrainer(module, optimizers, chosen, as_loggers(logger), folder, start_step))


class Watch:
    """A plain loop that is watched; :func:`watch` makes it, and ``with`` enters it."""

    def __init__(self, trainer: PlainTrainer) -> None:
        self._trainer = trainer
        self._module, self._callbacks = trainer.lightning_module, trainer.callbacks
        self._handles: list[Any] = []
        self._entered = self._in_callback = self._stop = False
        self._called = False
        # The optimizers that have made no step since
        self._loss_told: set[Optimizer] = set()
        self._batch_told: set[Optimizer] = set()

    @property
    def step(self) -> int:
        """Optimizer steps made so far, of all optimizers."""
        return self._trainer.global_step

    @property
    def dirpath(self) -> Path:
        """The folder of the records, in a job of several ranks that of rank zero's."""
        return self._trainer.records_folder

    @property
    def should_stop(self) -> bool:
        """Whether a ``Divergence(stop=True)`` asks the loop to end.

        It changes in :meth:`loss`, one step after the loss that diverged, and on all ranks at the same step.
        """
        return self._stop

    def loss(self, loss: Tensor | float) -> None:
        """Tell the loss of the mini-batch, not divided for accumulation; ``Divergence`` judges it a call later.

        Under DistributedDataParallel every rank tells as often as the others: here they compare.

        Raises:
            RuntimeError: outside of the ``with`` block.
            ValueError: for a tensor of more or less than one value.
        """
        self._check_entered("loss")
        value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss))
        if value.numel() != 1:
            raise ValueError(f"watching.loss takes the loss of the mini-batch, one value, not {tuple(value.shape)}")
        self._loss_told = set(self._trainer.optimizers)
        outputs = {"loss": value.detach().to(self._module.device)}
        for callback in self._of(Divergence):
            callback.on_train_batch_start(self._trainer, self._module, None, self.step)
            callback.on_train_batch_end(self._trainer, self._module, outputs, None, self.step)
        # Only here: a checkpoint may make rank zero judge earlier than the others
        self._stop = self._trainer.should_stop

    def batch(self, batch: Any) -> None:
        """Tell the mini-batch being trained on, as the ``loss`` of ``RelativeLoss`` is to get it, before its step.

        Raises:
            RuntimeError: outside of the ``with`` block.
        """
        self._check_entered("batch")
        self._batch_told = set(self._trainer.optimizers)
        for callback in self._of(RelativeLoss):
            callback.on_train_batch_start(self._trainer, self._module, batch, self.step)

    def state_dict(self) -> dict[str, Any]:
        """What a loop that is continued needs: the step, and the callbacks' states. Writes what is on its way.

        Plain numbers and strings; one rank may ask alone.
        """
        for callback in self._callbacks:
            callback.flush(self._trainer)
        return {"step": self.step, "callbacks": [[type(c).__name__, c.state_dict()] for c in self._callbacks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; before entering.

        Raises:
            RuntimeError: inside of the ``with`` block, where the record has been opened at another step.
            ValueError: if the state is of other callbacks.
        """
        if self._entered:
            raise RuntimeError("load the state before entering the with block")
        saved, ours = [name for name, _ in state_dict["callbacks"]], [type(c).__name__ for c in self._callbacks]
        if saved != ours:
            raise ValueError(f"the state is of the callbacks {', '.join(saved)}; here are {', '.join(ours)}")
        self._trainer.global_step = state_dict["step"]
        for callback, (_, state) in zip(self._callbacks, state_dict["callbacks"], strict=True):
            if state:
                callback.load_state_dict(state)

    def __enter__(self) -> Watch:
        if self._entered:
            raise RuntimeError("this watch has been entered already; leave its with block first")
        self._trainer.should_stop = self._stop = False
        self._in_callback = self._called = False
        self._loss_told, self._batch_told = set(), set()
        for callback in self._callbacks:
            callback.setup(self._trainer, self._module, "fit")
        for callback in self._callbacks:
            callback.on_train_start(self._trainer, self._module)
        self._entered = True
        self._handles = [
            *(optimizer.register_step_pre_hook(self._before_step) for optimizer in self._trainer.optimizers),
            # Of all optimizers, so that it comes after what a callback hangs on a step of this one
            register_optimizer_step_post_hook(self._after_step),
        ]
        if self._of(ChannelMoments):
            called, call = self._module.given, OnCall(self._on_call)
            # Before the user's own, if a pass of ours runs those as well
            first = called is self._module.model
            self._handles.append(called.register_forward_pre_hook(call, with_kwargs=True, prepend=first))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._entered = [], False
        if error is None:
            self._leave()
        else:
            self._abandon(error)
        if self._trainer.is_global_zero:
            for save in (getattr(logger, "save", None) for logger in self._trainer.loggers):
                if save is not None:
                    save()

    def _leave(self) -> None:
        for callback in self._callbacks:
            callback.on_train_epoch_end(self._trainer, self._module)  # removes hooks that wait for a step
        for callback in self._callbacks:
            callback.on_train_end(self._trainer, self._module)
        self._stop = self._trainer.should_stop

    def _abandon(self, error: BaseException) -> None:
        for callback in self._callbacks:
            callback.on_exception(self._trainer, self._module, error)
        if self._trainer.world_size > 1:
            return  # what other ranks have to take part in may never come
        for callback in self._callbacks:
            with contextlib.suppress(Exception):  # the loop's own error is the one to see
                callback.flush(self._trainer)

    def _on_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A micro-batch begins: the model is called to be trained, neither to be validated nor by a callback."""
        if not self._module.training or not torch.is_grad_enabled() or self._in_callback:
            return
        self._called = self._in_callback = True
        try:
            for callback in self._of(ChannelMoments):
                callback.on_train_batch_start(self._trainer, self._module, (args, kwargs), self.step)
        finally:
            self._in_callback = False

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_step(optimizer, (*args[1:], *kwargs.values()))
        self._in_callback = True
        for callback in self._callbacks:
            # The model itself, which RelativeLoss hands on to the user's function
            callback.on_before_optimizer_step(self._trainer, self._module.model, optimizer)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer not in self._trainer.optimizers:
            return
        step = self.step
        self._trainer.global_step += 1
        self._in_callback = False
        self._loss_told.discard(optimizer)
        self._batch_told.discard(optimizer)
        for callback in self._callbacks:
            # That of Divergence ended with its loss; other optimizers may still make a step on that of RelativeLoss
            if not isinstance(callback, Divergence) and not (isinstance(callback, RelativeLoss) and self._batch_told):
                callback.on_train_batch_end(self._trainer, self._module, None, None, step)

    def _check_step(self, optimizer: Optimizer, given: tuple[Any, ...]) -> None:
        """Refuse a step that would be measured wrongly, before it changes anything."""
        if any(callable(value) for value in given):
            raise ValueError(
                "optimizer.step(closure) computes its gradient only after it could be measured; compute it before and "
                "call optimizer.step() without a closure (LBFGS, which needs one, cannot be watched)"
            )
        scaled = getattr(optimizer, "grad_scale", None) is not None or any(hasattr(v, "unscale_") for v in given)
        if scaled and self._of(GradientTails, RelativeLoss):
            raise ValueError(
                f"{type(optimizer).__name__} unscales gradients inside of its step, too late to be measured; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if self._of(Divergence) and optimizer not in self._loss_told:
            raise ValueError(
                "Divergence judges the loss, and none was told; call watching.loss(loss) before each optimizer.step()"
            )
        due = any(callback.is_due(self._trainer, optimizer) for callback in self._of(RelativeLoss))
        if due and optimizer not in self._batch_told:
            raise ValueError(
                "RelativeLoss evaluates the mini-batch, and none was told; call watching.batch(batch) before each "
                "optimizer.step()"
            )
        if self._of(ChannelMoments) and not self._called:
            raise ValueError(
                "ChannelMoments follows calls of the model in training mode, and there was none before the first step; "
                "call the model that was given to watch, model(x) and not a method of it, after model.train()"
            )

    def _of(self, *kinds: type[RecordingCallback]) -> list[Any]:
        return [callback for callback in self._callbacks if isinstance(callback, kinds)]

    def _check_entered(self, name: str) -> None:
        if not self._entered:
            raise RuntimeError(f"watching.{name}(...) is for inside of the with block of normzoo.watch")


def _default_folder(module: PlainModule) -> Path:
    """A new folder, the same on all ranks."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    folder = of_rank_zero(new_folder(Path("normzoo_logs")) if first else None, module.device)
    assert folder is not None
    return folder


def _default(module: PlainModule) -> list[RecordingCallback]:
    norms: Any = find_modules(module, "norms").values()  # type: ignore[arg-type]
    scripted = scripted_modules(module)  # type: ignore[arg-type]
    heard = norms and not module.sharded and not module.in_place and not any(norm in scripted for norm in norms)
    moments = [ChannelMoments()] if heard else []
    return [GradientTails(), *moments]


def _check_model_and_optimizers(model: Any, optimizers: list[Any]) -> None:
    if isinstance(model, Optimizer) and isinstance(optimizers[0], nn.Module):
        raise TypeError("watch takes the model first, then the optimizer; swap them")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_what(model)}")
    if not optimizers or len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError("optimizer must be an optimizer, or several different ones in a list")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {_what(optimizer)}")
        if not runs_step_hooks(optimizer):
            raise ValueError(f"{type(optimizer).__name__} runs no step hooks; give the optimizer that it wraps")


def _check_callback(callback: Any) -> None:
    accepted = ", ".join(c.__name__ for c in _SERVED)
    if isinstance(callback, GradientNoise):
        raise ValueError(
            "GradientNoise needs to know each backward pass and how its loss was divided, which a plain loop does not "
            f"tell; watch takes {accepted}, and GradientNoise is for Lightning's Trainer"
        )
    if not isinstance(callback, _SERVED):
        raise TypeError(f"watch takes callbacks one by one, of {accepted}, not {_what(callback)}")
    if isinstance(callback, GradientTails) and "noise" in callback.of:
        raise ValueError(
            'GradientTails(of="noise") needs to know each backward pass, which a plain loop does not tell; leave it '
            "out, or use Lightning's Trainer"
        )
    if isinstance(callback, RelativeLoss) and callback.loss is None:
        raise ValueError(
            "RelativeLoss has no training_step to evaluate in a plain loop; pass loss=, a function of (model, batch), "
            "and call watching.batch(batch) before each optimizer.step()"
        )


def _what(given: Any) -> str:
    """What a wrong argument is, in an error."""
    return f"the class {given.__name__}; make an instance" if isinstance(given, type) else f"a {type(given).__name__}"
