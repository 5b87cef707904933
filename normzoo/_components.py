"""From what YAML says to objects: names looked up, keys and types checked, classes made."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from normzoo._errors import RecipeError, one_line, shown, unknown_name
from normzoo._yaml_text import InvalidYamlError, parse
from normzoo.names import SHORT_NAMES

# What the classes of a section are subclasses of, by name, so that only those that are asked for are imported
_BASES = {
    "model": "lightning.pytorch.LightningModule",
    "data": "lightning.pytorch.LightningDataModule",
    "callbacks": "lightning.pytorch.Callback",
    "optimizer": "torch.optim.Optimizer",
    "lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "experiment": "normzoo.experiments.Experiment",
}
# Options that are times, and numbers that are accepted as well
_DURATIONS: dict[tuple[type, str], str] = {
    (Trainer, "max_time"): "",
    (Timer, "duration"): "",
    (Trainer, "val_check_interval"): "a number of batches, ",
}
_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")  # of timedelta
_FINITE = ("optimizer", "lr_scheduler")  # sections in which an infinity is a mistake too
set_loader("recipe", parse, (InvalidYamlError,))  # for text within options, which jsonargparse reads as YAML


@dataclass(frozen=True)
class Component:
    """A class and its checked arguments, not yet made."""

    key: str
    cls: type
    arguments: dict[str, Any]
    source: str

    def make(self, *args: Any, **more: Any) -> Any:
        """An instance; whatever the class raises for its arguments becomes a RecipeError that names the key."""
        try:
            return self.cls(*args, **self.arguments, **more)
        except RecipeError:  # of a part made inside this one
            raise
        except Exception as error:  # the class may be a user's, and refuse its arguments in any way
            raise RecipeError(f"{self.source}: {self.key}: {reason(error)}") from error


def component(key: str, spec: Any, source: str, *, kind: str = "", skip: set[str] | None = None) -> Component:
    """Look up what ``spec`` names (a short name, a mapping with one, or a class_path) and check its options."""
    known = SHORT_NAMES[kind or key]
    name, class_path, options = split_spec(key, spec, source)
    if class_path is None:
        if name not in known:
            what = {"data": "data set", "callbacks": "callback", "lr_scheduler": "learning rate schedule"}.get(
                kind or key, key
            )
            raise RecipeError(f"{source}: {key}: {unknown_name(what, name, known)} Your own: class_path.")
        class_path = known[name]
    return check(key, import_class(class_path, key, source), options, source, skip=skip)


def split_spec(key: str, spec: Any, source: str) -> tuple[str | None, str | None, dict[str, Any]]:
    """(short name, class_path, options) of ``group``, ``{name: group, groups: 8}`` or ``{class_path, init_args}``."""
    if isinstance(spec, str):
        return (None, spec, {}) if "." in spec else (spec, None, {})
    if isinstance(spec, Mapping) and "class_path" in spec:
        extra = set(spec) - {"class_path", "init_args"}
        if extra:
            raise RecipeError(
                f"{source}: {key}: beside class_path only init_args is accepted, not {', '.join(map(shown, extra))}"
            )
        path, arguments = spec["class_path"], spec.get("init_args", {})
        if not isinstance(path, str):
            raise RecipeError(f"{source}: {key}.class_path: expected package.module.Class, not {shown(path)}")
        if not isinstance(arguments, Mapping):
            raise RecipeError(f"{source}: {key}.init_args: expected a mapping of options, not {shown(arguments)}")
        return None, path, dict(arguments)
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], None, {k: v for k, v in spec.items() if k != "name"}
    raise RecipeError(
        f"{source}: {key}: expected a name, a mapping with name: and options, or class_path: and init_args:, "
        f"not {shown(spec)}"
    )


def import_class(class_path: str, key: str, source: str) -> type:
    """The class at ``package.module.Class``."""
    module, _, name = class_path.rpartition(".")
    if os.getcwd() not in sys.path:  # a user's own module beside the recipe, as with python -m
        sys.path.append(os.getcwd())
    try:
        cls = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        raise RecipeError(f"{source}: {key}: cannot import {shown(class_path)}: {reason(error)}") from error
    if not isinstance(cls, type):
        raise RecipeError(f"{source}: {key}: {shown(class_path)} is not a class")
    base = _BASES.get(key.partition("[")[0])
    if base is not None and not issubclass(cls, _imported(base)):
        raise RecipeError(f"{source}: {key}: {shown(class_path)} is not a subclass of {base.rpartition('.')[2]}")
    return cls


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def check(
    key: str,
    cls: type,
    options: Any,
    source: str,
    *,
    skip: set[str] | None = None,
    beside: tuple[str, ...] = (),
) -> Component:
    """Check the options' names and types against the signature of ``cls``; values are converted to the types.

    Args:
        key: of the options, for messages.
        cls: that is to be made.
        options: that are given.
        source: file they came from, for messages.
        skip: parameters of ``cls`` that are no options.
        beside: options that the caller checks; messages suggest them as near matches.
    """
    if not isinstance(options, Mapping):
        raise RecipeError(f"{source}: {key}: expected a mapping of options, not {shown(options)}")
    parser = _parser(cls, frozenset(skip or ()))
    accepted = accepted_options(cls, frozenset(skip or ()))
    for option in options:
        if option not in accepted:
            what = f"option of {cls.__name__}"
            raise RecipeError(f"{source}: {key}.{option}: {unknown_name(what, option, (*accepted, *beside))}")
        if options[option] is None and not _takes_none(cls, option):
            raise RecipeError(f"{source}: {key}.{option}: expected a value, not null; leave it out for its default")
        for (known, name), numbers in _DURATIONS.items():
            if issubclass(cls, known) and option == name and options[option] is not None:
                _check_duration(f"{source}: {key}.{option}", options[option], numbers)
    try:
        parsed = parser.parse_object({"options": dict(options)}, defaults=False)
        made = parser.instantiate(parsed).get("options", {})
    except (Exception, SystemExit) as error:  # an option may name a user's class, which is made now
        raise RecipeError(f"{source}: {_blame(error, key, options)}") from error
    arguments = {option: _plain(made[option]) for option in options}
    for option, value in arguments.items():
        odd = [x for x in _floats(value) if math.isnan(x) or (math.isinf(x) and key in _FINITE)]
        if odd:
            raise RecipeError(f"{source}: {key}.{option}: {odd[0]} is not a finite number")
    return Component(key, cls, arguments, source)


def _check_duration(where: str, value: Any, numbers: str) -> None:
    """Raise a RecipeError for a time that has a wrong unit or form, or is not above 0.

    Without this check jsonargparse and Lightning report such a time in terms of their own code, or accept it.
    """
    amounts: dict[Any, Any] = {}
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d):(\d\d)", value.strip())):
        amounts = dict(zip(("days", "hours", "minutes", "seconds"), map(int, match.groups()), strict=True))
    elif isinstance(value, Mapping):
        amounts = dict(value)
    elif isinstance(value, int | float) and numbers:
        return
    else:
        expected = f"{numbers}a time as DD:HH:MM:SS, or a mapping such as {{hours: 12}}"
        raise RecipeError(f"{where}: expected {expected}, not {shown(value)}")
    for unit, amount in amounts.items():
        if unit not in _UNITS:
            raise RecipeError(f"{where}: {unknown_name('unit of time', unit, _UNITS)}")
        if not isinstance(amount, int) or isinstance(amount, bool):
            raise RecipeError(f"{where}.{unit}: expected a whole number, not {shown(amount)}")
    try:
        duration = timedelta(**amounts)
    except OverflowError:
        raise RecipeError(f"{where}: {shown(value)} is longer than a time can be, {timedelta.max.days} days") from None
    if duration <= timedelta(0):
        raise RecipeError(f"{where}: must be above 0, not {shown(value)}")


@functools.lru_cache
def _parser(cls: type, skip: frozenset[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, parser_mode="recipe")
    parser.add_class_arguments(cls, "options", skip=set(skip), instantiate=False, fail_untyped=False)
    return parser


@functools.lru_cache
def accepted_options(cls: type, skip: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The names of the options of a class, those of its bases that it passes on among them."""
    defaults = _parser(cls, skip).get_defaults().get("options")
    return tuple(vars(defaults)) if defaults is not None else ()


def _takes_none(cls: type, option: str) -> bool:
    """Whether the option's type has None, or is not known."""
    parameter = inspect.signature(cls).parameters.get(option)
    if parameter is None or parameter.default is None:
        return True
    try:
        hint = typing.get_type_hints(cls.__init__).get(option, Any)  # type: ignore[misc]
    except (NameError, TypeError):  # of types imported for checkers only
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return bool({types.NoneType, Any} & set(typing.get_args(hint)))
    return hint in (Any, object, types.NoneType) or not isinstance(hint, type)


def _floats(value: Any) -> Iterator[float]:
    """The numbers with a fraction in a value and in the lists and mappings in it."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_floats, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_floats, value))


def given_options(spec: Any) -> Mapping[str, Any]:
    """The options in what :func:`split_spec` takes, which need not be right."""
    if not isinstance(spec, Mapping):
        return {}
    return spec.get("init_args", {}) if "class_path" in spec else spec


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def reason(error: BaseException) -> str:
    """The message on one line, after the kind of error where that says more."""
    text = one_line(error)
    return text if isinstance(error, ValueError | TypeError) and text else f"{type(error).__name__}: {text}"


def _in_words(text: str) -> str:
    """What jsonargparse says of an option within an option, without its parser's terms and repetitions."""
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors:", r"expected \1", text
    )
    text = re.sub(r'Parser key "([^"]*)": *', r"\1: ", text)
    text = re.sub(r"<(?:class|enum) '(?:\w+\.)*(\w+)'>|typing\.Literal\[([^\]]*)\]", r"\1\2", text)
    text = re.sub(r"\bExpected an? ", "expected ", text)
    return text.replace("NoneType", "null")


def _blame(error: BaseException, key: str, options: Mapping[str, Any]) -> str:
    """Which option jsonargparse refuses, and what it expected, without its parser's names."""
    text = one_line(error, longest=5000)
    required = re.search(r"required: ((?:options\.\w+(?:, )?)+)", text)
    if required:
        return f"{key}: {required[1].replace('options.', '')} must be given"
    option = (re.search(r"options\.(\w+)", text) or ["", ""])[1]
    value = options.get(option)
    found = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[([^\]]*)\])", text)
    accepted = dict.fromkeys("null" if kind == "NoneType" else kind or choices for kind, choices in found)
    if re.search("callable class|dot import path|class_path", text):
        accepted["package.module.Class"] = None
        of_class = r"(?:given class_path '[^']*'|callable class): (.*?)\.?"
        end = r"(?: Got value: .*?)?(?: - (?:expected|Import path|Not a) | Given value|$)"
        why = re.search(of_class + end, _in_words(text))
        if option and why and (isinstance(value, Mapping) or (isinstance(value, str) and "." in value)):
            return f"{key}.{option}: {shown(value)} is not accepted: {why[1]}"
    if option and set(accepted) - {"null"}:
        return f"{key}.{option}: expected {' or '.join(accepted)}, not {shown(value)}"
    message = re.sub(r'^.*?Parser key "[^"]*": *', "", text)
    if not option:  # a class within an option refuses its own: the last of the reasons why no type fits
        return f"{key}: {text.partition(' Given value')[0].rpartition(' - ')[2]}"
    return f"{key}.{option}: {shown(value)} is not accepted: {message}"
