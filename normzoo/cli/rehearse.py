"""What a run would only show after a while, tried before it: one training step on random images of the data's shape."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelSummary, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normzoo._components import reason
from normzoo._errors import RecipeError, shown
from normzoo.callbacks import DivergenceError, DivergenceExit
from normzoo.callbacks.measurement import warn_of_earlier_keys
from normzoo.cli._experiment import plan
from normzoo.cli._trainer import make_trainer
from normzoo.cli.build import Training, ask, build
from normzoo.cli.recipe import is_experiment
from normzoo.data._module import ImageDataModule

MAX_PARAMETERS = 100_000_000
IMAGES = 4  # of the step, unless a callback splits batches into more parts
_TUNERS = (BatchSizeFinder, LearningRateFinder)  # which train many steps before the first one of the run
_LOADING = ("load", "setup", "train_dataloader", "val_dataloader")
MAX_VALUES = 2**22  # of an image, and of a batch in the recipe's own size where a step fails on so few images
# What the Trainer of the step has from the recipe; how long and where the run trains is not of it
_OF_A_STEP = (
    "accumulate_grad_batches",
    "detect_anomaly",
    "deterministic",
    "enable_checkpointing",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "inference_mode",
    "log_every_n_steps",
)
_OF_THE_LENGTH = (
    "check_val_every_n_epoch",
    "fast_dev_run",
    "limit_train_batches",
    "limit_val_batches",
    "max_epochs",
    "max_steps",
    "overfit_batches",
    "val_check_interval",
)


@dataclass(frozen=True)
class Rehearsal:
    """What was made for a run, and what is to be said of it.

    Attributes:
        trainer: the run's own, not used; None for an experiment that is no training run.
        task: after the step, if there was one; None likewise.
        notices: why no step or which callbacks were not tried, and another precision than was asked for, in sentences.
    """

    trainer: Trainer | None
    task: LightningModule | None
    notices: list[str]


def rehearse(config: Mapping[str, Any], source: str) -> Rehearsal:
    """Make what a run would use and train one step, on the CPU, on noise of the data's shape, in a temporary folder.

    Random streams, environment and settings of torch are afterwards what they were. No data is loaded, so data modules
    that do not know their shape go untried, as do models of more than 100 million parameters. Lightning's
    ``BatchSizeFinder`` and ``LearningRateFinder`` are made and then left out: they train many steps of their own, for
    minutes, and what they find on a few random images says nothing of the run. An experiment that is no training run is
    made, and asked for its parts.

    Raises:
        RecipeError: naming the file, the key and what is wrong, for whatever the run would stumble over.
    """
    with tempfile.TemporaryDirectory(prefix="normzoo-") as folder, _undisturbed():
        if is_experiment(config):
            parts = plan(config, source).parts
            return Rehearsal(None, None, [f"none of the {len(parts)} parts of the experiment was tried"])
        training = build(config, source, folder)
        trainer = make_trainer(training, Path(folder))
        shape = _image_shape(training.data, source)
        untried = _why_not(training, trainer, shape)
        if not untried:
            ask(lambda: _random_images(training, trainer.num_devices * trainer.num_nodes), source)
            _start(training, trainer, folder)
            few, own = _batch_sizes(training, shape)
            error = _step(training, trainer, folder, few)
            if error and own != few:  # is it for the few images?
                few, training = own, build(config, source, folder)
                _random_images(training)
                error = _step(training, trainer, folder, few)
            if error and not isinstance(trainer.accelerator, CPUAccelerator) and re.search("cuda|device", str(error)):
                untried = f"a training step could not be tried on the CPU: {reason(error)}"
            elif error:
                images = f"{few} random images of {'x'.join(map(str, shape))}"
                raise _failure(error, training, f"a training step on {images} fails: ") from error
        notices = [*filter(None, [untried]), *_left_out(training), *_other_precision(training, trainer)]
        return Rehearsal(trainer, training.task, notices)


def _left_out(training: Training) -> Iterator[str]:
    for i, callback in enumerate(training.callbacks):
        if isinstance(callback, _TUNERS):
            yield f"callbacks[{i}]: {type(callback).__name__} was not tried, as it trains many steps of its own"


def _other_precision(training: Training, trainer: Trainer) -> Iterator[str]:
    asked, used = _given(training, "precision").get("precision"), str(trainer.precision)
    if asked is not None and not used.startswith(str(asked)):  # "16" stands for "16-mixed"
        yield f"trainer.precision: this machine has no {asked}, and Lightning trains with {used}"


def _image_shape(data: LightningDataModule, source: str) -> tuple[int, ...]:
    """(C, H, W) of the training images, or () if that is not known before they are loaded."""
    if not isinstance(data, ImageDataModule):
        return ()
    order = [vars(cls) for cls in type(data).__mro__]
    first = {name: next(i for i, names in enumerate(order) if name in names) for name in ("shapes", *_LOADING)}
    if any(first[name] < first["shapes"] for name in _LOADING):  # a subclass has images of its own
        return ()
    shapes = ask(data.shapes, source)
    return shapes["train"][1:] if shapes else ()


def _random_images(training: Training, ranks: int = 1) -> None:
    training.data.use_random_images(ranks)  # type: ignore[attr-defined]
    training.data.train_dataloader()  # which refuses batches larger than the set


def _why_not(training: Training, trainer: Trainer, shape: tuple[int, ...]) -> str:
    """A sentence if no step is to be tried on images of a shape, which is () if that is not known."""
    size = sum(p.numel() for p in training.task.parameters() if not nn.parameter.is_lazy(p))
    if size > MAX_PARAMETERS:
        why = f"the model has {size:,} parameters"
    elif math.prod(shape) > MAX_VALUES:
        why = f"images of {'x'.join(map(str, shape))} are large"
    elif not shape:
        why = f"{type(training.data).__name__} does not tell the shape of its data before they are loaded"
    elif getattr(trainer.strategy.launcher, "_start_method", "") == "fork":
        why = "processes could not be forked after one"
    else:
        return ""
    return f"no training step was tried: {why}"


def _batch_sizes(training: Training, shape: tuple[int, ...]) -> tuple[int, int]:
    """The few images that a step is tried on, and the recipe's own number unless that is too many here."""
    own: int = training.data.batch_size  # type: ignore[attr-defined]
    splits = [getattr(callback, "split", None) for callback in training.callbacks]
    parts = max([parts for parts in splits if isinstance(parts, int)], default=0)
    few = min(own, max(IMAGES, 2 * parts))
    return few, own if own * math.prod(shape) <= MAX_VALUES else few


def _start(training: Training, trainer: Trainer, folder: str) -> None:
    """Start the run and stop before its first step."""
    length = _given(training, *_OF_THE_LENGTH)
    stop = _Stop(steps=0)
    if error := _fit(training, trainer, folder, stop, **length):
        raise _failure(error, training, "") from error
    if not stop.started:
        why = ", ".join(f"{k}: {shown(v)}" for k, v in length.items())
        raise RecipeError(f"{training.trainer_component.source}: trainer: no training step would be made, with {why}")


def _step(training: Training, trainer: Trainer, folder: str, images: int) -> BaseException | None:
    """What a step on so many images, and one of validation, raise."""
    training.data.batch_size = images  # type: ignore[attr-defined]
    options = _given(training, "limit_train_batches", "max_epochs", "max_steps")
    if isinstance(trainer.accelerator, CPUAccelerator):
        options |= _given(training, "precision")
    validate = 0 if _given(training, "limit_val_batches").get("limit_val_batches") == 0 else 1
    return _fit(training, trainer, folder, _Stop(steps=1), limit_val_batches=validate, **options)


def _given(training: Training, *options: str) -> dict[str, Any]:
    """Those of the Trainer's options that the recipe has."""
    given = training.trainer_component.arguments
    return {option: given[option] for option in options if option in given}


def _fit(training: Training, trainer: Trainer, folder: str, stop: Callback, **options: Any) -> BaseException | None:
    """What a fit in this process alone raises, in place of one by ``trainer``."""
    options = {**_given(training, *_OF_A_STEP), **options}
    # Ranks have several gradients to compare, as micro-batches have
    least = 2 if trainer.num_devices * trainer.num_nodes > 1 else 1
    options["accumulate_grad_batches"] = max(least, min(2, options.get("accumulate_grad_batches", 1)))
    callbacks = [c for c in training.callbacks if not isinstance(c, (ProgressBar, ModelSummary, *_TUNERS))]
    try:
        alone = Trainer(
            accelerator="cpu",
            devices=1,
            callbacks=[*callbacks, stop],
            logger=CSVLogger(folder),
            default_root_dir=folder,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            plugins=[LightningEnvironment(), _NoCheckpoints()],
            **options,
        )
        with torch.compiler.set_stance("force_eager"):
            alone.fit(training.task, datamodule=training.data)
    except (DivergenceExit, DivergenceError):  # noise says nothing of the run
        return None
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's way to say so
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        return exit_
    except Exception as error:  # model and callbacks may be a user's
        return error
    return None


class _Stop(Callback):
    """Ends a fit after so many steps, or a few batches without one; validation follows as at the end of a run.

    Attributes:
        started: whether there would be a step.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.started = steps, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        self._stop_after(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_after(trainer, batch_idx + 1)

    def _stop_after(self, trainer: Trainer, batches: int) -> None:
        trainer.should_stop |= trainer.global_step >= self.steps or batches >= 4


class _NoCheckpoints(TorchCheckpointIO):
    """Keeps no checkpoints."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        pass

    def remove_checkpoint(self, path: Any) -> None:
        pass


def _failure(error: BaseException, training: Training, what: str) -> RecipeError:
    """What failed, at the key of the innermost part that was at work; a callback before what it calls."""
    callbacks = {id(c): f"callbacks[{i}]" for i, c in enumerate(training.callbacks)}
    kinds = {nn.Module: "model", Optimizer: "optimizer", LRScheduler: "lr_scheduler", ImageDataModule: "data"}
    key = "trainer"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in callbacks:
            key = callbacks[id(owner)]
            break
        key = next((k for kind, k in kinds.items() if isinstance(owner, kind)), key)
    return RecipeError(f"{training.trainer_component.source}: {key}: {what}{reason(error)}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves random streams, environment and settings of torch as they were, and shows no warnings."""
    environ, benchmark = dict(os.environ), torch.backends.cudnn.benchmark
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    failure: BaseException | None = None
    warned = warn_of_earlier_keys.cache_info().currsize
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BaseException as error:  # after which isolate_rng would not put back the streams
            failure = error
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark
            os.environ.clear()
            os.environ.update(environ)
            if not warned:
                warn_of_earlier_keys.cache_clear()  # nobody has seen it
    if failure is not None:
        raise failure
