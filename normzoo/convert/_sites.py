"""Finding the normalization layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from normzoo._errors import near_matches
from normzoo.changes import LeftSite
from normzoo.convert._families import Recognised, Unknown
from normzoo.convert._kinds import Source, kind_of, read
from normzoo.convert._recognise import Recogniser, as_source, vectors_of
from normzoo.convert._treat import Treat, Treatments
from normzoo.recognition import LOOKED_FOR, describe, known_class

Selector = str | type | Callable[[str, nn.Module], bool]
Selectors = Selector | Iterable[Selector]

FOLDED = "_normzoo_folded"  # an attribute of the module that is left where a norm was folded
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


@dataclass(frozen=True)
class Survey:
    """What a search for normalization layers saw.

    Attributes:
        sites: the layers to be changed.
        left: those that are not, and modules of unknown classes that may be norms, with the reasons.
    """

    sites: list[Site]
    left: list[LeftSite]


def find_sites(model: nn.Module, include: Selectors | None = None, exclude: Selectors | None = None) -> list[Site]:
    """The normalization layers of a model whose classes are known; see :func:`survey`."""
    return survey(model, include, exclude, recognise=False).sites


def survey(
    model: nn.Module,
    include: Selectors | None = None,
    exclude: Selectors | None = None,
    treat: Treat | None = None,
    recognise: bool | Collection[str] = True,
    strict: bool = True,
    verb: str = "convert",
    required: bool = True,
) -> Survey:
    """The normalization layers of a model in the order of their registration, each once.

    Args:
        model: any module.
        include: which to take: patterns of dotted names (as of ``fnmatch``), types, or predicates
            ``(name, module) -> bool``, one or several of which any may hold; None for all.
        exclude: which to leave, likewise; None for none.
        treat: what modules of unknown classes are, by patterns of names; see :func:`normzoo.convert_norms`.
        recognise: whether modules of unknown classes are tried; or the names of those to try.
        strict: whether a norm that cannot be read is an error, and not one of those that are left.
        verb: what is to be done to the layers, for messages.
        required: whether it is an error if there are none.

    Raises:
        ValueError: if there are none, or for one that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_wrapped(model, verb)
    treated = Treatments(treat)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    sites: list[Site] = []
    problems: dict[str, str] = {}
    known: list[str] = []
    candidates: list[str] = []
    unknown: dict[str, Unknown] = {}
    left: list[LeftSite] = []
    tried = Recogniser()
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # a part of a norm layer, as SplitBatchNorm2d has some
        try:
            kind, refusal = kind_of(module), None
        except ValueError as error:
            kind, refusal = None, error
        if kind is not None or refusal is not None:
            known.append(name)
            inside = f"{name}."
        elif vectors_of(module) is not None:
            candidates.append(name)
        else:
            continue
        is_norm = kind is not None or refusal is not None
        if why := _not_chosen(name, module, include, exclude, is_norm):
            if is_norm:
                left.append(LeftSite(name, describe(module), None, why))
            continue
        try:
            result: Source | Unknown | None = None
            if kind is not None:
                result = read(module)
            elif (said := treated.source_of(name, module)) is not None:
                result = said
            elif recognise is True or (recognise and name in recognise):
                found = tried(module)
                result = as_source(module, found) if isinstance(found, Recognised) else found
            if isinstance(result, Source) and not is_norm and (why := _not_chosen(name, module, include, exclude)):
                left.append(LeftSite(name, f"{type(module).__name__} ({result.kind.name})", result.num_features, why))
                continue
            if isinstance(result, Source):
                if module is model:
                    raise ValueError("it is the model itself, which has no place to put another; use create_norm")
                sites.append(Site(name, tuple(places[id(module)]), module, result))
            elif refusal is not None:
                raise ValueError(f"{refusal}{f'; tried, {result.text}' if result is not None else ''}")
            elif result is not None:
                unknown[name] = result
                if result.norm_like:
                    left.append(LeftSite(name, describe(module), None, result.text, recognised=False))
        except ValueError as error:
            problems[name or type(module).__name__] = str(error)
            left.append(LeftSite(name or type(module).__name__, describe(module), None, str(error)))
    if problems and strict:
        first = [f"{name}: {text}" for name, text in list(problems.items())[:3]]
        raise ValueError(
            f"{len(problems)} normalization layer{'s' * (len(problems) > 1)} cannot be {verb}ed; exclude them or "
            f"change them first. {'; '.join(first)}{'; ...' * (len(problems) > 3)}"
        )
    treated.check(known, candidates)
    _check_patterns([*known, *candidates], include, exclude)
    if required and not sites and not problems:
        raise ValueError(_nothing(model, known, unknown, verb))
    return Survey(sites, left)


class _Names(frozenset[str]):
    """Names of modules, also as they are called inside of another module, such as a LightningModule."""

    def __contains__(self, name: object) -> bool:
        parts = str(name).split(".")
        return any(super(_Names, self).__contains__(".".join(parts[i:])) for i in range(len(parts)))


def to_try(recognise: Any) -> bool | Collection[str]:
    """What ``recognise=`` asks for: all modules, none, or those that a report names as recognised.

    Raises:
        TypeError: for anything but a truth value or a report.
    """
    if isinstance(recognise, bool):
        return recognise
    names = getattr(recognise, "recognised", None)
    if not isinstance(names, Mapping):
        raise TypeError(f"recognise must be True, False or the report of a conversion, not {recognise!r}")
    return _Names(names)


def recognised_norms(model: nn.Module, recognise: Any) -> dict[nn.Module, int | None]:
    """The modules of unknown classes that are norms by what they compute, and the dimensions of their channels.

    Args:
        model: any module.
        recognise: True to try all that may be norms, False for none, or a report, which names them; the dimension of
            one that cannot be tried here is then None.

    Raises:
        TypeError: for anything but a truth value or a report.
    """
    names, tried = to_try(recognise), Recogniser()
    found: dict[nn.Module, int | None] = {}
    for name, module in model.named_modules():
        if names is False or (names is not True and name not in names) or vectors_of(module) is None:
            continue
        known = known_class(module)
        if known is not None and not known.overridden:
            continue
        seen = tried(module)
        if isinstance(seen, Recognised):
            found[module] = seen.channel_dim
        elif names is not True:
            found[module] = None
    return found


def _nothing(model: nn.Module, known: list[str], unknown: dict[str, Unknown], verb: str) -> str:
    """The message for a model without a norm to convert or fold."""
    rest = f"; {len(known)} there are, none chosen by include and exclude" if known else ""
    if folded_before(model):
        rest += "; it had some, which were folded into the layers beside them"
    if any(type(m).__name__.startswith(_FREE) for m in model.modules()):
        rest += "; it is made to do without: its convolutions standardize their weights"
    text = f"{type(model).__name__} has no normalization layer to {verb}{rest}. Looked for: {LOOKED_FOR}"
    if unknown:
        first = [f"{name} ({u.text})" for name, u in list(unknown.items())[:3]]
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        text += f". Tried and not recognised: {'; '.join(first)}{more}; treat={{name: norm}} says what a module is"
    return text


def folded_before(model: nn.Module) -> bool:
    """Whether norms of the model were folded."""
    return any(FOLDED in vars(m) for m in model.modules())


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


def refuse_wrapped(model: nn.Module, verb: str = "convert") -> None:
    """Raise a ValueError for a model whose wrapper keeps a list of its parameters, or that is compiled to a script."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
                where = f" at {name!r}" if name else ""
                raise ValueError(
                    f"the model is wrapped in {cls.__name__}{where}, which would not know the new layers' parameters: "
                    f"{verb} first, then wrap"
                )
            if cls.__name__ == "ScriptModule":
                raise ValueError(f"a ScriptModule cannot be changed: {verb} the model that it was made from")


def _not_chosen(
    name: str, module: nn.Module, include: Selectors | None, exclude: Selectors | None, is_norm: bool = True
) -> str:
    """Why a module is not to be changed, empty if it is; predicates are asked about norms only, and choose all others.

    Args:
        name: its dotted name.
        module: the module.
        include: see :func:`survey`.
        exclude: see :func:`survey`.
        is_norm: whether the module is known to be a norm.
    """
    if include is not None and not _holds(include, name, module, None if is_norm else True):
        return "include does not choose it"
    excluded = exclude is not None and _holds(exclude, name, module, None if is_norm else False)
    return "exclude leaves it" if excluded else ""


def _holds(selectors: Selectors, name: str, module: nn.Module, answer: bool | None) -> bool:
    """Whether one of the selectors holds; predicates are not called if there is an ``answer`` for them."""
    several = (selectors,) if isinstance(selectors, str | type) or callable(selectors) else tuple(selectors)
    for selector in several:
        if isinstance(selector, str):
            if fnmatch.fnmatchcase(name, selector):
                return True
        elif isinstance(selector, type):
            if isinstance(module, selector):
                return True
        elif callable(selector):
            if selector(name, module) if answer is None else answer:
                return True
        else:
            raise TypeError(f"include and exclude take name patterns, types and predicates, not {selector!r}")
    return False
