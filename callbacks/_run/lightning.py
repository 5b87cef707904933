"""The driver on Lightning's Trainer: its hooks as the events of measurements, and its facts as those of a run."""

from __future__ import annotations

import inspect
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from normzoo.callbacks._run.facts import NEEDS, Run
from normzoo.callbacks._run.gradients import runs_step_hooks
from normzoo.callbacks._run.isolation import loss_of
from normzoo.callbacks._run.lightning_steps import place_in_loop, steps_again
from normzoo.callbacks._run.modules import makes_modules_later, overrides
from normzoo.callbacks._run.record import new_folder, of_rank_zero
from normzoo.callbacks._run.settings import trainer_settings
from normzoo.callbacks._run.tools import ToolNotice

# By name, so that the classes of pytorch_lightning are recognized as well
_LAYOUTS = {"SingleDeviceStrategy": "whole", "DDPStrategy": "whole", "ModelParallelStrategy": "sharded"}
# Hooks of a module that may change the gradient, or the step, after it is measured
_CHANGING = ("clip_gradients", "configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step")
_NUMBERS = (Tensor, int, float)


class LightningRun(Run):
    """A run of a Trainer: see :class:`normzoo.callbacks._run.facts.Run`."""

    tells = frozenset(NEEDS)

    def __init__(self, trainer: Trainer, pl_module: LightningModule, in_setup: bool = False) -> None:
        self._trainer, self.module = trainer, pl_module
        self.complete = not (in_setup and makes_modules_later(pl_module))

    optimizers = property(attrgetter("_trainer.optimizers"))
    step = property(attrgetter("_trainer.global_step"))
    device = property(attrgetter("module.device"))
    ranks = property(attrgetter("_trainer.world_size"))
    automatic = property(attrgetter("module.automatic_optimization"))
    accumulation = property(attrgetter("_trainer.accumulate_grad_batches"))

    @property
    def strategy(self) -> str:  # type: ignore[override]
        """The name of the strategy's class."""
        return type(self._trainer.strategy).__name__

    @property
    def layout(self) -> str:  # type: ignore[override]
        """How ranks hold parameters and gradients, known by the strategy's classes."""
        names = (_LAYOUTS.get(c.__name__) for c in type(self._trainer.strategy).__mro__)
        return next(filter(None, names), "")

    @property
    def most_accumulation(self) -> int:  # type: ignore[override]
        """The largest number of micro-batches of a step, scheduled ones too."""
        schedulers = [c for c in self._callbacks if _is_a(c, "GradientAccumulationScheduler")]
        return max([self.accumulation, *(n for c in schedulers for n in c.scheduling.values())])

    @property
    def scaler(self) -> Any:
        """The GradScaler of the Trainer's precision."""
        return getattr(self._trainer.precision_plugin, "scaler", None)

    @property
    def schedulers(self) -> list[Any]:  # type: ignore[override]
        """The Trainer's, which it steps itself, or ``training_step`` by hand."""
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    @property
    def averages_locally(self) -> bool:  # type: ignore[override]
        """Whether it is local SGD, for which Lightning sets this attribute, and for nothing else."""
        return getattr(self._trainer.strategy, "_model_averaging_period", None) is not None

    @property
    def changes_steps(self) -> bool:  # type: ignore[override]
        """Whether clipping, a GradScaler, hooks of the module or other callbacks come between gradient and step."""
        others = (c for c in self._callbacks if not isinstance(c, LightningDriver))
        return (
            bool(getattr(self._trainer, "gradient_clip_val", None))
            or self.scaler is not None
            or any(overrides(self.module, hook) for hook in _CHANGING)
            or any(overrides(callback, "on_before_optimizer_step") for callback in others)
        )

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether what was passed to fit was compiled, which Lightning unwraps."""
        return getattr(self.module, "_compiler_ctx", None) is not None

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether this is rank zero; under ``fast_dev_run`` nothing is written, as Lightning logs nothing."""
        return self._trainer.is_global_zero and not self._trainer.fast_dev_run  # type: ignore[attr-defined]

    @property
    def loggers(self) -> list[Any]:  # type: ignore[override]
        """The Trainer's, on rank zero; none while they are stood in for."""
        loggers = self._trainer.loggers if self._trainer.is_global_zero else []
        return [logger for logger in loggers if not isinstance(logger, _Deaf)]

    @property
    def measurements(self) -> list[Any]:  # type: ignore[override]
        """Those among the Trainer's callbacks."""
        return [c for c in self._callbacks if isinstance(c, LightningDriver)]

    def folder(self, dirpath: str | None = None) -> Path | None:
        """``dirpath``, or the folder that the first logger made for the run; without such a logger a new one.

        That is ``normzoo_logs/version_N``, in the logger's ``save_dir`` or the trainer's ``default_root_dir``.
        """
        trainer: Any = self._trainer
        if trainer.fast_dev_run:
            return None
        if dirpath:
            return Path(dirpath)
        if (made := getattr(trainer, "records_folder", None)) is not None:
            return made
        log_dir = trainer.log_dir
        folder: Path | OSError | None = None
        if trainer.is_global_zero:
            own = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
            if isinstance(own, str | os.PathLike) and log_dir is not None and os.fspath(own) == log_dir:
                folder = Path(log_dir)
            else:
                try:
                    folder = new_folder(Path(log_dir or trainer.default_root_dir, "normzoo_logs"))
                except OSError as error:
                    folder = error
                else:
                    rank_zero_info(f"normzoo writes its records to {folder}")
        trainer.records_folder = of_rank_zero(folder, trainer.strategy.root_device)  # for others, and the next fit
        return trainer.records_folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """What ``training_step`` returns for a batch, at the precision of the run."""
        takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        with self.precision():
            return self.module.training_step(*(batch, batch_idx)[: 1 + takes_index])

    def check_training_step(self, who: str, instead: str) -> None:
        """Raise a ValueError unless ``training_step`` can be evaluated once more."""
        if not self.automatic:
            raise ValueError(
                f"{who} evaluates training_step, which under manual optimization takes optimizer steps of its own; "
                f"{instead}"
            )
        if "dataloader_iter" in inspect.signature(self.module.training_step).parameters:
            raise ValueError(
                f"{who} evaluates training_step, and cannot know the batch of one that draws it from dataloader_iter; "
                f"{instead}"
            )

    def precision(self) -> AbstractContextManager[Any]:
        """The precision plugin's context of a training step."""
        return self._trainer.precision_plugin.train_step_context()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The loggers take no notice, and a request to stop is forgotten."""
        trainer = self._trainer
        loggers, should_stop = trainer.loggers, trainer.should_stop
        trainer.loggers = [_Deaf(logger) for logger in loggers]
        try:
            yield
        finally:
            trainer.loggers, trainer.should_stop = loggers, should_stop

    def before_update(self, applies: Callable[[Optimizer], None]) -> list[Any]:
        """Hooks of the optimizers; a closure, in which Lightning computes and clips gradients, is evaluated first."""

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if not callable(closure):
                applies(optimizer)
                return None

            def evaluated() -> Any:
                loss = closure()
                applies(optimizer)
                return loss

            if "closure" in kwargs:
                return args, {**kwargs, "closure": evaluated}
            return (args[0], evaluated, *args[2:]), kwargs

        return [o.register_step_pre_hook(hook) for o in self.optimizers if runs_step_hooks(o)]

    def stop(self) -> None:
        """End training after this step."""
        self._trainer.should_stop = True

    def save_checkpoint(self, path: Path) -> None:
        """A checkpoint of the Trainer."""
        self._trainer.save_checkpoint(path)

    def exit(self, error: SystemExit) -> None:
        """Raise this once the fit has ended, when the last of the callbacks is torn down."""
        self._callbacks.append(_Exit(error))

    def place(self, batch_idx: int) -> dict[str, Any]:
        """Where in the run a micro-batch stands."""
        return place_in_loop(self._trainer, batch_idx)

    def state(self) -> dict[str, Any]:
        """The state of scaler, schedulers, loops, loaders, callbacks, metrics and averages, and what was logged."""
        trainer = self._trainer
        logged: Any = getattr(trainer.fit_loop.epoch_loop, "_results", {})  # not in Lightning's checkpoints either
        return {
            "scaler": {k: v for k, v in getattr(self.scaler, "__dict__", {}).items() if isinstance(v, _NUMBERS)},
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "loops": trainer.fit_loop.state_dict(),
            "logged": {key: result.metric_state for key, result in logged.items() if isinstance(result, Metric)},
            "callbacks": {c.state_key: c.state_dict() for c in self._callbacks},
            "metrics": {n: m.metric_state for n, m in self.module.named_modules() if isinstance(m, Metric)},
            "averages": {
                f"{callback.state_key}.{name}": value.state_dict()
                for callback in self._callbacks
                for name, value in vars(callback).items()
                if isinstance(value, nn.Module)
            },
        }

    def settings(self) -> dict[str, Any]:
        """What the Trainer was given."""
        return trainer_settings(self._trainer)

    def why_not_again(self) -> str:
        """Why steps cannot be made again."""
        if "dataloader_iter" in inspect.signature(self.module.training_step).parameters:
            return "training_step draws its batches from dataloader_iter"
        return ""

    def loaders(self) -> list[Any]:
        """The Trainer's loaders of training batches."""
        given: Any = self._trainer.train_dataloader
        return list(getattr(given, "flattened", None) or tree_leaves(given))

    def steps_again(
        self, copies: Mapping[int, Any], more: Sequence[Any], step: int
    ) -> AbstractContextManager[Callable[..., Tensor | None]]:
        """In which a step's micro-batches may be trained on once more, by the Trainer's own loop."""
        measures = {id(c): copies.get(id(c)) if isinstance(c, LightningDriver) else c for c in self._callbacks}
        return steps_again(self._trainer, self.module, measures, more, step)

    @property
    def _callbacks(self) -> list[Any]:
        return self._trainer.callbacks  # type: ignore[attr-defined]


class LightningDriver(ToolNotice):
    """Turns the hooks of a Trainer into the events of a measurement; the base of :class:`Measurement`.

    The state is that of one run. A fit in another Trainer starts without it, unless :meth:`load_state_dict` gave the
    state of that run; a second fit of the same Trainer continues it.
    """

    label: str | None
    dirpath: str | None
    _asked: ClassVar[weakref.WeakKeyDictionary[LightningDriver, int]] = weakref.WeakKeyDictionary()
    _order: ClassVar[Iterator[int]] = itertools.count()
    _given_state = False  # by load_state_dict, for the next fit
    _trainer: weakref.ref[Trainer] | None = None  # that was set up last, for any stage
    asked_by = ""  # the environment variable that asked for it; empty if the script has made it
    _guard: Any = None  # is called in the place of the measurement, and decides what becomes of its errors

    @property
    def _events(self) -> Any:
        # A Measurement, which alone inherits from this class; to name it here would be a circle of files
        return self if self._guard is None else self._guard

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, nor can hooks of a fit that runs, or its Trainer, which steps know
        of_a_fit = dict.fromkeys(("_trainer", "_owner", "_step", "_applying", "_post_hook", "_listener", "_backward"))
        of_a_fit |= {"_guard": None}
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # of the module
        return {**own, **of_a_fit, "_applied_hooks": [], "_announced": {}, "_heard": {}, "_pending": []}

    @property
    def state_key(self) -> str:
        """The name in checkpoints: that of the class, with label or ``dirpath`` beside others of the class.

        While no Trainer runs them, those that only differ in other arguments have numbers, in the order in which they
        are asked: a Trainer would otherwise refuse them before :meth:`setup` can say what to do.

        One that an environment variable asked for has a name of its own, which depends on nothing but class and label:
        so its state is never taken for that of one in the script, and is there when another process resumes the run.
        """
        if self.asked_by:
            return self._key(alone=True)
        if (trainer := self._current_trainer()) is not None:
            return self._key_in(trainer)
        key, order = self._key(alone=False), self._asked.setdefault(self, next(self._order))
        number = sum(asked < order and c._key(alone=False) == key for c, asked in self._asked.items())
        return f"{key}#{number}" if number else key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start without the state of another run, and refuse what cannot be measured."""
        super().setup(trainer, pl_module, stage)
        self._trainer = weakref.ref(trainer)
        if stage != "fit":
            return
        self._events.adopt(trainer, goes_on=trainer.global_step > 0)
        self._events.prepare(LightningRun(trainer, pl_module, in_setup=True))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without an optimizer, if its steps are what is measured."""
        super().on_fit_start(trainer, pl_module)
        self._events.check_optimizers(LightningRun(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training starts, or goes on."""
        self._events.begin(LightningRun(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A micro-batch begins."""
        self._events.batch_begins(LightningRun(trainer, pl_module), batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A backward pass begins."""
        self._events.backward_begins(LightningRun(trainer, pl_module), loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A backward pass has ended."""
        self._events.backward_ended(LightningRun(trainer, pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """An optimizer is about to make a step."""
        self._events.step_begins(LightningRun(trainer, pl_module), optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch has ended."""
        run = LightningRun(trainer, pl_module)
        loss = loss_of(outputs)
        if not isinstance(loss, Tensor):
            self._events.loss_is_missing(run)
            self._events.batch_ended(run, None)
            return
        # Lightning has divided it by the number of accumulated batches
        self._events.batch_ended(run, loss, run.accumulation if run.automatic else 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch has ended."""
        self._events.epoch_ended(LightningRun(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training has ended."""
        self._events.end(LightningRun(trainer, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training was cut short."""
        self._events.interrupted(LightningRun(trainer, pl_module), exception)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what a run resumed from here would not measure again, and save the state that follows from it."""
        self._events.flush(LightningRun(trainer, pl_module))
        if state := self._events.state_dict():  # Lightning took it before
            checkpoint["callbacks"].pop(self.state_key, None)
            checkpoint["callbacks"][self._key_in(trainer)] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was, in the fit that runs or else in the next one.

        Validation, testing and prediction from a checkpoint leave the state as the last fit left it.
        """
        running = self._current_trainer()
        if running is not None and running.state.fn != "fit":
            return
        self._given_state = running is None
        self._events.restore(state_dict)

    def _current_trainer(self) -> Trainer | None:
        """The Trainer that runs this measurement now."""
        trainer = self._trainer() if self._trainer is not None else None
        return trainer if trainer is not None and trainer.state.status == "running" else None

    def _key_in(self, trainer: Trainer) -> str:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return self._key(alone=sum(type(c) is type(self) and not c.asked_by for c in callbacks) <= 1)

    def _key(self, alone: bool) -> str:
        if self.asked_by:  # whose label is the variable's name beside one of the script
            own = {} if self.label in (None, self.asked_by) else {"label": self.label}
            return self._generate_state_key(asked_by=self.asked_by, **own)
        if self.label is not None:
            return self._generate_state_key(label=self.label)
        if self.dirpath and not alone:
            return self._generate_state_key(dirpath=str(self.dirpath))
        return type(self).__qualname__


class _Exit(Callback):
    """The last of the callbacks to be torn down: it raises, in the place of the return from ``fit``."""

    def __init__(self, error: SystemExit) -> None:
        self.error = error

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the callbacks, and raise."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [c for c in callbacks if not isinstance(c, _Exit)]
        raise self.error


class _Deaf(DummyLogger):
    """Stands in for a logger: has its name and folders; all its methods do nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    name = property(attrgetter("_logger.name"))
    version = property(attrgetter("_logger.version"))
    save_dir = property(attrgetter("_logger.save_dir"))
    root_dir = property(attrgetter("_logger.root_dir"))
    log_dir = property(attrgetter("_logger.log_dir"))


def _is_a(callback: object, name: str) -> bool:
    return any(c.__name__ == name for c in type(callback).__mro__)
