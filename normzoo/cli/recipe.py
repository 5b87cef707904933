"""Recipes as text: finding, reading, extending and overriding them. Nothing here needs torch."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from normzoo._errors import RecipeError, shown, unknown_name
from normzoo._yaml_text import MAX_DEPTH, load_value, text_of

SECTIONS = (
    *("seed", "model", "data", "trainer", "callbacks", "optimizer", "lr_scheduler", "tensorboard", "experiment"),
    "sweep",
)
REQUIRED = ("model", "data")  # of a training run
MAX_POINTS = 10_000


@dataclass(frozen=True)
class Recipe:
    """A recipe as written, with what it extends and the overrides filled in.

    Attributes:
        source: file it came from, for messages.
        name: file name without its ending.
        config: the sections but ``sweep``.
        grid: values for each dotted key of ``sweep``; lists of values for keys that move together, which stand in one
            text with commas between them.
        notices: on axes of the grid that overrides leave out, in sentences.
    """

    source: str
    name: str
    config: dict[str, Any]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def points(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each point of the grid: a label such as ``norm=batch,lr=0.1`` and its config."""
        axes = [_keys(axis) for axis in self.grid]
        keys = [key for axis in axes for key in axis]
        short = [key.rsplit(".", 1)[-1] for key in keys]
        names = [s if short.count(s) == 1 else key for s, key in zip(short, keys, strict=True)]
        for chosen in itertools.product(*self.grid.values()):
            config = copy.deepcopy(self.config)
            moved = [value if len(axis) > 1 else [value] for axis, value in zip(axes, chosen, strict=True)]
            values = [*itertools.chain.from_iterable(moved)]
            for key, value in zip(keys, values, strict=True):
                _assign(config, key, copy.deepcopy(value), self.source)
            pairs = zip(names, values, strict=True)
            yield ",".join(f"{name}={label(value)}" for name, value in pairs), config


def shipped() -> dict[str, str]:
    """The recipes in the package: name -> text."""
    folder = resources.files("normzoo.recipes")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def header(text: str) -> dict[str, list[str]]:
    r"""The fields of the comment that a recipe begins with, such as ``Time``, with their lines; ``""`` is the question.

    Example:
        >>> header("# Is it so?\n# Command:  normzoo run a\n#           normzoo run b\n# Time:     1 minute\nseed: 1")
        {'': ['Is it so?'], 'Command': ['normzoo run a', 'normzoo run b'], 'Time': ['1 minute']}
    """
    fields: dict[str, list[str]] = {"": []}
    field = ""
    for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()):
        if match := re.match(r"# ([A-Z][a-z]+): +(\S.*)", line):
            field = match[1]
            fields[field] = []
        content = match[2] if match else line.lstrip("#")
        fields[field] += [content.strip()] if content.strip() else []
    return fields


def find(name: str) -> tuple[str, str]:
    """(source, text) of a recipe, by path if it ends in .yaml or .yml or has a folder, else by name.

    Raises:
        RecipeError: if there is none; the message gives the nearest names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return name, text_of(name)
    texts = shipped()
    if name not in texts:
        raise RecipeError(f"{unknown_name('recipe', name, texts)} A file's name ends in .yaml.")
    return f"{name}.yaml", texts[name]


def read(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply ``key.sub=value`` overrides.

    Raises:
        RecipeError: for what cannot be read, unknown sections, or malformed overrides and grids.
    """
    source, config = _read_extended(name, seen=())
    notices = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"{shown(override)} is not an override; write KEY=VALUE, as in optimizer.lr=0.01")
        where = f"override {shown(override)}"
        if dotted == "extends":
            raise RecipeError(f"{where}: extends: stands only in a file; give that recipe's name instead")
        _check_dotted(dotted, where)
        notices += [
            f"sweep: the axis {axis!r} is left out, as {dotted} is given" for axis in _drop_axes(config, dotted)
        ]
        _assign(config, dotted, load_value(text, where), where)
    missing = [s for s in REQUIRED if s not in config and not is_experiment(config)]
    if missing:
        raise RecipeError(
            f"{source}: the section {missing[0]!r} is missing; a recipe has {', '.join(REQUIRED)}, or an experiment"
        )
    grid = _check_grid(config.pop("sweep", None), config, source)
    return Recipe(source, Path(source).stem, config, grid, tuple(notices))


def is_experiment(config: Mapping[str, Any]) -> bool:
    """Whether a config is of an experiment that is no training run."""
    return config.get("experiment") is not None


def label(value: Any) -> str:
    """A short name for a value of a grid, free of characters that a file system refuses."""
    if isinstance(value, Mapping):
        own = "class_path" in value
        given = value.get("init_args") if own else value
        options = dict(given) if isinstance(given, Mapping) else {}
        name = str(value["class_path"]).rsplit(".", 1)[-1] if own else options.pop("name", "")
        inner = ",".join(f"{k}={label(v)}" for k, v in options.items())
        text = f"{name}({inner})" if inner else name
    else:
        text = str(value)
    return re.sub(r"[^\w.,=()+-]+", "_", text)


def _read_extended(name: str, seen: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    source, text = find(name)
    identity = os.path.realpath(name) if name == source else name
    if identity in seen:
        raise RecipeError(f"{source}: extends itself, through {' -> '.join(map(os.path.basename, (*seen, identity)))}")
    if len(seen) > MAX_DEPTH:
        raise RecipeError(f"{source}: more than {MAX_DEPTH} recipes that extend each other")
    config = load_value(text, source)
    if not isinstance(config, dict):
        what = "empty" if config is None else f"the value {shown(config)}"
        raise RecipeError(f"{source}: {what}, but a recipe is a mapping with the keys {', '.join(SECTIONS)}")
    base_name = config.pop("extends", None)
    for section in config:
        _check_section(section, source)
    if base_name is None:
        return source, config
    if not isinstance(base_name, str):
        raise RecipeError(f"{source}: extends: must be the name or path of one recipe, not {shown(base_name)}")
    if base_name.endswith((".yaml", ".yml")) and "/" in source:
        base_name = str(Path(source).parent / base_name)
    try:
        base = _read_extended(base_name, (*seen, identity))[1]
    except RecipeError as error:
        raise RecipeError(f"{source}: extends: {error}") from None
    if "sweep" in config:  # a grid is one thing: axes of two recipes do not multiply
        base.pop("sweep", None)
    return source, _merge(base, config)


def _keys(axis: object) -> list[str]:
    """The dotted keys that an axis of a sweep moves."""
    return [key.strip() for key in str(axis).split(",")]


def _drop_axes(config: dict[str, Any], dotted: str) -> list[str]:
    """A value given by hand takes the place of a sweep over it, over a part of it, or over the whole it is in.

    Returns:
        the axes left out that would have moved other keys as well.
    """
    grid = config.get("sweep")
    if not isinstance(grid, dict):
        return []
    nested = [
        axis
        for axis in grid
        if any(f"{dotted}.".startswith(f"{key}.") or f"{key}.".startswith(f"{dotted}.") for key in _keys(axis))
    ]
    config["sweep"] = {axis: values for axis, values in grid.items() if axis not in nested}
    return [str(axis) for axis in nested if len(_keys(axis)) > 1]


def _check_dotted(dotted: str, where: str) -> None:
    """Refuse a dotted key of no section, with an empty part or with more parts than a recipe has depth."""
    first, *others = dotted.split(".")
    _check_section(first, where)
    if not all(others) or len(others) >= MAX_DEPTH:
        raise RecipeError(f"{where}: expected keys with dots between them, at most {MAX_DEPTH}, as in optimizer.lr")
    if any("\ud800" <= c <= "\udfff" for c in dotted):  # what was no UTF-8 on the command line
        raise RecipeError(f"{where}: the key is not UTF-8 text")


def _check_section(section: Any, where: str) -> None:
    if section not in SECTIONS:
        raise RecipeError(f"{where}: {unknown_name('section', section, (*SECTIONS, 'extends'))}")


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key, unless they name different things; anything else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    for identity in ("name", "class_path"):
        if over.get(identity) not in (None, base.get(identity)):
            return over
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}


def _assign(config: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set a dotted key, where an item of a list is named by its short name or its position."""
    *path, last = dotted.split(".")
    node: Any = config
    for depth, step in enumerate(path):
        at = ".".join(path[: depth + 1])
        if isinstance(node, list):
            i = _position(node, step, at, where)
            if isinstance(node[i], str):
                node[i] = {"name": node[i]}
            node = node[i]
        else:
            if isinstance(node.get(step), str):  # a bare name that is now to get an option
                node[step] = {"name": node[step]}
            if depth == 0 and node.get(step) is None:  # a section without content
                node[step] = {}
            node = node.setdefault(step, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"{where}: {at} is {shown(node)} and has no key {shown(dotted.split('.')[depth + 1])}")
    if isinstance(node, list):
        node[_position(node, last, dotted, where)] = value
    elif "class_path" in node and last not in ("class_path", "init_args"):
        arguments = node.setdefault("init_args", {})
        if not isinstance(arguments, dict):
            raise RecipeError(f"{where}: init_args is {shown(arguments)} and has no key {shown(last)}")
        arguments[last] = value
    else:
        node[last] = value


def _position(items: list[Any], step: str, at: str, where: str) -> int:
    """The place of an item by its short name, the last part of its ``class_path``, or its number from 0."""
    named = [i.get("name", i.get("class_path", "")) if isinstance(i, dict) else i for i in items]
    names = [str(name).rpartition(".")[2] for name in named]
    if step in names:
        return names.index(step)
    if re.fullmatch("[0-9]{1,9}", step) and int(step) < len(items):
        return int(step)
    raise RecipeError(f"{where}: {at}: {unknown_name('item of the list', step, names)}")


def _check_grid(grid: Any, config: dict[str, Any], source: str) -> dict[str, list[Any]]:
    if not grid:
        return {}
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise RecipeError(
            f"{source}: sweep: must give a list of values for each dotted key, as in  optimizer.lr: [0.1, 0.01]"
        )
    axes = {", ".join(_keys(axis)): values for axis, values in grid.items()}
    for axis, values in axes.items():
        for key in (keys := _keys(axis)):
            if key.split(".")[0] == "sweep":
                raise RecipeError(f"{source}: sweep: a sweep cannot be swept over; {shown(key)} is not a key of a run")
            _check_dotted(key, f"{source}: sweep: {shown(key)}")
        wrong = [value for value in values if not (isinstance(value, list) and len(value) == len(keys))]
        if wrong and len(keys) > 1:
            raise RecipeError(
                f"{source}: sweep: {axis} are {len(keys)} keys that move together, so each of their values must be a "
                f"list of {len(keys)}, as in [[batch, 0.1], [none, 0.0001]], not {shown(wrong[0])}"
            )
    keys = [key for axis in grid for key in _keys(axis)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"{source}: sweep: {twice[0]} is swept over twice")
    points = math.prod(map(len, axes.values()))
    if points > MAX_POINTS:
        raise RecipeError(f"{source}: sweep: {points:,} points; at most {MAX_POINTS:,} are accepted")
    return axes
