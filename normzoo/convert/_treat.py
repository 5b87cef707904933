"""What modules of unknown classes are, as a user says it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normzoo._errors import near_matches
from normzoo.convert._behaviour import takes_only
from normzoo.convert._families import Recognised
from normzoo.convert._kinds import Source
from normzoo.convert._recognise import as_source, recognise, vectors_of
from normzoo.recognition import KINDS
from normzoo.registry import norm_info

Treat = Mapping[str, str | Mapping[str, Any]]

# Where a module holds a tensor whose attribute is not named.
_CALLED = {
    "weight": ("weight", "gamma", "scale", "gain", "g", "a_2", "alpha", "w"),
    "bias": ("bias", "beta", "shift", "offset", "b", "b_2"),
    "running_mean": ("running_mean", "moving_mean", "mean"),
    "running_var": ("running_var", "moving_var", "moving_variance", "var"),
}
_NUMBERS = {
    "eps": ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "groups": ("groups", "num_groups", "n_groups"),
    "momentum": ("momentum",),
}
_KEYS = ("name", "channel_dim", *_NUMBERS, *_CALLED, "add_unit_offset", "unbiased")
_OVER_CHANNELS = ("layer_channel", "rms", "positional", "simple norm", "dynamic_tanh", "derf")


class Treatments:
    """The norms that a user names for modules, by patterns of their names.

    Raises:
        TypeError: for anything but names and mappings, or for a key that is not known.
        UnknownNameError: a ValueError, for a norm that is not registered.
    """

    def __init__(self, treat: Treat | None) -> None:
        if treat is not None and not isinstance(treat, Mapping):
            raise TypeError(f"treat must be a mapping {{name pattern: norm}}, not {type(treat).__name__}")
        self._said = {pattern: _checked(pattern, said) for pattern, said in (treat or {}).items()}
        self._used: set[str] = set()

    def source_of(self, name: str, module: nn.Module) -> Source | None:
        """What a module is by the first pattern that fits its name; None if none does.

        Raises:
            ValueError: if its tensors are not those of the norm.
        """
        for pattern, said in self._said.items():
            if fnmatch.fnmatchcase(name, pattern) and vectors_of(module) is not None:
                self._used.add(pattern)
                return _source(module, said)
        return None

    def check(self, known: Sequence[str], candidates: Sequence[str]) -> None:
        """Raise a ValueError for a pattern that no module of an unknown class fits."""
        for pattern in self._said.keys() - self._used:
            if of_known := fnmatch.filter(known, pattern):
                raise ValueError(f"treat says what {of_known[0]} is, and its class is known already; leave it out")
            near = near_matches(pattern, candidates)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"treat names {pattern!r}, and no module that may be a norm has such a name{hint}")


def _checked(pattern: str, said: Any) -> dict[str, Any]:
    if isinstance(said, str):
        said = {"name": said}
    if not isinstance(said, Mapping) or "name" not in said:
        raise TypeError(f"treat[{pattern!r}] must be a norm's name or a mapping with its name, not {said!r}")
    for key in said:
        if key not in _KEYS:
            near = near_matches(str(key), _KEYS)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"treat[{pattern!r}] has no key {key!r}{hint} Keys: {', '.join(_KEYS)}")
    if said.get("channel_dim", 1) not in (1, -1):
        raise ValueError(f"treat[{pattern!r}] has channel_dim={said['channel_dim']!r}; it must be 1 or -1")
    name = said["name"]
    if name not in {kind.name for kind in KINDS.values()}:
        name = norm_info(name).name
    return {**said, "name": name}


def _source(module: nn.Module, said: Mapping[str, Any]) -> Source:
    found = recognise(module) if set(said) == {"name"} else None
    if isinstance(found, Recognised) and found.name == said["name"]:
        return as_source(module, found)
    channels, vectors = vectors_of(module) or (0, {})
    roles: dict[str, str] = {}
    for role, names in _CALLED.items():
        if role in said:
            if said[role] not in vectors:
                raise ValueError(f"treat names {said[role]!r} as its {role}, and it holds {', '.join(vectors)}")
            roles[role] = said[role]
        elif (held := next((n for n in names if n in vectors and n not in said.values()), None)) is not None:
            roles[role] = held
    if lost := [n for n in module._parameters if module._parameters[n] is not None and n not in roles.values()]:
        raise ValueError(
            f"its parameter {lost[0]} is neither weight nor bias by its name: say what it is, as in "
            f"{{'name': {said['name']!r}, 'weight': {lost[0]!r}}}"
        )
    options = {
        option: said[option] if option in said else getattr(module, next(n for n in names if hasattr(module, n)))
        for option, names in _NUMBERS.items()
        if option in said or any(hasattr(module, n) for n in names)
    }
    if "unbiased" in said:
        options["unbiased"] = bool(said["unbiased"])
    if "groups" in options and said["name"] != "group":
        del options["groups"]
    default = -1 if said["name"] in _OVER_CHANNELS else 1
    dim = said["channel_dim"] if "channel_dim" in said else takes_only(module, channels) or default
    offset = bool(said.get("add_unit_offset", False))
    text = f"{said['name']}, as treat says"
    return as_source(module, Recognised(said["name"], dim, channels, roles, offset, options, {}, text))
