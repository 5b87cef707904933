"""The measurement under test, and fits of the small task with it; what several checks look at is fitted once."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from torch import nn

from normzoo._variable import no_measurements_added
from normzoo.callbacks._run.isolation import own_random_streams
from normzoo.callbacks.measurement import Measurement
from normzoo.records.reading import read_records
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._running import where
from normzoo.testing.measurements._snapshot import snapshot
from normzoo.testing.measurements._task import BASE, Memory, Setting, Task, loader, small_net

Factory = Callable[..., Measurement]
Net = Callable[[], nn.Module]
UNIONS = ("batch", "micro-batches")
EPOCHS = 2


class OnSteps:
    """A schedule: true at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return step in self.steps


class Began(pl.Callback):
    """Whether a batch has been begun; the first of the callbacks, so that it is so before a measurement sees it.

    Attributes:
        began: whether it has.
        keys: under which the measurements of the Trainer save their states.
    """

    def __init__(self) -> None:
        self.began = False
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch begins."""
        if not self.began:
            self.began = True
            self.keys = [m.state_key for m in trainer.callbacks if isinstance(m, Measurement)]  # type: ignore[attr-defined]


@dataclass
class Fit:
    """What has come of a fit.

    Attributes:
        trainer: that made it.
        module: that was trained.
        folder: of the records.
        began: whether it has come to its first batch.
        error: that ended it, or None.
        left: a snapshot.
        logged: scalars by key, each with its step.
        keys: under which its measurements save their states.
    """

    trainer: pl.Trainer
    module: Task
    folder: Path
    began: bool
    error: BaseException | None
    left: dict[str, Any]
    logged: dict[str, list[tuple[int | None, float]]]
    keys: list[str]


class Subject:
    """A factory of measurements, and the fits that its checks look at.

    Args:
        factory: see :func:`normzoo.testing.check_measurement`.
        net: likewise.
        union: likewise.

    Raises:
        TypeError: for a factory or a network that cannot be called, or a factory that makes no measurement.
        ValueError: for a ``union`` that there is not.
    """

    def __init__(self, factory: Factory, net: Net | None = None, union: str = "batch") -> None:
        if isinstance(factory, Measurement) or not callable(factory):
            raise TypeError(f"factory must be a class or a function that makes a measurement, not {factory!r}")
        if net is not None and (isinstance(net, nn.Module) or not callable(net)):
            raise TypeError(f"net must be a function that makes a network, not {type(net).__name__}")
        if net is not None:
            with own_random_streams():
                made = net()  # whose own error is the one to see
            if not isinstance(made, nn.Module):
                raise TypeError(f"net must return a torch.nn.Module, not {type(made).__name__}")
        if union not in UNIONS:
            raise ValueError(f"union must be one of {', '.join(map(repr, UNIONS))}, not {union!r}")
        self.factory, self.net, self.union = factory, net or small_net, union
        self._folder: str | None = None
        self._outcomes: dict[str, Any] = {}

    def __str__(self) -> str:
        inner: Any = self.factory
        options: dict[str, Any] = {}
        while isinstance(inner, functools.partial):
            inner, options = inner.func, {**inner.keywords, **options}
        name = getattr(inner, "__name__", type(inner).__name__)
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folder": None, "_outcomes": {}}  # fits stay in the process that made them

    def make(self, every_n_steps: Any = 1, **options: Any) -> Measurement:
        """A new measurement, which samples every step unless asked otherwise."""
        made = self.factory(every_n_steps=every_n_steps, **options)
        if not isinstance(made, Measurement):
            raise BrokenError(f"the factory returned {made!r}, not a Measurement")
        return made

    @property
    def name(self) -> str:
        """Of the record."""
        return self.make().name

    def new_folder(self) -> Path:
        """An empty folder, which is removed with the subject."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self._folder))

    def fit(self, *measurements: Measurement, setting: Setting = BASE, **options: Any) -> Fit:
        """Fit with measurements; an error ends the fit, and is in the result."""
        folder = options.pop("folder", None) or self.new_folder()
        return fit(self.net, measurements, folder, setting, **options)

    def control(self, setting: Setting, epochs: int = EPOCHS) -> dict[str, Any]:
        """What a fit without measurements leaves."""
        return _control(self.net, setting, epochs)

    def rows(self, fitted: Fit, folder: Path | None = None, may_refuse: bool = False) -> pd.DataFrame:
        """The record of a fit that was not to fail.

        Args:
            fitted: the fit.
            folder: of the record, if another one than that of the fit.
            may_refuse: whether the measurement may refuse it.

        Raises:
            NotApplicableError: if the measurement has refused the fit, as it may.
            BrokenError: if the fit failed, or left no record.
        """
        if may_refuse and fitted.error is not None and not fitted.began and isinstance(fitted.error, ValueError):
            self.refused(str(fitted.error))
        if fitted.error is not None:
            what = f"fit, {fitted.module.setting}: {where(fitted.error)}{self._hint(fitted)}"
            raise BrokenError(what) from fitted.error
        record = read_records(folder or fitted.folder).get(self.name)
        if record is None:
            raise BrokenError(f"fit, {fitted.module.setting}: there is no record {self.name!r} in {fitted.folder}")
        return record

    def _hint(self, fitted: Fit) -> str:
        """What to do about a refusal that may be the network's fault."""
        if fitted.began or not isinstance(fitted.error, ValueError) or self.net is not small_net:
            return ""
        return "; if it needs other modules than those of the suite's network, pass net=, a function that makes one"

    def refused(self, message: str) -> None:
        """Raise a NotApplicableError, as a refusal was made, or a BrokenError if it says too little."""
        names = [c.__name__ for c in type(self.make()).__mro__ if issubclass(c, Measurement)]
        if "\n" in message or not any(name in message for name in names[: names.index("Measurement")]):
            raise BrokenError(f"a refusal has to be one line that names {names[0]}; it is {message!r}")
        raise NotApplicableError(f"refused: {message}")

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        """What a function returns, or the exception that it raises; called the first time only."""
        if what not in self._outcomes:
            try:
                self._outcomes[what] = make()
            except (BrokenError, NotApplicableError) as error:
                self._outcomes[what] = error
        if isinstance(outcome := self._outcomes[what], Exception):
            raise outcome
        return outcome

    @property
    def base(self) -> tuple[Measurement, Fit, pd.DataFrame]:
        """A measurement, a fit of 8 steps of two micro-batches that it samples each of, and its rows.

        Raises:
            BrokenError: if it failed, or left no rows.
        """

        def make() -> tuple[Measurement, Fit, pd.DataFrame]:
            measurement = self.make()
            fitted = self.fit(measurement)
            rows = self.rows(fitted)
            if rows.empty:
                raise BrokenError("a fit in which every step is sampled leaves no row, so that there is none to check")
            return measurement, fitted, rows

        return self.once("base", make)


def fit(
    net: Net,
    measurements: Sequence[Measurement],
    folder: Path,
    setting: Setting,
    *,
    epochs: int = EPOCHS,
    rank: int = 0,
    world: int = 1,
    module: Task | None = None,
    trainer: pl.Trainer | None = None,
    checkpoint: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> Fit:
    """One seeded fit.

    Args:
        net: makes the network.
        measurements: that are taken.
        folder: of the records.
        setting: of the task.
        epochs: in all, those made before included.
        rank: of this process, for its data.
        world: number of ranks.
        module: to train, instead of a new one.
        trainer: that goes on, instead of a new one.
        checkpoint: to resume from.
        callbacks: others than measurements, that come before them.
        **options: of the Trainer.
    """
    error: BaseException | None = None
    with quietly(), own_random_streams():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        module = Task(net, setting) if module is None else module
        if trainer is None:
            trainer = _trainer(folder, setting, [Began(), *callbacks, *measurements], epochs, **options)
        began = next(c for c in trainer.callbacks if isinstance(c, Began))  # type: ignore[attr-defined]
        began.began = False
        trainer.fit_loop.max_epochs = epochs
        try:
            trainer.fit(module, loader(setting, rank, world), ckpt_path=checkpoint, weights_only=False)
        except (Exception, SystemExit) as raised:  # Lightning exits when it is interrupted
            error = raised
        left = snapshot(trainer, module)
    logged = next((logger.logged for logger in trainer.loggers if isinstance(logger, Memory)), {})
    return Fit(trainer, module, folder, began.began, error, left, dict(logged), began.keys)


@functools.lru_cache(maxsize=64)
def _control(net: Net, setting: Setting, epochs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(net, (), Path(folder), setting, epochs=epochs)
    if fitted.error is not None and not setting.fails_in:
        raise BrokenError(f"without a measurement, {setting}: {where(fitted.error)}") from fitted.error
    return fitted.left


def _trainer(folder: Path, setting: Setting, callbacks: list[Any], epochs: int, **options: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": Memory(folder),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    if "plugins" not in options:
        given["precision"] = setting.precision
    if setting.mode == "automatic":
        given |= {"accumulate_grad_batches": setting.accumulation, "gradient_clip_val": setting.clipping}
    with no_measurements_added():
        return pl.Trainer(callbacks=callbacks, **{**given, **options})


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without warnings and notes of Lightning; an interrupt is handled afterwards as before."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, handler = [logger.level for logger in loggers], signal.getsignal(signal.SIGINT)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # which Lightning ignores once it was interrupted
