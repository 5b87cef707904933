"""What a normalization layer of a known class is in the zoo's terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normzoo.convert._behaviour import takes_only
from normzoo.recognition import INPLACE_ABN, TENSORS, Kind, known_class, qualified
from normzoo.registry import norm_name


@dataclass(frozen=True)
class Source:
    """A layer in the zoo's terms.

    Attributes:
        kind: see :class:`Kind`.
        num_features: C.
        tensors: parameters and buffers by the zoo's names; None for those that it was made without.
        options: those that another layer may take over: ``eps``, ``momentum``, ``groups``, ``sync``.
        after: modules that the layer applies to its normalized output, by name: ``drop``, ``act``.
        own_activation: makes the activation that its formula contains; None where it contains none.
        recognised: the formula in words where the layer was tried, and its class is not known.
        remarks: what is to be said of the layer that takes its place.
        settings: of a layer of the zoo, the options that one of the same kind takes over.
        extras: likewise its further tensors.
    """

    kind: Kind
    num_features: int
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    after: dict[str, nn.Module]
    own_activation: Callable[[], nn.Module] | None
    recognised: str | None = None
    remarks: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor | None] = field(default_factory=dict)


_READ_OTHERWISE = {"num_features", "affine", "bias", "act_layer", "channel_dim", "device", "dtype"}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a normalization layer; None for other modules.

    Raises:
        ValueError: for one that cannot be read.
    """
    known = known_class(module)
    if known is not None and known.overridden:
        raise ValueError(
            f"its class {type(module).__name__} has a forward of its own, so that what it computes is not known"
        )
    return None if known is None else known.kind


def read(module: nn.Module) -> Source:
    """What a normalization layer is.

    Raises:
        ValueError: for a layer that has not seen its first batch, or with weights of more than one dimension.
    """
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{type(module).__name__} is no normalization layer")
    held = {**module._parameters, **module._buffers}
    if any(isinstance(t, UninitializedBuffer | UninitializedParameter) for t in held.values()):
        raise ValueError("it does not know its channels yet; run the model on one batch first")
    tensors = {n: held[n] for n in TENSORS if n in held}
    tensors |= {ours: t.flatten() for theirs, ours in kind.names.items() if (t := held.get(theirs)) is not None}
    options = _options(module, kind)
    if qualified(type(module)) == INPLACE_ABN and isinstance(weight := tensors.get("weight"), Tensor):
        scale = weight.detach().abs() + options["eps"]  # which is what it scales by
        tensors["weight"] = scale.requires_grad_(weight.requires_grad)
    channels = _channels(module, tensors)
    if norm_name(type(module)) and not hasattr(module, "channel_dim") and takes_only(module, channels) == -1:
        kind = replace(kind, channel_dim=-1)
    flat = {n: t for n, t in tensors.items() if t is not None and n != "num_batches_tracked"}
    if any(t.ndim != 1 and t.numel() != channels for t in flat.values()):
        raise ValueError("its weight is not a value for each channel")
    tensors |= {n: t.flatten() for n, t in flat.items() if t.ndim != 1}
    remarks = []
    if kind.name == "instance" and tensors.get("running_var") is not None:
        remarks.append("its running statistics, by which it normalizes in evaluation, are not those of instance norm")
    extras = {n: t for n, t in held.items() if n not in TENSORS} if norm_name(type(module)) else {}
    return Source(
        kind,
        channels,
        tensors,
        options,
        _after(module, kind),
        _own(module, kind),
        remarks=remarks,
        settings=_settings(module),
        extras=extras,
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """The options that a layer of the zoo was made with, but for those that are read otherwise."""
    if norm_name(type(module)) is None:
        return {}
    names = inspect.signature(type(module)).parameters.keys() - _READ_OTHERWISE
    held = {n: getattr(module, n) for n in names if hasattr(module, n)}
    return {n: v for n, v in held.items() if not isinstance(v, Tensor | nn.Module)}


def _own(module: nn.Module, kind: Kind) -> Callable[[], nn.Module] | None:
    """What stands for the activation within the layer's formula, if it has one and is asked to apply it."""
    by_name = isinstance(getattr(module, "act_layer", None), str)
    if kind.own_activation is None or not getattr(module, "apply_act", by_name):
        return None
    made: type[nn.Module] = getattr(nn, kind.own_activation)
    return made


def _channels(module: nn.Module, tensors: dict[str, Tensor | None]) -> int:
    for name in ("num_features", "num_channels", "normalized_shape"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
        if value is not None:
            if len(value) != 1:
                raise ValueError(f"it normalizes over {len(value)} dimensions, {tuple(value)}, and not over channels")
            return int(value[0])
    return next(t.numel() for n, t in tensors.items() if t is not None and n != "num_batches_tracked")


def _options(module: nn.Module, kind: Kind) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in ("eps", "momentum"):
        if hasattr(module, name):
            options[name] = getattr(module, name)
    if options.get("eps", 0.0) is None:  # torch's RMSNorm: that of the dtype
        options["eps"] = torch.finfo(torch.float32).eps
    groups = getattr(module, "num_groups", None) or getattr(module, "groups", None)
    if groups is not None and kind.name in ("group", "evonorm_s0", "batch_group"):
        options["groups"] = groups
    if kind.name == "positional":
        options["unbiased"] = getattr(module, "unbiased", False)
    if isinstance(module, nn.SyncBatchNorm) or getattr(module, "sync", False):
        options["sync"] = True
    return options


def _after(module: nn.Module, kind: Kind) -> dict[str, nn.Module]:
    found = {
        name: after
        for name in ("drop", "act")
        if isinstance(after := getattr(module, name, None), nn.Module) and not isinstance(after, nn.Identity)
    }
    if kind.name == "proxy" and not isinstance(module.inner, nn.Identity):
        found["act"] = module.inner  # type: ignore[assignment]
    if qualified(type(module)) == INPLACE_ABN:
        found |= _of_inplace_abn(module)
    return found


def _of_inplace_abn(module: Any) -> dict[str, nn.Module]:
    made = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "relu": nn.ReLU}
    if module.act_name in ("", "identity"):
        return {}
    if module.act_name not in made:
        raise ValueError(f"its activation {module.act_name!r} is not known")
    return {"act": made[module.act_name]() if module.act_name == "relu" else made[module.act_name](module.act_param)}
