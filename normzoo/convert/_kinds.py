"""What is a normalization layer: classes of torch, torchvision, timm and the zoo, and what each is in the zoo's terms.

A class is recognized by its qualified name, so that no package has to be imported to look for its layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normzoo.convert._behaviour import takes_only
from normzoo.registry import norm_name


@dataclass(frozen=True)
class Kind:
    """How a class of layers is read.

    Attributes:
        name: what it is, a name of the zoo where it has the layer.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        names: {the layer's: the zoo's} for parameters and buffers that are called otherwise there.
        own_activation: makes the activation that the formula contains, which no other norm has.
    """

    name: str
    channel_dim: int = 1
    names: dict[str, str] = field(default_factory=dict)
    own_activation: Callable[[], nn.Module] | None = None


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


_INPLACE_ABN = "timm.layers.inplace_abn.InplaceAbn"
_BATCH, _GROUP, _LAST, _FIRST = Kind("batch"), Kind("group"), Kind("layer_channel", -1), Kind("layer_channel")
_RMS_LAST, _RMS, _INSTANCE = Kind("rms", -1), Kind("rms"), Kind("instance")
_S, _B = (
    Kind("evonorm_s0", own_activation=nn.SiLU),
    Kind("evonorm_b0", own_activation=nn.ReLU),
)


def _all(module: str, names: str, kind: Kind) -> dict[str, Kind]:
    return {f"{module}.{name}": kind for name in names.split()}


KINDS: dict[str, Kind] = {
    **_all("torch.nn.modules.batchnorm", "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm", _BATCH),
    **_all("torch.nn.modules.instancenorm", "InstanceNorm1d InstanceNorm2d InstanceNorm3d", _INSTANCE),
    **_all("torch.nn.modules.batchnorm", "LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d", _BATCH),
    **_all("torch.nn.modules.instancenorm", "LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d", _INSTANCE),
    # Which Lightning makes of SyncBatchNorm at the end of a run
    "lightning.pytorch.plugins.layer_sync._BatchNormXd": _BATCH,
    "pytorch_lightning.plugins.layer_sync._BatchNormXd": _BATCH,
    "torch.nn.modules.normalization.GroupNorm": _GROUP,
    "torch.nn.modules.normalization.LayerNorm": _LAST,
    "torch.nn.modules.normalization.RMSNorm": _RMS_LAST,
    "torchvision.ops.misc.FrozenBatchNorm2d": Kind("frozen_batch"),
    "torchvision.models.convnext.LayerNorm2d": _FIRST,
    **_all("timm.layers.norm_act", "BatchNormAct2d SyncBatchNormAct", _BATCH),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Kind("frozen_batch"),
    "timm.layers.split_batchnorm.SplitBatchNorm2d": Kind("split batch norm"),
    _INPLACE_ABN: _BATCH,
    **_all("timm.layers.norm", "GroupNorm GroupNorm1", _GROUP),
    **_all("timm.layers.norm_act", "GroupNormAct GroupNorm1Act", _GROUP),
    **_all("timm.layers.norm", "LayerNorm LayerNormFp32", _LAST),
    **_all("timm.layers.norm_act", "LayerNormAct LayerNormActFp32", _LAST),
    **_all("timm.layers.norm", "LayerNorm2d LayerNorm2dFp32 LayerNormExp2d", _FIRST),
    **_all("timm.layers.norm_act", "LayerNormAct2d LayerNormAct2dFp32", _FIRST),
    **_all("timm.layers.norm", "RmsNorm RmsNormFp32", _RMS_LAST),
    **_all("timm.layers.norm", "RmsNorm2d RmsNorm2dFp32", _RMS),
    **_all("timm.layers.norm_act", "RmsNormAct RmsNormActFp32", _RMS_LAST),
    **_all("timm.layers.norm_act", "RmsNormAct2d RmsNormAct2dFp32", _RMS),
    **_all("timm.layers.norm", "SimpleNorm SimpleNormFp32", Kind("simple norm", -1)),
    **_all("timm.layers.norm", "SimpleNorm2d SimpleNorm2dFp32", Kind("simple norm")),
    **_all("timm.layers.evo_norm", "EvoNorm2dB0 EvoNorm2dB1 EvoNorm2dB2", _B),
    **_all("timm.layers.evo_norm", "EvoNorm2dS0 EvoNorm2dS0a EvoNorm2dS1 EvoNorm2dS1a EvoNorm2dS2 EvoNorm2dS2a", _S),
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": Kind("filter_response", own_activation=nn.ReLU),
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": Kind("filter_response"),
    "timm.models.mlp_mixer.Affine": Kind("affine", -1, {"alpha": "weight", "beta": "bias"}),
}
LOOKED_FOR = (
    "torch's BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm, torchvision's and timm's "
    "norm layers with and without activation, and the zoo's own"
)
_OWN_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "evonorm_s0": nn.SiLU,
    "evonorm_b0": nn.ReLU,
    "filter_response": nn.ReLU,
}
_READ_OTHERWISE = {"num_features", "affine", "bias", "act_layer", "channel_dim", "device", "dtype"}
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "tau", "v")


def qualified(cls: type) -> str:
    """``module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a normalization layer; None for other modules.

    Raises:
        ValueError: for one that cannot be read.
    """
    for cls in type(module).__mro__:
        kind = KINDS.get(qualified(cls))
        if zoo := norm_name(cls):
            kind = Kind(zoo, getattr(module, "channel_dim", 1), own_activation=_OWN_ACTIVATIONS.get(zoo))
        if kind is None:
            continue
        own = any(getattr(type(module), n, None) is not getattr(cls, n, None) for n in ("forward", "normalize"))
        if own or "forward" in vars(module):
            raise ValueError(
                f"its class {type(module).__name__} has a forward of its own, so that what it computes is not known"
            )
        return kind
    return None


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
    tensors = {n: held[n] for n in _TENSORS if n in held}
    tensors |= {ours: t.flatten() for theirs, ours in kind.names.items() if (t := held.get(theirs)) is not None}
    options = _options(module, kind)
    if qualified(type(module)) == _INPLACE_ABN and isinstance(weight := tensors.get("weight"), Tensor):
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
    extras = {n: t for n, t in held.items() if n not in _TENSORS} if norm_name(type(module)) else {}
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
    return kind.own_activation if getattr(module, "apply_act", by_name) else None


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
    if qualified(type(module)) == _INPLACE_ABN:
        found |= _of_inplace_abn(module)
    return found


def _of_inplace_abn(module: Any) -> dict[str, nn.Module]:
    made = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "relu": nn.ReLU}
    if module.act_name in ("", "identity"):
        return {}
    if module.act_name not in made:
        raise ValueError(f"its activation {module.act_name!r} is not known")
    return {"act": made[module.act_name]() if module.act_name == "relu" else made[module.act_name](module.act_param)}
