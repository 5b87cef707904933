"""From a recipe's config to objects: names looked up, keys and types checked, classes made."""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.optim.lr_scheduler import ReduceLROnPlateau

from normzoo._components import (
    Component,
    accepted_options,
    check,
    component,
    given_options,
    import_class,
    reason,
    split_spec,
)
from normzoo._errors import RecipeError, shown, unknown_name
from normzoo._files import existing_folder
from normzoo.callbacks._run.tools import ToolNotice
from normzoo.cli.checkpoint_file import read_state_dict
from normzoo.registry import list_norms, norm_info, split_weight_method
from normzoo.task import ImageClassification

# The least that options of the Trainer can be; it checks others itself
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "val_check_interval": 1e-9,
}
# Options of the section model that build checks itself; parameters of ImageClassification that are no options
_OF_A_RECIPE = ("norm", "checkpoint", "convert")
_TASK_SKIPS = {"optimizer", "lr_scheduler", "norm", "weights", "convert"}
_OF_A_CONVERSION = ("to", "calibrate", "include", "exclude")
# What the run itself decides
_TRAINER_SKIPS = {"callbacks", "logger", "default_root_dir"}


@dataclass(frozen=True)
class Training:
    """Everything that one training run needs, checked; :meth:`trainer` makes the Trainer."""

    task: LightningModule
    data: LightningDataModule
    callbacks: list[Callback]
    trainer_component: Component
    seed: int
    config: Mapping[str, Any]
    board: str  # what TensorBoard gets of measurements: few tags, or all

    def trainer(self, **more: Any) -> Trainer:
        """The Trainer, with loggers and folder passed in and callbacks added to the recipe's, ``first`` before them."""
        callbacks = [*more.pop("first", []), *self.callbacks, ToolNotice(), *more.pop("callbacks", [])]
        return self.trainer_component.make(callbacks=callbacks, **more)


def build(config: Mapping[str, Any], source: str, folder: str | None = None) -> Training:
    """Check a config and make its objects; the seed is set before the model is made.

    Args:
        config: sections of a recipe.
        source: file it came from, for messages.
        folder: in which the folders are that callbacks write to, if not where the config says.

    Raises:
        RecipeError: naming the file, the key, and what is accepted, for anything the recipe has wrong.
    """
    quiet_lightning()
    seed = seed_of(config, source)
    trainer = check("trainer", Trainer, _or_empty(config.get("trainer"), {}), source, skip=_TRAINER_SKIPS)
    _check_trainer(trainer)
    board = config.get("tensorboard", "few")
    if board not in ("few", "all"):
        raise RecipeError(f"{source}: tensorboard: expected few or all, not {shown(board)}")
    callbacks = _callbacks(config.get("callbacks"), source)
    places: dict[str, str] = {}
    for callback in callbacks:
        if folder is not None and callback.arguments.get("dirpath") is not None:
            place = str(callback.arguments["dirpath"])
            _check_folder(place, callback)
            callback.arguments["dirpath"] = places.setdefault(place, os.path.join(folder, f"dirpath-{len(places)}"))
    data = make_data(config, seed, source)
    task = make_task(config, data, seed, source)
    return Training(task, data, [c.make() for c in callbacks], trainer, seed, config, board)


def seed_of(config: Mapping[str, Any], source: str) -> int:
    """The section ``seed``, by default 0."""
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise RecipeError(f"{source}: seed: must be a whole number from 0 to {2**32 - 1}, not {shown(seed)}")
    return seed


def make_data(config: Mapping[str, Any], seed: int, source: str) -> LightningDataModule:
    """The data module of the section ``data``, which has looked whether its data is there and loaded nothing."""
    data_component = component("data", config["data"], source)
    if "seed" in accepted_options(data_component.cls) and "seed" not in given_options(config["data"]):
        data_component.arguments["seed"] = seed
    data: LightningDataModule = data_component.make()
    if hasattr(data, "check"):
        ask(data.check, source)
    return data


def make_task(config: Mapping[str, Any], data: LightningDataModule | None, seed: int, source: str) -> LightningModule:
    """The module of the sections ``model``, ``optimizer`` and ``lr_scheduler``; the seed is set before it is made."""
    model = _model(config, data, source)
    # Made for its checks, on the CPU and without effect on the run
    seed_everything(seed, workers=True, verbose=False)
    task: LightningModule = model.make()
    if isinstance(task, ImageClassification):
        _try_optimizers(task, source)
    return task


def _check_folder(place: str, callback: Component) -> None:
    """Refuse a folder that a run could not make, without making it."""
    if "://" in place:  # of a file system that Lightning knows
        return
    try:
        folder = existing_folder(place)
        if os.access(folder, os.W_OK | os.X_OK):
            return
        why = f"{folder} cannot be written to"
    except ValueError as error:
        why = str(error)
    raise RecipeError(f"{callback.source}: {callback.key}.dirpath: cannot make the folder {shown(place)}: {why}")


def _try_optimizers(task: ImageClassification, source: str) -> None:
    """Make the optimizer and move its schedule, which a run then makes anew: what they refuse is found now."""
    made = task.configure_optimizers()
    if not isinstance(made, Mapping):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not moved
        scheduler = made["lr_scheduler"]["scheduler"]
        if isinstance(scheduler, ReduceLROnPlateau):
            raise RecipeError(
                f"{source}: lr_scheduler: {type(scheduler).__name__} follows a metric, and a recipe names none for it; "
                "use another schedule, or a model of your own that configures it"
            )
        try:
            scheduler.step()
        except Exception as error:  # the class may be a user's
            raise RecipeError(f"{source}: lr_scheduler: its first step fails: {reason(error)}") from error


def quiet_lightning() -> None:
    """Keep Lightning's remarks on devices and summaries out of the progress display."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _check_trainer(trainer: Component) -> None:
    for option, least in _LEAST.items():
        value = trainer.arguments.get(option)
        if isinstance(value, int | float) and value < least:
            what = f"at least {least}" if least != 1e-9 else "above 0"
            raise RecipeError(f"{trainer.source}: trainer.{option}: must be {what}, not {value}")
    devices = str(trainer.arguments.get("devices", "")).strip()
    if re.fullmatch(r"\+?[0-9_]+", devices) and len(devices) > 4:  # Lightning makes a list of so many CPUs
        raise RecipeError(f"{trainer.source}: trainer.devices: must be at most 9999, not {shown(devices)}")
    if trainer.arguments.get("barebones"):
        raise RecipeError(f"{trainer.source}: trainer.barebones: true, but runs are recorded, which it excludes")


def _callbacks(specs: Any, source: str) -> list[Component]:
    specs = _or_empty(specs, [])
    if not isinstance(specs, list):
        raise RecipeError(f"{source}: callbacks: expected a list, each item a name, or a mapping; got {shown(specs)}")
    for i, spec in enumerate(specs):
        if spec in specs[:i]:
            raise RecipeError(f"{source}: callbacks[{i}]: the same as callbacks[{specs.index(spec)}]; leave one out")
    return [component(f"callbacks[{i}]", s, source, kind="callbacks") for i, s in enumerate(specs)]


def _model(config: Mapping[str, Any], data: LightningDataModule | None, source: str) -> Component:
    spec = config["model"]
    if not isinstance(spec, Mapping):
        raise RecipeError(
            f"{source}: model: expected a mapping with arch: and norm:, or class_path:, not {shown(spec)}"
        )
    if "class_path" in spec:
        for section in ("optimizer", "lr_scheduler"):
            if config.get(section) is not None:
                raise RecipeError(
                    f"{source}: {section}: a model given by class_path configures its own; leave {section}: out"
                )
        return component("model", spec, source)
    options = {k: v for k, v in spec.items() if k not in _OF_A_RECIPE}
    if not isinstance(options.get("arch", ""), str):
        raise RecipeError(f"{source}: model.arch: expected the name of a timm model, not {shown(options['arch'])}")
    model = check("model", ImageClassification, options, source, skip=_TASK_SKIPS, beside=_OF_A_RECIPE)
    if spec.get("norm") is not None:
        model.arguments["norm"] = _norm("model.norm", spec["norm"], source)
    if spec.get("checkpoint") is not None:
        model.arguments["weights"] = _weights(spec["checkpoint"], source)
    if spec.get("convert") is not None:
        model.arguments["convert"] = _conversion(spec["convert"], source)
        if data is None:  # calibration needs data; without data the network gets weights that are calibrated
            del model.arguments["convert"]["calibrate"]
    for option in ("num_classes", "in_chans"):
        has = ask(functools.partial(getattr, data, option, None), source)
        if not isinstance(has, int):
            continue
        given = model.arguments.setdefault(option, has)
        if given < has or (option == "in_chans" and given != has):
            raise RecipeError(f"{source}: model.{option}: {given}, but the data has {has}")
    for section, skip in (("optimizer", "params"), ("lr_scheduler", "optimizer")):
        if config.get(section) is not None:
            part = component(section, config[section], source, skip={skip})
            model.arguments[section] = functools.partial(part.make)
    return model


def _conversion(spec: Any, source: str) -> dict[str, Any]:
    """Arguments of ``convert_norms``, and the number of batches to calibrate on."""
    if not isinstance(spec, Mapping) or "to" not in spec:
        raise RecipeError(f"{source}: model.convert: expected a mapping with to: and a norm, not {shown(spec)}")
    for option in spec:
        if option not in _OF_A_CONVERSION:
            message = unknown_name("option of a conversion", option, _OF_A_CONVERSION)
            raise RecipeError(f"{source}: model.convert.{option}: {message}")
    arguments = {"to": _norm("model.convert.to", spec["to"], source), "calibrate": spec.get("calibrate", 0)}
    if type(batches := arguments["calibrate"]) is not int or batches < 0:
        raise RecipeError(f"{source}: model.convert.calibrate: expected a number of batches, not {shown(batches)}")
    for option in ("include", "exclude"):
        patterns = spec.get(option)
        texts = patterns if isinstance(patterns, list) else [patterns]
        if patterns is not None and not all(isinstance(text, str) for text in texts):
            expected = "expected a pattern of names, such as layer1.*, or a list of these"
            raise RecipeError(f"{source}: model.convert.{option}: {expected}, not {shown(patterns)}")
        if patterns is not None:
            arguments[option] = texts
    return arguments


def _weights(path: Any, source: str) -> Mapping[str, Any]:
    """The state dict in a checkpoint's file."""
    if not isinstance(path, str):
        raise RecipeError(f"{source}: model.checkpoint: expected the path of a file, not {shown(path)}")
    try:
        return read_state_dict(Path(path))
    except RecipeError as error:
        raise RecipeError(f"{source}: model.checkpoint: {error}") from None


def without_options(config: Mapping[str, Any], *options: str) -> Mapping[str, Any]:
    """The config without some options of its section ``model``; a section that is not a mapping is kept as it is."""
    if not isinstance(model := config["model"], Mapping):
        return config
    return {**config, "model": {key: value for key, value in model.items() if key not in options}}


def _norm(key: str, spec: Any, source: str) -> Any:
    name, class_path, options = split_spec(key, spec, source)
    if name is not None:
        try:
            norm, _ = split_weight_method(name)
        except ValueError as error:
            raise RecipeError(f"{source}: {key}: {error}") from None
        try:
            cls = norm_info(norm).layer_class
        except KeyError:
            message = unknown_name("norm", norm, list_norms())
            raise RecipeError(f"{source}: {key}: {message} Your own: class_path.") from None
    else:
        cls = import_class(str(class_path), key, source)
    part = check(key, cls, options, source, skip={"num_features", "device", "dtype"})
    return {"name": name, **part.arguments} if name is not None else functools.partial(part.cls, **part.arguments)


def _or_empty(value: Any, empty: Any) -> Any:
    return empty if value is None else value


def ask(what: Callable[[], Any], source: str) -> Any:
    """What a data module answers, which may be a user's and fail in any way."""
    try:
        return what()
    except Exception as error:
        raise RecipeError(f"{source}: data: {reason(error)}") from error
