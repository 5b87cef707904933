"""Finding the normalization layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from normzoo._errors import near_matches
from normzoo.convert._kinds import LOOKED_FOR, Source, kind_of, read

Selector = str | type | Callable[[str, nn.Module], bool]
Selectors = Selector | Iterable[Selector]

_FREE = ("ScaledStdConv", "ScaledConv")  # timm's and ours, of networks without norms
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")


@dataclass(frozen=True)
class Site:
    """Where a normalization layer stands.

    Attributes:
        name: its dotted name, the first one if it is shared.
        places: (parent, attribute) of every place that holds it.
        module: the layer.
        source: what it is.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    module: nn.Module
    source: Source

    def put(self, layer: nn.Module) -> None:
        """Put a layer into every place."""
        for parent, attribute in self.places:
            parent._modules[attribute] = layer
            if isinstance(parent, nn.TransformerEncoderLayer):
                _choose_path(parent)


def _choose_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep torch's encoder layer from its fast path, which computes layer norm whatever its norms are."""
    fast = {F.relu: 1, nn.ReLU: 1, F.gelu: 2, nn.GELU: 2}
    plain = type(layer.norm1) is nn.LayerNorm and type(layer.norm2) is nn.LayerNorm
    activation: Any = layer.activation
    layer.activation_relu_or_gelu = fast.get(activation, fast.get(type(activation), 0)) if plain else 0


def find_sites(model: nn.Module, include: Selectors | None = None, exclude: Selectors | None = None) -> list[Site]:
    """The normalization layers of a model in the order of their registration, each once.

    Args:
        model: any module.
        include: which to take: patterns of dotted names (as of ``fnmatch``), types, or predicates
            ``(name, module) -> bool``, one or several of which any may hold; None for all.
        exclude: which to leave, likewise; None for none.

    Raises:
        ValueError: if there are none, or for one that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_wrapped(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    sites: list[Site] = []
    problems: list[str] = []
    seen: list[str] = []
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # a part of a norm layer, as SplitBatchNorm2d has some
        try:
            if kind_of(module) is None:
                continue
            seen.append(name)
            inside = f"{name}."
            if not _chosen(name, module, include, exclude):
                continue
            if module is model:
                raise ValueError("it is the model itself, which has no place to put another; use create_norm")
            sites.append(Site(name, tuple(places[id(module)]), module, read(module)))
        except ValueError as error:
            if _chosen(name, module, include, exclude):
                problems.append(f"{name or type(module).__name__}: {error}")
    if problems:
        raise ValueError(
            f"{len(problems)} normalization layer{'s' * (len(problems) > 1)} cannot be converted; exclude them or "
            f"change them first. {'; '.join(problems[:3])}{'; ...' * (len(problems) > 3)}"
        )
    _check_patterns(seen, include, exclude)
    if not sites:
        rest = f"; {len(seen)} there are, none chosen by include and exclude" if seen else ""
        if any(type(m).__name__.startswith(_FREE) for m in model.modules()):
            rest += "; it is made to do without: its convolutions standardize their weights"
        raise ValueError(
            f"{type(model).__name__} has no normalization layer to convert{rest}. Looked for: {LOOKED_FOR}"
        )
    return sites


def _check_patterns(names: list[str], *selectors: Selectors | None) -> None:
    """Raise a ValueError for a pattern that fits no norm layer's name, which is a mistake to be told of."""
    for given in selectors:
        several: Iterable[Any] = (
            (given,) if isinstance(given, str) else given if isinstance(given, list | tuple) else ()
        )
        for pattern in several:
            if isinstance(pattern, str) and names and not fnmatch.filter(names, pattern):
                near = near_matches(pattern, names)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"no normalization layer's name matches {pattern!r}{hint}")


def refuse_wrapped(model: nn.Module) -> None:
    """Raise a ValueError for a model whose wrapper keeps a list of its parameters, or that is compiled to a script."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
                where = f" at {name!r}" if name else ""
                raise ValueError(
                    f"the model is wrapped in {cls.__name__}{where}, which would not know the new layers' parameters: "
                    "convert first, then wrap"
                )
            if cls.__name__ == "ScriptModule":
                raise ValueError("a ScriptModule cannot be changed: convert the model that it was made from")


def _chosen(name: str, module: nn.Module, include: Selectors | None, exclude: Selectors | None) -> bool:
    wanted = include is None or _holds(include, name, module)
    return wanted and not (exclude is not None and _holds(exclude, name, module))


def _holds(selectors: Selectors, name: str, module: nn.Module) -> bool:
    several = (selectors,) if isinstance(selectors, str | type) or callable(selectors) else tuple(selectors)
    for selector in several:
        if isinstance(selector, str):
            if fnmatch.fnmatchcase(name, selector):
                return True
        elif isinstance(selector, type):
            if isinstance(module, selector):
                return True
        elif callable(selector):
            if selector(name, module):
                return True
        else:
            raise TypeError(f"include and exclude take name patterns, types and predicates, not {selector!r}")
    return False
