"""The module whose steps are made again, and the callbacks that take part in them: from a recipe, or from a class."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities.parsing import AttributeDict

from normzoo._components import accepted_options, check, reason
from normzoo._errors import RecipeError, near_matches, one_line, shown
from normzoo._yaml_text import load_value, text_of
from normzoo.callbacks import Measurement
from normzoo.callbacks._run.modules import overrides
from normzoo.cli import recipe
from normzoo.cli.build import build, quiet_lightning
from normzoo.cli.user_code import is_of, load_object, load_recorded
from normzoo.task import ImageClassification

# Hooks of callbacks that stand between a step's forward pass and its update
_KNOWN = ("lightning", "pytorch_lightning", "normzoo")  # packages whose callbacks have no part in a step
_OF_A_STEP = ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step")


class Replayed(NamedTuple):
    """What a replay is given, where the module is from, and what is to be said of it: for people."""

    module: Any
    callbacks: list[Any]
    datamodule: Any
    source: str
    notices: list[str]


def replayed(
    settings: Mapping[str, Any],
    run: Path,
    module: str | None = None,
    *,
    init: str | None = None,
    callbacks: str | None = None,
    data: str | None = None,
) -> Replayed:
    """Make the module of a capsule's run.

    It is of the class that was given; else of the recipe in the run's folder; else of the class that the capsule names,
    with the hyperparameters that it had saved.

    Args:
        settings: ``capsule.about["settings"]``; empty for a capsule of an earlier version.
        run: the run's folder.
        module: ``package.module:Class`` or ``train.py:Class``, or a function that returns the module.
        init: a YAML file of the arguments that it is called with.
        callbacks: ``package.module:function``, which returns the run's own callbacks.
        data: ``package.module:Class`` of a data module, or a function that returns it.

    Raises:
        RecipeError: if it cannot be made.
    """
    quiet_lightning()
    given = [] if callbacks is None else _callbacks(callbacks)
    datamodule = None if data is None else _called(load_object(data, "--data", LightningDataModule), data, "--data")
    arguments = {} if init is None else _read_arguments(init)
    if module is None and init is None and (run / "recipe.yaml").is_file():
        path = run / "recipe.yaml"
        experiment = build(recipe.read(str(path)).config, str(path))
        own = not isinstance(experiment.task, ImageClassification)  # and may ask the Trainer for its data
        datamodule = datamodule or (experiment.data if own else None)
        return Replayed(experiment.task, given or _of_a_step(experiment.callbacks), datamodule, str(path), [])
    if module is not None:
        maker = load_object(module, "--module", LightningModule)
        hparams = settings if _is_recorded(maker, settings) else {}
    elif settings.get("module"):
        maker = load_recorded(settings["module"], settings.get("module_file"), "--module", LightningModule)
        if not (isinstance(maker, type) and is_of(maker, LightningModule)):  # else a capsule could call anything
            raise RecipeError(f"--module: the capsule names {settings['module']}, which is no LightningModule; give it")
        hparams = settings
    else:
        raise RecipeError("--module: the capsule does not name the class of its module; give it, as in train.py:Class")
    made = _made(maker, arguments, hparams)
    return Replayed(made, given, datamodule, _source(maker), _lacking(settings, made, callbacks, datamodule))


def _lacking(settings: Mapping[str, Any], module: Any, callbacks: str | None, datamodule: Any) -> list[str]:
    """Sentences on what the run had beside its module, and was not given."""
    notices = []
    recorded = [path for path in settings.get("callbacks") or () if path.split(".")[0].split(":")[0] not in _KNOWN]
    acting = [path for path in recorded if _may_act(path, module)]
    if acting and callbacks is None:
        notices.append(
            f"the run had callbacks that may act between loss and update, {', '.join(acting)}, and the steps are made "
            "without them: give --callbacks FILE.py:function, which returns them"
        )
    if datamodule is None and (asked := settings.get("datamodule")) and _mentions(module, "datamodule"):
        notices.append(f"the run had the data module {asked}; if the module asks it, give --data FILE.py:Class")
    return notices


def _may_act(path: str, module: Any) -> bool:
    """Whether a callback of the run may act between loss and update, as far as its class is at hand."""
    if overrides(module, "configure_callbacks"):  # whose callbacks the Trainer asks for
        return False
    place, _, name = path.partition(":")
    cls = getattr(sys.modules.get(type(module).__module__ if place == "__main__" else place), name, None)
    return not isinstance(cls, type) or any(_overridden(cls, hook) for hook in _OF_A_STEP)


def _overridden(cls: type, hook: str) -> bool:
    return overrides(object.__new__(cls), hook)


def _mentions(module: Any, word: str) -> bool:
    """Whether the code of a module's class has a word."""
    try:
        return word in inspect.getsource(type(module))
    except (OSError, TypeError):  # no file
        return True


def _is_recorded(maker: Any, settings: Mapping[str, Any]) -> bool:
    return getattr(maker, "__qualname__", None) == str(settings.get("module")).rpartition(":")[2]


def _source(maker: Any) -> str:
    file = inspect.getsourcefile(maker) if inspect.isclass(maker) or inspect.isfunction(maker) else None
    return f"{getattr(maker, '__qualname__', type(maker).__name__)}{f' in {file}' if file else ''}"


def _made(maker: Any, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The module of a class or function, called with the arguments given and else with those that the run has saved."""
    name = getattr(maker, "__qualname__", shown(maker))
    if not callable(maker):
        raise RecipeError(f"--module: {name} is no class and no function that returns a module")
    if isinstance(maker, type) and not is_of(maker, LightningModule):
        raise RecipeError(f"--module: {name} is not a LightningModule")
    parameters = inspect.signature(maker).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in named]
    for option in given:
        if option not in names and not anything:
            near = near_matches(option, names)
            takes = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(names) or 'none'}"
            raise RecipeError(f"--init: {name} has no argument {shown(option)}; {takes}")
    arguments = {**_saved(settings, names, anything), **_checked(maker, given)}
    if missing := [p.name for p in named if p.default is p.empty and p.name not in arguments]:
        unsaved = set(missing) & set(settings.get("hparams_left_out", ()))
        why = (
            "which were saved as no plain data"
            if unsaved
            else "which the module has not saved by save_hyperparameters()"
        )
        raise RecipeError(
            f"--init: {name} takes {', '.join(missing)}, {why}; give a YAML file with a line for each, as in  "
            f"{missing[0]}: VALUE, or --module FILE.py:FUNCTION, a function that returns the module"
        )
    try:
        module = maker(**arguments)
    except RecipeError:
        raise
    except Exception as error:  # the class is a user's, and may refuse its arguments in any way
        raise RecipeError(f"--module: {name}({', '.join(f'{k}=...' for k in arguments)}): {reason(error)}") from error
    if not is_of(type(module), LightningModule):
        raise RecipeError(f"--module: {name} returns {shown(module)}, and not a LightningModule")
    return module


def _saved(settings: Mapping[str, Any], names: Sequence[str], anything: bool) -> dict[str, Any]:
    """The arguments of ``__init__`` that a module has saved, as Lightning restores them from a checkpoint."""
    hparams, name = settings.get("hparams") or {}, settings.get("hparams_name")
    if name == "kwargs":
        return {option: value for option, value in hparams.items() if option in names or anything}
    return {str(name): AttributeDict(hparams)} if name in names and hparams else {}


def _checked(maker: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class, of their types, and made where they have a class_path; those of a function as given."""
    if not (given and isinstance(maker, type)):
        return dict(given)
    known = {option: value for option, value in given.items() if option in accepted_options(maker)}
    return {**given, **check("argument", maker, known, "--init").arguments}


def _read_arguments(file: str) -> dict[str, Any]:
    arguments = load_value(text_of(file, "--init"), file)
    if not isinstance(arguments, dict) or not all(isinstance(option, str) for option in arguments):
        raise RecipeError(f"--init: {file}: expected a mapping of arguments, as in  width: 64, not {shown(arguments)}")
    return arguments


def _callbacks(path: str) -> list[Any]:
    made = _called(load_object(path, "--callbacks", None), path, "--callbacks")
    callbacks = list(made) if isinstance(made, list | tuple) else [made]
    for callback in callbacks:
        if not is_of(type(callback), Callback):
            raise RecipeError(f"--callbacks: {path} gives {one_line(shown(callback))}, and not callbacks")
    return callbacks


def _called(maker: Any, path: str, option: str) -> Any:
    """What a class or function returns that is called without arguments; anything else itself."""
    try:
        return maker() if callable(maker) else maker
    except Exception as error:  # a user's function may fail in any way
        raise RecipeError(f"{option}: {path}(): {reason(error)}") from error


def _of_a_step(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks that a step depends on: measurements, checkpoints and progress bars are not among them."""
    return [
        callback
        for callback in callbacks
        if not isinstance(callback, Measurement)
        and (isinstance(callback, BaseFinetuning) or any(overrides(callback, hook) for hook in _OF_A_STEP))
    ]
