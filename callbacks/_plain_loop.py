"""What the callbacks ask of a Trainer and a LightningModule, for a loop of the user's own that has neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from normzoo.callbacks._taps import is_sharded

_SHARDED = {"FullyShardedDataParallel", "DeepSpeedEngine"}  # by name, so that no package has to be imported


class SingleDeviceStrategy:
    """Named as Lightning's: a rank holds all there is."""


class DDPStrategy:
    """Named as Lightning's: every rank holds whole parameters, and whole gradients reduced over ranks."""


class ModelParallelStrategy:
    """Named as Lightning's: parameters and gradients are DTensors, of which every rank holds a part."""


class PlainModule:
    """A model with what a LightningModule has beside it; all else is the model's.

    Args:
        model: as the user gave it, and calls it: :attr:`given`; :attr:`model` is what DistributedDataParallel and
            ``torch.compile`` wrap in it.

    Raises:
        ValueError: if a rank holds neither whole parameters nor DTensors of them.
    """

    automatic_optimization = True

    def __init__(self, model: nn.Module) -> None:
        self.given = model
        self._compiler_ctx: dict[str, Any] | None = None  # Lightning's mark of what it has unwrapped
        while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
            if isinstance(model, DistributedDataParallel):
                model = model.module
            else:
                model, self._compiler_ctx = model._orig_mod, {"compiler": "dynamo"}  # type: ignore[assignment]
        self.model = model
        for module in model.modules():
            names = {c.__name__ for c in type(module).__mro__}
            if "DataParallel" in names:
                raise ValueError("watch cannot follow the replicas of nn.DataParallel; use DistributedDataParallel")
            if names & _SHARDED:
                raise ValueError(
                    "watch supports one device, DistributedDataParallel and fully_shard; under "
                    f"{type(module).__name__} a rank does not hold its gradients as such"
                )
        self.in_place = getattr(self.given, "_compiled_call_impl", None) is not None  # by model.compile()
        self.sharded = any(map(is_sharded, model.parameters()))

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.model.parameters()).device

    def training_step(self, batch: tuple[tuple[Any, ...], dict[str, Any]], batch_idx: int) -> Any:
        """A call of the model, whose arguments are the batch."""
        args, kwargs = batch
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


class PlainTrainer:
    """What the callbacks read of a Trainer, and the request to stop that they leave there.

    Args:
        module: the model.
        optimizers: whose steps count.
        callbacks: all that watch the loop.
        loggers: sinks of scalars.
        folder: where records go.
        step: optimizer steps made so far.
    """

    accumulate_grad_batches = 1  # losses are told as they are
    fast_dev_run = False

    def __init__(
        self,
        module: PlainModule,
        optimizers: list[Optimizer],
        callbacks: list[Any],
        loggers: list[Any],
        folder: str | Path,
        step: int,
    ) -> None:
        self.lightning_module, self.optimizers = module, optimizers
        self.callbacks, self.loggers = callbacks, loggers
        self.records_folder, self.global_step = Path(folder), step
        self.should_stop = False

    @property
    def world_size(self) -> int:
        """Ranks of the process group; 1 without one."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes."""
        return self.world_size == 1 or dist.get_rank() == 0

    @property
    def strategy(self) -> object:
        """How ranks share the work, told by the name of its class."""
        if self.lightning_module.sharded:
            return ModelParallelStrategy()
        return DDPStrategy() if self.world_size > 1 else SingleDeviceStrategy()

    @property
    def precision_plugin(self) -> PlainTrainer:
        """Itself: asked for :meth:`train_step_context` only."""
        return self

    def train_step_context(self) -> AbstractContextManager[None]:
        """Nothing: autocast is the user's."""
        return nullcontext()


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


class OnCall:
    """Calls a function before each call of a module, though not of copies of it, such as an average of the weights."""

    def __init__(self, function: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnCall, (_nothing,)


def _nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a copy of a module calls."""
