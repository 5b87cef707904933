"""A fit of a Trainer in which a stage is set up and asked, before the first batch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from normzoo._variable import no_measurements_added
from normzoo.callbacks._run.isolation import own_random_streams
from normzoo.capsules import Capsule, CapsuleError
from normzoo.replaying.restoring import materialize
from normzoo.replaying.stage import Stage

Answer = TypeVar("Answer")
_ACCELERATORS = {"CPUAccelerator": "cpu", "CUDAAccelerator": "gpu", "MPSAccelerator": "mps"}


def in_a_fit(
    capsule: Capsule,
    module: LightningModule,
    ask: Callable[[Stage], Answer],
    *,
    callbacks: Sequence[Callback] = (),
    batches: Callable[[list[Any]], Any] | None = None,
    datamodule: LightningDataModule | None = None,
    strategy: str | Strategy | None = None,
) -> Answer:
    """Set the run of a capsule up in a fit of its own, and return what a function says of it.

    Args:
        capsule: to replay.
        module: of the class and with the arguments of the run; its weights are as before afterwards.
        ask: what is asked of the stage.
        callbacks: those of the run that act between loss and update.
        batches: makes a batch from the ids of its samples.
        datamodule: for a module that asks ``trainer.datamodule``; it is set up as for a fit, and gives no batch.
        strategy: of the Trainer; by default that of the run if this job has as many ranks.
    """
    settings = capsule.about.get("settings") or {}
    answers: list[Answer] = []

    def answer(trainer: Trainer, pl_module: LightningModule) -> Stage:
        return Stage(capsule, trainer, pl_module, batches)

    asking = _Asking(answer, lambda stage: answers.append(ask(stage)))
    materialize(module, _first_weights(capsule))
    with own_random_streams(), _as_recorded(settings), _quiet(), no_measurements_added():
        package = _package_of(module)
        trainer = package.Trainer(
            **_options(settings, strategy, package),
            callbacks=[*callbacks, asking],
            logger=package.loggers.logger.DummyLogger(),  # for a module that calls its logger
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        if datamodule is not None:
            trainer.datamodule, datamodule.trainer = datamodule, trainer
        with contextlib.suppress(_AnsweredError):
            trainer.fit(module, range(_number_of_batches(settings)))  # of which none is drawn
    return answers[0]


class _AnsweredError(Exception):
    """Leaves the fit, whose further hooks have no part in a replay."""


class _Asking(Callback):
    """Asks before the first batch, when the module's hooks of a fit's start have been called.

    It holds functions alone, into which a snapshot of the state does not look.
    """

    def __init__(self, set_up: Callable[[Trainer, LightningModule], Stage], ask: Callable[[Stage], Any]) -> None:
        self._set_up, self._ask = set_up, ask
        self._arrive: Callable[[Optimizer], None] | None = None
        self._sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the stage up, and ask."""
        if threading.current_thread() is threading.main_thread():  # the Trainer would wait for the end of a batch
            signal.signal(signal.SIGTERM, self._sigterm)
        pl_module.on_train_epoch_start()
        stage = self._set_up(trainer, pl_module)
        self._arrive = stage.gradients_arrive
        with stage.set_up():
            self._ask(stage)
        raise _AnsweredError

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the stage measure gradients before they are clipped."""
        if self._arrive is not None:
            self._arrive(optimizer)


def _package_of(module: LightningModule) -> Any:
    """The package whose Trainer takes the module: the two packages of Lightning have classes of their own."""
    if any(c.__module__.partition(".")[0] == "pytorch_lightning" for c in type(module).__mro__):
        import pytorch_lightning

        return pytorch_lightning
    return lightning.pytorch


def _options(settings: Mapping[str, Any], strategy: str | Strategy | None, package: Any) -> dict[str, Any]:
    """Arguments of the Trainer, as those of the run's that decide what a step computes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = _ACCELERATORS.get(settings.get("accelerator", ""), "auto")
    if accelerator == "gpu" and not torch.cuda.is_available():
        accelerator = "cpu"
    chosen: Any = strategy
    if chosen is None and ranks > 1:
        backend = "gloo" if accelerator == "cpu" or not torch.cuda.is_available() else "nccl"
        options = settings.get("strategy_options") or {}
        sharded = settings.get("strategy") == "ModelParallelStrategy"
        kind = package.strategies.ModelParallelStrategy if sharded else package.strategies.DDPStrategy
        chosen = kind(process_group_backend=backend, **options)
    return {
        "accelerator": accelerator,
        "devices": ranks,
        "precision": settings.get("precision") or "32-true",
        "gradient_clip_val": settings.get("gradient_clip_val"),
        "gradient_clip_algorithm": settings.get("gradient_clip_algorithm"),
        # The length of the run, which schedules of the learning rate may ask for
        "max_epochs": settings.get("max_epochs"),
        "max_steps": -1 if settings.get("max_steps") is None else settings["max_steps"],
        "accumulate_grad_batches": settings.get("accumulate_grad_batches") or 1,
        "sync_batchnorm": bool(settings.get("sync_batchnorm")) and ranks > 1,
        **({} if chosen is None else {"strategy": chosen}),
    }


def _number_of_batches(settings: Mapping[str, Any]) -> int:
    """How many batches an epoch of the run had; many if that is not known."""
    number = settings.get("num_training_batches")
    return int(number) if number and math.isfinite(number) else sys.maxsize


@contextmanager
def _as_recorded(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, torch computes with as many threads, as deterministically and as precisely as in the run."""
    before: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def set_to(setter: Callable[..., Any], now: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
        if None not in wanted and now != wanted:
            setter(*wanted)
            before.append((setter, now))

    set_to(torch.set_num_threads, (torch.get_num_threads(),), (settings.get("threads"),))
    set_to(
        _set_deterministic,
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        (settings.get("deterministic_algorithms"), settings.get("deterministic_warn_only")),
    )
    set_to(
        torch.set_float32_matmul_precision,
        (torch.get_float32_matmul_precision(),),
        (settings.get("float32_matmul_precision"),),
    )
    for name in ("deterministic", "benchmark", "allow_tf32"):
        set_to(
            partial(setattr, torch.backends.cudnn, name),
            (getattr(torch.backends.cudnn, name),),
            (settings.get(f"cudnn_{name}"),),
        )
    if settings.get("flush_denormal") is not None:
        flushes = bool(torch.full((), 2.0**-126).mul(0.5) == 0)
        set_to(torch.set_flush_denormal, (flushes,), (settings["flush_denormal"],))
    try:
        yield
    finally:
        for setter, values in reversed(before):
            setter(*values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the Trainer does not give advice, which is for trainings: more workers for the loader, a logger."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _set_deterministic(mode: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _first_weights(capsule: Capsule) -> Any:
    """Parameters and buffers of the first snapshot, for the shapes of lazy ones; None if there is none."""
    try:
        return capsule.state(capsule.ranks[0])["module"]
    except CapsuleError:
        return None
