"""The driver on a plain PyTorch loop: its step hooks and what it tells as the events of measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from normzoo.callbacks._run.facts import NEEDS, Run, rank_and_ranks
from normzoo.callbacks._run.gradients import GradientVersions, runs_step_hooks
from normzoo.callbacks._run.ranks import is_sharded
from normzoo.callbacks._run.record import checked_dirpath, new_folder, of_rank_zero
from normzoo.callbacks._run.tools import unsynchronized
from normzoo.callbacks.measurement import UNITS, Measurement

_SHARDED = {"FullyShardedDataParallel", "DeepSpeedEngine"}  # by name, so that no package has to be imported


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *measurements: Measurement,
    dirpath: str | Path | None = None,
    logger: Any = None,
    start_step: int = 0,
) -> Watch:
    """Measure a plain PyTorch training loop by measurements, for as long as the ``with`` block lasts.

    A measurement records in a plain loop what it records under a Trainer, and leaves the loop's weights, optimizer
    state and random streams bit for bit as they would be without it. Measurements are taken in the
    optimizer's own step hooks, so ``optimizer.step()`` is a step, one that a GradScaler skips is none, and the gradient
    is what the optimizer is about to use: reduced and unscaled, and after the loop's own clipping.

    Under DistributedDataParallel, and ``fully_shard`` as far as the callbacks support it, the process group is made
    before, all ranks enter, and rank zero writes.

    Of several optimizers each step counts, and ``RelativeLoss`` and ``GradientTails`` sample those of each by its own
    count. What the loop tells by :meth:`Watch.loss` and :meth:`Watch.batch` holds for one step of each optimizer.

    Args:
        model: what the loop calls; may be wrapped in DistributedDataParallel or compiled.
        optimizer: whose steps count; or several.
        *measurements: ours or your own, of what a plain loop tells: gradients, updates and activations; the loss by
            :meth:`Watch.loss` and the batch by :meth:`Watch.batch`. By default ``GradientNorm()``,
            ``GradientTails()``, and ``ChannelMoments()`` if the model has normalization layers that it can follow.
        dirpath: folder of the records, for ``normzoo.load_run``; a measurement's own ``dirpath`` goes before it. By
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
    run = LoopRun(model, optimizers, as_loggers(logger), start_step)
    own = {id(p) for p in run.module.parameters()}
    if not all(any(id(p) in own for group in o.param_groups for p in group["params"]) for o in optimizers):
        raise ValueError(
            "the optimizer has no parameter of the model; make it from model.parameters(), after conversions that "
            "replace layers"
        )
    for measurement in measurements:
        if not isinstance(measurement, Measurement):
            raise TypeError(f"watch takes measurements one by one, such as GradientTails(), not {_what(measurement)}")
        measurement.admit(run)
    if len(set(map(id, measurements))) < len(measurements):
        raise ValueError("a measurement was given twice; give another instance, with a dirpath of its own")
    run.measurements = list(measurements) or _by_default(run)
    run.dirpath = _new_folder(run) if checked_dirpath(dirpath) is None else Path(dirpath)  # type: ignore[arg-type]
    return Watch(run)


class LoopRun(Run):
    """A run of a plain loop: see :class:`normzoo.callbacks._run.facts.Run`.

    Args:
        model: as the user gave it, and calls it: :attr:`given`; :attr:`module` is what DistributedDataParallel and
            ``torch.compile`` wrap in it.
        optimizers: whose steps count.
        loggers: sinks of scalars.
        step: optimizer steps made so far.

    Raises:
        ValueError: if a rank holds neither whole parameters nor DTensors of them.
    """

    dirpath: Path
    at_exit: SystemExit | None = None  # raised when the with block is left

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], loggers: Sequence[Any], step: int) -> None:
        self.given, self.optimizers, self.step = model, optimizers, step
        self.compiled = self.should_stop = False
        while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
            if isinstance(model, DistributedDataParallel):
                model = model.module
            else:
                model, self.compiled = model._orig_mod, True  # type: ignore[assignment]
        self.module = model
        for module in model.modules():
            names = {c.__name__ for c in type(module).__mro__}
            if "DataParallel" in names:
                raise ValueError("watch cannot follow the replicas of nn.DataParallel; use DistributedDataParallel")
            if names & _SHARDED:
                raise ValueError(
                    "watch supports one device, DistributedDataParallel and fully_shard; under "
                    f"{type(module).__name__} a rank does not hold its gradients as such"
                )
        sharded = any(map(is_sharded, model.parameters()))
        self.layout, self.strategy = ("sharded", "fully_shard") if sharded else ("whole", "DistributedDataParallel")
        in_place = getattr(self.given, "_compiled_call_impl", None) is not None  # by model.compile()
        self.tells = frozenset(NEEDS) - {"backward"} - ({"activations"} if in_place else set())
        self.writes = rank_and_ranks()[0] == 0
        self.loggers = loggers if self.writes else []
        self.measurements: list[Measurement] = []

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the first parameter is."""
        return next(self.module.parameters()).device

    def folder(self, dirpath: str | None = None) -> Path:
        """``dirpath``, or the folder of all records."""
        return Path(dirpath) if dirpath else self.dirpath

    def untold(self, need: str) -> str:
        """Why a plain loop cannot tell something."""
        if need == "activations":
            return (
                "calls of a model that was compiled in place, by model.compile(), cannot be noticed; make another with "
                "torch.compile(model), give that to watch, and call it"
            )
        return "a plain loop does not tell them, or how their losses were divided; measure under Lightning's Trainer"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Raise a ValueError, as a plain loop has no ``training_step``."""
        self.check_training_step("the measurement", "call run.module, or refuse a plain loop in check(run)")

    def check_training_step(self, who: str, instead: str) -> None:
        """Raise a ValueError, as a plain loop has no ``training_step``."""
        raise ValueError(
            f"{who} has no training_step to evaluate in a plain loop; {instead}, and call watching.batch(batch) before "
            "each optimizer.step()"
        )

    def forward(self, batch: tuple[tuple[Any, ...], dict[str, Any]], batch_idx: int) -> Any:
        """A call of the model, whose arguments are the batch."""
        args, kwargs = batch
        return self.module(*args, **kwargs)

    def check_forward(self, who: str, instead: str) -> None:
        """The model can be called once more."""

    def precision(self) -> AbstractContextManager[Any]:
        """Nothing: autocast is the user's."""
        return nullcontext()

    def aside(self) -> AbstractContextManager[Any]:
        """Nothing: the model knows neither loggers nor the loop."""
        return nullcontext()

    def before_update(self, applies: Callable[[Optimizer], None]) -> list[Any]:
        """None: the watch tells, from the hook in which a step is measured as well."""
        return []

    def why_not_again(self) -> str:
        """Why steps cannot be made again."""
        return "the code of a plain loop's step is not known to normzoo"

    def stop(self) -> None:
        """Ask the loop to end."""
        self.should_stop = True

    def save_checkpoint(self, path: Path) -> None:
        """The states of model and optimizers and the step, written by rank zero."""
        if self.writes:
            states = {"model": self.module.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
            torch.save({**states, "step": self.step}, path)

    def exit(self, error: SystemExit) -> None:
        """Raise this when the ``with`` block is left."""
        self.at_exit = error


class Watch:
    """A plain loop that is watched; :func:`watch` makes it, and ``with`` enters it."""

    def __init__(self, run: LoopRun) -> None:
        self._run, self._measurements = run, run.measurements
        self._handles: list[Any] = []
        self._entered = self._measuring = self._stop = False
        self._called = self._entered_before = False
        # The gradients of the last step, of optimizers of which before_clipping is told
        self._stepped: dict[Optimizer, GradientVersions] = {}
        # The optimizers that have made no step since
        self._loss_told: set[Optimizer] = set()
        self._batch_told: set[Optimizer] = set()

    @property
    def step(self) -> int:
        """Optimizer steps made so far, of all optimizers."""
        return self._run.step

    @property
    def dirpath(self) -> Path:
        """The folder of the records, in a job of several ranks that of rank zero's."""
        return self._run.dirpath

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
        self._loss_told = set(self._run.optimizers)
        for measurement in self._needing("loss"):
            measurement.hold_loss(self._run, value.detach().to(self._run.device))
            if measurement.unit == "micro-batch":
                measurement.batch_ended(self._run, value.detach().to(self._run.device))
        # Only here: a checkpoint may make rank zero judge earlier than the others
        self._stop = self._run.should_stop

    def batch(self, batch: Any) -> None:
        """Tell the mini-batch being trained on, as the ``loss`` of ``RelativeLoss`` is to get it, before its step.

        Raises:
            RuntimeError: outside of the ``with`` block.
        """
        self._check_entered("batch")
        self._batch_told = set(self._run.optimizers)
        for measurement in self._measurements:
            measurement.batch_told(self._run, batch)

    def before_clipping(self, *optimizers: Optimizer) -> None:
        """Tell that the gradients of the next step are complete, unscaled and not yet clipped.

        For measurements that compare gradients before and after clipping, such as :class:`GradientNorm`; without this
        call both are the clipped ones. Called several times before a step, the last call counts.

        Args:
            *optimizers: those whose gradients are clipped next; may be left out if there is one.

        Raises:
            RuntimeError: outside of the ``with`` block.
            ValueError: for none of several optimizers, or others than those of :func:`watch`; and if there are no
                gradients yet, or only those of a step that has been made.
        """
        self._check_entered("before_clipping")
        own = self._run.optimizers
        if len(own) > 1 and not optimizers:
            raise ValueError(
                f"watching.before_clipping() was given none of {len(own)} optimizers; give the one whose step comes "
                "next, as in watching.before_clipping(optimizer)"
            )
        for optimizer in optimizers:
            if not any(optimizer is other for other in own):
                raise ValueError(
                    f"watching.before_clipping takes optimizers that were given to watch, not {_what(optimizer)}"
                )
        for optimizer in optimizers or own:
            params = _parameters(optimizer)
            if all(p.grad is None for p in params):
                raise ValueError(
                    "watching.before_clipping() was called while no parameter has a gradient; call it after "
                    "loss.backward(), and before clipping"
                )
            if optimizer in self._stepped and self._stepped[optimizer].are_those_of(params):
                raise ValueError(
                    "watching.before_clipping() was called when a step had been made with these gradients; call it "
                    "after loss.backward(), before clipping and optimizer.step()"
                )
            self._stepped.setdefault(optimizer, GradientVersions(()))
            for measurement in self._needing("applied"):
                measurement.gradients_complete(self._run, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What a loop that is continued needs: the step, and the measurements' states. Writes what is on its way.

        Plain numbers and strings; one rank may ask alone.
        """
        for measurement in self._measurements:
            measurement.flush_alone(self._run)
        return {"step": self.step, "callbacks": [[type(m).__name__, m.state_dict()] for m in self._measurements]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; before entering.

        Raises:
            RuntimeError: inside of the ``with`` block, where the record has been opened at another step.
            ValueError: if the state is of other measurements.
        """
        if self._entered:
            raise RuntimeError("load the state before entering the with block")
        saved, here = [name for name, _ in state_dict["callbacks"]], [type(m).__name__ for m in self._measurements]
        if saved != here:
            raise ValueError(f"the state is of the measurements {', '.join(saved)}; here are {', '.join(here)}")
        self._run.step = state_dict["step"]
        for measurement, (_, state) in zip(self._measurements, state_dict["callbacks"], strict=True):
            if state:
                measurement.load_state_dict(state)

    def __enter__(self) -> Watch:
        if self._entered:
            raise RuntimeError("this watch has been entered already; leave its with block first")
        self._run.should_stop = self._stop = False
        self._run.at_exit = None
        self._measuring = self._called = False
        self._loss_told, self._batch_told = set(), set()
        for sentence in unsynchronized(self._run.module, self._run.ranks):
            rank_zero_warn(sentence)
        for measurement in self._measurements:
            measurement.adopt(self._run, goes_on=self.step > 0)
            measurement.prepare(self._run)
        for measurement in self._measurements:
            measurement.begin(self._run)
        self._entered = True
        self._handles = [
            *(optimizer.register_step_pre_hook(self._before_step) for optimizer in self._run.optimizers),
            # Of all optimizers, so that it comes after what a measurement hangs on a step of this one
            register_optimizer_step_post_hook(self._after_step),
        ]
        if any(self._needing("activations")):
            called = self._run.given
            # Before the user's own, if an extra pass runs those as well
            first = called is self._run.module
            call = _OnCall(self._on_call)
            self._handles.append(called.register_forward_pre_hook(call, with_kwargs=True, prepend=first))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._entered = [], False
        if error is None:
            self._end()
        else:
            self._interrupt(error)
        for save in (getattr(logger, "save", None) for logger in self._run.loggers):
            if save is not None:
                save()
        if error is None and self._run.at_exit is not None:
            raise self._run.at_exit

    def _end(self) -> None:
        for measurement in self._measurements:
            measurement.epoch_ended(self._run)  # removes hooks that wait for a step
        try:
            for measurement in self._measurements:
                measurement.end(self._run)
        except BaseException as error:  # such as that of a divergence in the last step
            self._interrupt(error)
            raise
        self._stop = self._run.should_stop

    def _interrupt(self, error: BaseException) -> None:
        for measurement in self._measurements:
            measurement.interrupted(self._run, error)

    def _on_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A micro-batch begins: the model is called to be trained, neither to be validated nor by a measurement."""
        if not self._run.module.training or not torch.is_grad_enabled() or self._measuring:
            return
        self._called = self._measuring = True
        try:
            for measurement in self._needing("activations"):
                measurement.listen(self._run, (args, kwargs), self.step)
        finally:
            self._measuring = False

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_step(optimizer, (*args[1:], *kwargs.values()))
        self._measuring = True
        for measurement in self._measurements:
            measurement.step_begins(self._run, optimizer)
        for measurement in self._measurements:
            measurement.applies(optimizer)
        self._stop = self._run.should_stop

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer not in self._run.optimizers:
            return
        self._run.step += 1
        if optimizer in self._stepped:
            self._stepped[optimizer] = GradientVersions(_parameters(optimizer))
        self._measuring = False
        self._loss_told.discard(optimizer)
        self._batch_told.discard(optimizer)
        for measurement in self._measurements:
            # A micro-batch ended when its loss was told; with the same batch other optimizers may still make a step
            told = measurement.unit == "micro-batch" or ("batch" in measurement.needs and self._batch_told)
            if not told:
                measurement.batch_ended(self._run)

    def _check_step(self, optimizer: Optimizer, given: tuple[Any, ...]) -> None:
        """Refuse a step that would be measured wrongly, before it changes anything."""
        if any(callable(value) for value in given):
            raise ValueError(
                "optimizer.step(closure) computes its gradient only after it could be measured; compute it before and "
                "call optimizer.step() without a closure (LBFGS, which needs one, cannot be watched)"
            )
        scaled = getattr(optimizer, "grad_scale", None) is not None or any(hasattr(v, "unscale_") for v in given)
        if scaled and any(m.unit == "step" for m in self._measurements):
            raise ValueError(
                f"{type(optimizer).__name__} unscales gradients inside of its step, too late to be measured; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        index = self._run.optimizers.index(optimizer)
        for needed, told, call in (
            ("loss", self._loss_told, "watching.loss(loss)"),
            ("batch", self._batch_told, "watching.batch(batch)"),
        ):
            for measurement in self._needing(needed) if optimizer not in told else ():
                if measurement.is_due(self._run, index):
                    raise ValueError(
                        f"{type(measurement).__name__} needs {NEEDS[needed]}, and none was told; call {call} before "
                        "each optimizer.step()"
                    )
        for measurement in self._needing("activations") if not self._called else ():
            raise ValueError(
                f"{type(measurement).__name__} follows calls of the model in training mode, and there was none before "
                "the first step; call the model that was given to watch, model(x) and not a method of it, after "
                "model.train()"
            )

    def _needing(self, need: str) -> Iterator[Measurement]:
        return (measurement for measurement in self._measurements if need in measurement.needs)

    def _check_entered(self, name: str) -> None:
        if not self._entered:
            raise RuntimeError(f"watching.{name}(...) is for inside of the with block of normzoo.watch")


def _new_folder(run: LoopRun) -> Path:
    """A new folder, the same on all ranks."""
    folder = of_rank_zero(new_folder(Path("normzoo_logs")) if run.writes else None, run.device)
    assert folder is not None
    return folder


def default_measurements() -> dict[str, type[Measurement]]:
    """The measurements of the package that ``watch`` takes by default, by name."""
    from normzoo import callbacks

    classes: list[Any] = [callbacks.__dict__[name] for name in callbacks.__all__]
    chosen = [c for c in classes if getattr(c, "by_default", False)]
    return {c.name: c for c in sorted(chosen, key=lambda c: UNITS.index(c.unit))}


def _by_default(run: LoopRun) -> list[Measurement]:
    """The measurements that ``watch`` takes by default, without those that refuse the run."""
    chosen: list[Measurement] = []
    for measurement in (c() for c in default_measurements().values()):
        with contextlib.suppress(ValueError):
            measurement.admit(run)
            chosen.append(measurement)
    return chosen


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


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _what(given: Any) -> str:
    """What a wrong argument is, in an error."""
    return f"the class {given.__name__}; make an instance" if isinstance(given, type) else f"a {type(given).__name__}"


class _Scalars:
    """A ``SummaryWriter`` as a logger; histograms go to its ``experiment``, as to a ``TensorBoardLogger``'s."""

    def __init__(self, writer: Any) -> None:
        self.experiment, self.save = writer, writer.flush

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)


def as_loggers(logger: Any) -> list[Any]:
    """The loggers that an argument means: none, one, or several.

    Raises:
        TypeError: for what takes no scalars.
    """
    if logger is None:
        return []
    if hasattr(logger, "log_metrics"):
        return [logger]
    if hasattr(logger, "add_scalar"):
        return [_Scalars(logger)]
    if isinstance(logger, Iterable) and not isinstance(logger, str | bytes | Mapping):
        return [found for one in logger for found in as_loggers(one)]
    raise TypeError(
        f"logger must have log_metrics(metrics, step), as Lightning's loggers do, or be a SummaryWriter, or several of "
        f"these, not {logger!r}"
    )


class _OnCall:
    """Calls a function before each call of a module, though not of copies of it, such as an average of the weights."""

    def __init__(self, function: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OnCall, (_nothing,)


def _nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a copy of a module calls."""
