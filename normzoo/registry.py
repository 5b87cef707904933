"""One registry of normalization layers: names, what they are, and how to make them.

Importing this module does not import torch; a layer's class is imported when it is first used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from normzoo._entries import ENTRIES
from normzoo._errors import UnknownNameError, near_matches, unknown_name

if TYPE_CHECKING:
    from torch import nn

_SHARED_ARGUMENTS = ("self", "num_features", "device", "dtype")
_MARK = "_channel_dim_of_norm"  # copied and pickled with the module
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class NormInfo:
    """What the registry knows of a layer.

    Attributes:
        name: the canonical name.
        family: what the statistics are taken over: ``batch``, ``sample``, ``mixed`` (both), ``none`` or
            ``weight`` (of convolutions).
        summary: one line.
        paper: authors, year and arXiv number.
        batch_statistics: whether training output depends on the other samples of the batch.
        target: ``"module:Class"``.
        aliases: other names, timm's spellings among them.
        exceptions: promises of the conformance suite that the layer cannot keep by its nature, as
            {check: reason}; the suite holds the layer to breaking them.
    """

    name: str
    family: str
    summary: str
    paper: str
    batch_statistics: bool
    target: str
    aliases: tuple[str, ...] = field(default=())
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def layer_class(self) -> type[nn.Module]:
        """The layer's class, imported now."""
        module, _, qualname = self.target.partition(":")
        cls: Any = importlib.import_module(module)
        for part in qualname.split("."):
            cls = getattr(cls, part)
        return cls

    @property
    def options(self) -> dict[str, Any]:
        """The layer's keyword options and their defaults (imports the class)."""
        parameters = inspect.signature(self.layer_class).parameters
        return {k: p.default for k, p in parameters.items() if k not in _SHARED_ARGUMENTS}


_WEIGHT_METHODS = {"weight_standardized": "ws", "scaled_ws": "scaled_ws"}
_NORMS: dict[str, NormInfo] = {}
_ALIASES: dict[str, str] = {}
_BY_TARGET: dict[str, str] = {}  # of layers: what standardizes weights is no layer


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _add(info: NormInfo) -> None:
    taken = {_plain(n): n for n in _NORMS} | _ALIASES
    for name in (info.name, *info.aliases):
        if _plain(name) in taken:
            raise ValueError(f"the norm name {name!r} is already taken by {taken[_plain(name)]!r}")
    _NORMS[info.name] = info
    if info.family != "weight":
        _BY_TARGET.setdefault(info.target, info.name)
    _ALIASES.update({_plain(a): info.name for a in (info.name, *info.aliases)})


for _entry in ENTRIES:
    _add(NormInfo(**_entry))


def list_norms(family: str | None = None) -> list[str]:
    """The canonical names of all registered layers, sorted; those of one family if given.

    The family ``weight`` is not of layers but of what :func:`normzoo.create_model` can do to the weights of
    convolutions, and is listed only when asked for.

    Raises:
        UnknownNameError: a ValueError, for a family that no layer has.

    Example:
        >>> "batch_renorm" in list_norms("batch")
        True
    """
    families = {info.family for info in _NORMS.values()}
    if family is not None and family not in families:
        raise UnknownNameError(unknown_name("norm family", family, families))
    return sorted(n for n, info in _NORMS.items() if (info.family == family if family else info.family != "weight"))


def norm_info(name: str) -> NormInfo:
    """What is known of a layer, by canonical name or alias.

    Raises:
        UnknownNameError: a ValueError that gives the nearest names.

    Example:
        >>> norm_info("BatchNorm2d").name
        'batch'
    """
    canonical = _ALIASES.get(_plain(name)) if isinstance(name, str) else None
    if canonical is None:
        raise UnknownNameError(unknown_name("norm", name, _NORMS))
    return _NORMS[canonical]


def norm_name(cls: type) -> str | None:
    """The canonical name of a layer's class, None for other classes, those of standardized weights too.

    Example:
        >>> from normzoo.layers import GroupNorm
        >>> norm_name(GroupNorm), norm_name(dict)
        ('group', None)
    """
    return _BY_TARGET.get(target_of(cls))


def target_of(cls: type) -> str:
    """The target, ``"module:Class"``, that a class of layers has or would have in the registry.

    A layer may have another class for some of its options: that one has the target of the registered class.
    """
    return f"{cls.__module__}:{vars(cls).get('_registered_as', cls.__qualname__)}"


def layer_name(layer: object) -> str | None:
    """The canonical name of a layer, by its class or one that this is derived from; None for other objects.

    Example:
        >>> layer_name(create_norm("batch", 8)), layer_name("batch")
        ('batch', None)
    """
    return next((name for cls in type(layer).__mro__ if (name := norm_name(cls))), None)


def mark_as_norm(module: nn.Module, channel_dim: int) -> None:
    """Note on a module that it is a normalization layer, whatever its class, and where its channels are."""
    setattr(module, _MARK, channel_dim)


def marked_channel_dim(module: nn.Module) -> int | None:
    """Where the channels of a module marked as a normalization layer are; None for others."""
    return vars(module).get(_MARK)


def split_weight_method(name: str) -> tuple[str, str | None]:
    """The norm and what it asks of the weights of convolutions: ``"ws"``, ``"scaled_ws"`` or None.

    Raises:
        UnknownNameError: a ValueError, for an unknown method after the plus sign.
        ValueError: for weight standardization without a norm, as it does not take a norm's place.

    Example:
        >>> split_weight_method("group+ws"), split_weight_method("scaled_ws"), split_weight_method("batch")
        (('group', 'ws'), ('none', 'scaled_ws'), ('batch', None))
    """
    norm, plus, after = name.partition("+") if isinstance(name, str) else (name, "", "")
    if plus:
        return norm, weight_method(after)
    method = _find_weight_method(norm)
    if method == "ws":
        raise ValueError(f"{name!r} goes beside a norm; name both, as in 'group+ws', or 'none+ws' for no norm")
    return (norm, None) if method is None else ("none", method)


def weight_method(name: str) -> str:
    """The canonical name, ``"ws"`` or ``"scaled_ws"``, of a method for the weights of convolutions.

    Raises:
        UnknownNameError: a ValueError that gives the nearest names.
    """
    method = _find_weight_method(name)
    if method is None:
        raise UnknownNameError(unknown_name("method for weights", name, _WEIGHT_METHODS.values()))
    return method


def _find_weight_method(name: str) -> str | None:
    return _WEIGHT_METHODS.get(_ALIASES.get(_plain(name), "")) if isinstance(name, str) else None


def get_norm(name: str, **options: Any) -> Callable[..., nn.Module]:
    """A factory ``num_features -> layer`` with the options bound; timm's ``norm_layer=`` accepts it.

    Raises:
        UnknownNameError: a ValueError, for a name that is not registered.
        TypeError: for an option the layer does not have.

    Example:
        >>> get_norm("group", groups=4)(16)
        GroupNorm(16, eps=1e-05, affine=True, groups=4)
    """
    norm, method = split_weight_method(name)
    if method is not None:
        raise ValueError(
            f"{name!r} changes the weights of convolutions, which a layer cannot: use "
            f"normzoo.create_model(..., norm={name!r}), or this norm and normzoo.standardize_weights(model, {method!r})"
        )
    info = norm_info(norm)
    valid = info.options
    for option in options:
        if option not in valid:
            near = near_matches(option, valid)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"norm {info.name!r} has no option {option!r}{hint} Options: {', '.join(valid)}")
    return functools.partial(info.layer_class, **options)


def create_norm(name: str, num_features: int, **options: Any) -> nn.Module:
    """Make one layer for ``num_features`` channels.

    Args:
        name: canonical name or alias.
        num_features: number of channels.
        **options: the layer's own (``norm_info(name).options``), and ``device`` and ``dtype``.

    Raises:
        UnknownNameError: a ValueError, for a name that is not registered.
        TypeError: for an option the layer does not have.
        ValueError: for options or channels the layer refuses.

    Example:
        >>> create_norm("batch", 8)
        BatchNorm(8, eps=1e-05, affine=True, momentum=0.1)
    """
    placement = {k: options.pop(k) for k in ("device", "dtype") if k in options}
    return get_norm(name, **options)(num_features, **placement)


def register_norm(
    name: str,
    *,
    family: str,
    paper: str = "",
    summary: str = "",
    batch_statistics: bool = False,
    aliases: tuple[str, ...] = (),
    exceptions: Mapping[str, str] | None = None,
) -> Callable[[_Class], _Class]:
    """Class decorator that adds a layer to the registry under ``name``.

    The class takes ``num_features`` first, its options keyword-only, then ``device`` and ``dtype``.

    Args:
        name: short and plain, lower case.
        family: what the statistics are taken over: ``batch``, ``sample``, ``none`` or a word of your own.
        paper: source.
        summary: one line; by default the first line of the class's docstring.
        batch_statistics: whether training output depends on the other samples of the batch.
        aliases: other names.
        exceptions: promises of the conformance suite that the layer cannot keep, as {check: reason}.

    Raises:
        ValueError: if a name is taken.
        TypeError: if the class swallows unknown options with ``**kwargs``, so that a typo would go unnoticed.
    """

    def decorate(cls: _Class) -> _Class:
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values()):
            raise TypeError(f"{cls.__name__} takes **kwargs, which would hide a mistyped option; name its options")
        line = summary or (inspect.getdoc(cls) or "").partition("\n")[0]
        target = f"{cls.__module__}:{cls.__qualname__}"
        known = dict(exceptions or {})
        _add(_Registered(name, family, line, paper, batch_statistics, target, tuple(aliases), known, cls))
        return cls

    return decorate


@dataclass(frozen=True)
class _Registered(NormInfo):
    """An entry that holds its class, which may live where no import finds it (a notebook, a function)."""

    cls: Any = None

    @property
    def layer_class(self) -> type[nn.Module]:
        return self.cls
