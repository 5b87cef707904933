"""Settings of runs, by their dotted keys: which differ, which one is the seed, and what a short name for a key is."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from normzoo.report.run import Run

# Recipes have the first; the others are LightningCLI's and what hyperparameters are called
SEEDS = ("seed", "seed_everything", "random_seed", "random_state", "manual_seed", "rng_seed")
_TRANSPARENT = ("name", "class_path", "init_args")  # keys that say what the mapping above them is
_NAMED = re.compile(r"[^.]*(\.\d+)*$")  # the end of a key from its last name on


def seed_key(config: Mapping[str, Any]) -> str | None:
    """The key of the seed among the settings of a run; None if there is none."""
    return next((key for key in SEEDS if key in config), None)


def seed_of(run: Run) -> Any:
    """The seed of a run; None if its settings do not tell."""
    key = seed_key(run.config)
    return None if key is None else run.config[key]


def settings_of(run: Run) -> dict[str, Any]:
    """The values of a run's recipe or hyperparameters by their dotted keys, without the seed.

    Example:
        >>> from types import SimpleNamespace
        >>> settings_of(SimpleNamespace(config={"model": {"norm": {"name": "group", "groups": 8}}, "seed": 1}))
        {'model.norm': 'group', 'model.norm.groups': 8}
    """
    seed = seed_key(run.config)
    return {key: value for key, value in leaves(run.config) if key != seed}


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a recipe by their dotted keys; a name, or the path of a class, stands for a mapping with it.

    Example:
        >>> [*leaves({"norm": {"class_path": "mine.Norm", "init_args": {"eps": 0.1}}})]
        [('norm', 'mine.Norm'), ('norm.eps', 0.1)]
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, key if key and name in _TRANSPARENT else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from leaves(part, f"{key}.{place}")
    else:
        yield key, value


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ among the settings, in their order. One that is not there is as one that is null."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({identity(setting.get(key)) for setting in settings}) > 1]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ, without the seed.

    A setting that only recipes have, or only hyperparameters of other logs, does not differ because others lack it;
    runs without settings do not count.
    """
    by_kind: dict[bool, list[dict[str, Any]]] = {}
    for run in runs:
        if run.config:
            by_kind.setdefault(run.of_recipe, []).append(settings_of(run))
    every = [setting for settings in by_kind.values() for setting in settings]
    differ = {key for settings in by_kind.values() for key in differing_keys(settings)}
    keys = dict.fromkeys(key for setting in every for key in setting)
    shared = {key: {identity(s[key]) for s in every if key in s} for key in keys}
    return [key for key in keys if key in differ or len(shared[key]) > 1]


def identity(value: Any) -> Any:
    """A hashable stand-in that is the same for the same value: 1 and 1.0 are the same, 1 and True are not."""
    if is_number(value):
        return float(value)
    return json.dumps(value, default=str, sort_keys=True)


def is_number(value: Any) -> bool:
    """Whether it is a number, and neither True nor False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, with a name in it, if it is that of no other one.

    Example:
        >>> short_key("optimizer.lr", ["optimizer.lr", "model.norm"]), short_key("a.eps", ["a.eps", "b.eps"])
        ('lr', 'a.eps')
    """
    last = [_NAMED.search(other)[0] for other in (key, *keys)]  # type: ignore[index]
    return last[0] if last[1:].count(last[0]) == 1 else key


def text_of_setting(value: Any) -> str:
    """A setting in a label: as it stands in a recipe."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def column(values: Sequence[Any]) -> pd.Series:
    """Values as a column: int64, or Int64 if some are None; float64, with NaN for None; bool; else object."""
    known = [value for value in values if value is not None]
    kinds = {type(value) for value in known}
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in known):
        return pd.Series(values, dtype="int64" if len(known) == len(values) else "Int64")
    if float in kinds and kinds <= {int, float}:
        return pd.Series([float("nan") if value is None else float(value) for value in values], dtype="float64")
    if kinds == {bool} and len(known) == len(values):
        return pd.Series(values, dtype="bool")
    return pd.Series(values, dtype="object")


def column_name(key: str, taken: Collection[str]) -> str:
    """The column of a setting in a frame that has columns of other names too."""
    return f"recipe.{key}" if key in taken else key
