"""The zoo's names in timm's own factories: ``timm.create_model("resnet18", norm_layer="batch_renorm")``."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm
from timm.layers import create_norm, create_norm_act
from timm.layers.create_act import create_act_layer
from torch import Tensor, nn

from normzoo.convert._replace import groups_for
from normzoo.registry import create_norm as create_zoo_norm
from normzoo.registry import list_norms, norm_info, norm_name

_TABLES: dict[tuple[Any, str], Any] = {
    (create_norm, "_NORM_MAP"): dict,
    (create_norm_act, "_NORM_ACT_MAP"): dict,
    (create_norm_act, "_NORM_ACT_REQUIRES_ARG"): set,
    (create_norm_act, "get_norm_act_layer"): Callable,
}
_PASSED_TO_ALL = ("eps", "momentum")
_UNASKED = "unasked"
_timms_get_norm_act_layer = getattr(create_norm_act, "get_norm_act_layer", None)


def register() -> None:
    """Put every name of the zoo into timm's factories of norms, with and without activation.

    Canonical names and aliases, those of :func:`normzoo.register_norm` too (call it again after a later one), go
    wherever timm takes the name of a norm: ``timm.create_model(..., norm_layer="batch_renorm")``,
    ``create_norm_layer``, ``get_norm_layer``, ``create_norm_act_layer`` and ``get_norm_act_layer``, which then takes
    ``normzoo.get_norm("group")`` as well. A name that timm knows keeps timm's layer (``"batchnorm"``; with activation
    ``"evonorm_s0"``).

    ``groups`` is chosen as by :func:`normzoo.convert_norms`: a divisor of the channels, by default so that each has 16
    channels or there are 32. With activation, norms that have one of
    their own (``evonorm_s0``, ``evonorm_b0``, ``filter_response``) apply that instead of the model's; without, or with
    ``apply_act=False``, none. ``eps`` and ``momentum`` are ignored by norms without them, as timm's models pass them
    to all.

    timm does not say where a model has its channels, so that these layers take images (N, C, H, W) and refuse the
    tokens (N, L, C) of transformers: :func:`normzoo.create_model` gives these any norm.

    Raises:
        RuntimeError: if this version of timm keeps its names elsewhere.

    Example:
        >>> register()
        >>> timm.layers.create_norm_act_layer("group", 48, act_layer="silu")
        GroupNorm(
          48, eps=1e-05, affine=True, groups=3, act_layer=<class 'torch.nn.modules.activation.SiLU'>
          (act): SiLU(inplace=True)
        )
        >>> unregister()
    """
    norms, fused, takes_activation = _tables()
    takes_activation.add(_layer)
    for name in list_norms():
        entry = functools.partial(_layer, zoo_norm=name)
        for known in (name, *norm_info(name).aliases):
            key = known.replace("_", "").lower()
            norms.setdefault(key, entry)
            if fused.setdefault(key.split("-")[0], entry) is entry:
                takes_activation.add(entry)
    _exchange(_timms_get_norm_act_layer, _get_norm_act_layer)


def unregister() -> None:
    """Undo :func:`register`; models made since keep their layers."""
    norms, fused, takes_activation = _tables()
    for table in (norms, fused):
        for key in [k for k, entry in table.items() if _is_ours(entry)]:
            del table[key]
    takes_activation -= {entry for entry in takes_activation if _is_ours(entry)}
    _exchange(_get_norm_act_layer, _timms_get_norm_act_layer)


def _tables() -> tuple[dict[str, Any], dict[str, Any], set[Any]]:
    """Timm's norms by name, those with activation, and which of these take one."""
    for (module, name), kind in _TABLES.items():
        if not isinstance(getattr(module, name, None), kind):
            raise RuntimeError(
                f"timm {timm.__version__} has no {module.__name__}.{name}, through which normzoo adds its names: pass "
                "norm_layer=normzoo.get_norm(...), or use normzoo.create_model"
            )
    act: Any = create_norm_act
    return vars(create_norm)["_NORM_MAP"], act._NORM_ACT_MAP, act._NORM_ACT_REQUIRES_ARG


def _is_ours(entry: Any) -> bool:
    return getattr(entry, "func", entry) is _layer


def _exchange(old: Any, new: Any) -> None:
    """Exchange timm's function in every module of timm that has imported it: it knows classes by their bare names."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "timm" and vars(module).get("get_norm_act_layer") is old:
            module.get_norm_act_layer = new  # type: ignore[attr-defined]


def _get_norm_act_layer(norm_layer: Any, act_layer: Any = None) -> Any:
    """Timm's function, for which a layer of the zoo is what its name stands for."""
    bound = norm_layer.keywords if isinstance(norm_layer, functools.partial) else {}
    if name := _name_of(getattr(norm_layer, "func", norm_layer)):
        norm_layer = functools.partial(_layer, zoo_norm=name, **bound)
    assert _timms_get_norm_act_layer is not None
    return _timms_get_norm_act_layer(norm_layer, act_layer)


def _name_of(cls: Any) -> str | None:
    """The name of a layer's class."""
    name = norm_name(cls) if isinstance(cls, type) else None
    return name if name is not None and issubclass(cls, norm_info(name).layer_class) else None


def _layer(
    num_features: int,
    *,
    zoo_norm: str,
    apply_act: bool | None = None,
    act_layer: Any = _UNASKED,
    act_kwargs: dict[str, Any] | None = None,
    inplace: bool = True,
    drop_layer: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """A layer of the zoo; with dropout and activation where it is asked for with ``act_layer`` or ``apply_act``."""
    known = norm_info(zoo_norm).options
    options = {n: v for n, v in options.items() if n in known or n not in _PASSED_TO_ALL}
    if "groups" in known:
        options["groups"] = groups_for(num_features, options, {}, known["groups"])
    fused = act_layer is not _UNASKED or apply_act is not None
    given = fused and apply_act is not False and act_layer not in (_UNASKED, None)
    activation = functools.partial(_activation, act_layer, act_kwargs, inplace) if given else None
    own = known.get("act_layer")
    if isinstance(own, str):
        options["act_layer"], activation = own if fused and apply_act is not False else None, None
    elif own is not None and fused:  # any activation, inside the formula
        options["act_layer"], activation = activation, None
    layer = create_zoo_norm(zoo_norm, num_features, **options)
    if options.get("channel_dim", 1) == 1:
        layer.register_forward_pre_hook(functools.partial(_refuse_tokens, zoo_norm=zoo_norm, channels=num_features))
    after = {"drop": drop_layer, "act": activation}
    return _followed(layer, {name: make() for name, make in after.items() if make is not None})


def _activation(act_layer: Any, act_kwargs: dict[str, Any] | None, inplace: bool) -> nn.Module:
    return create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})})


def _followed(layer: nn.Module, after: dict[str, nn.Module]) -> nn.Module:
    """The layer with what it applies to its output: within it where it has a place for that."""
    if not after:
        return layer
    if not hasattr(layer, "act"):
        return nn.Sequential(OrderedDict(norm=layer, **after))
    layer.act = next(iter(after.values())) if len(after) == 1 else nn.Sequential(OrderedDict(after))
    if not isinstance(layer.act_layer, str):
        layer.act_layer = type(layer.act)  # type: ignore[assignment]
    return layer


def _refuse_tokens(module: nn.Module, inputs: tuple[Tensor, ...], *, zoo_norm: str, channels: int) -> None:
    """Raise a ValueError for input that does not have its channels at dimension 1, or may have them elsewhere."""
    x = inputs[0]
    if x.ndim == 3 or (x.ndim > 3 and x.shape[1] != channels):
        raise ValueError(
            f"norm_layer={zoo_norm!r} makes layers for images (N, {channels}, H, W), and this model gives one an input "
            f"of shape {tuple(x.shape)}: use normzoo.create_model(..., norm={zoo_norm!r}), which finds where every "
            "model has its channels"
        )
