"""Which modules are normalization layers, for conversion, statistics, callbacks and checkpoints.

Modules are known by the qualified names of their classes, so that no package is imported to look for its layers;
entries of state dicts by names and shapes. What a module of an unknown class computes is found by trying it, in
``normzoo/convert/_recognise.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normzoo.registry import create_norm, list_norms, marked_channel_dim, norm_name


@dataclass(frozen=True)
class Kind:
    """How a class of layers is read.

    Attributes:
        name: what it is, a name of the zoo where it has the layer.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        names: {the layer's: the zoo's} for parameters and buffers that are called otherwise there.
        own_activation: the class in ``torch.nn`` of the activation that the formula contains, which no other norm has.
    """

    name: str
    channel_dim: int = 1
    names: dict[str, str] = field(default_factory=dict)
    own_activation: str | None = None


@dataclass(frozen=True)
class KnownClass:
    """What the class of a normalization layer says.

    Attributes:
        kind: of the nearest known class among the module's class and its bases.
        overridden: whether the module computes otherwise than that class: it has a forward of its own.
    """

    kind: Kind
    overridden: bool


INPLACE_ABN = "timm.layers.inplace_abn.InplaceAbn"
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
TENSORS = (*PER_CHANNEL, "num_batches_tracked", "tau", "v")  # that layers of several kinds hold
AFFINE_NAMES = {"alpha": "weight", "beta": "bias"}  # of timm's Affine, of shape (1, 1, C)
# In evaluation a scale and shift by running statistics, as frozen_batch
FROZEN_KINDS = ("batch", "batch_renorm", "ghost_batch", "batch_group", "split batch norm")
_BATCH, _GROUP, _LAST, _FIRST = Kind("batch"), Kind("group"), Kind("layer_channel", -1), Kind("layer_channel")
_RMS_LAST, _RMS, _INSTANCE = Kind("rms", -1), Kind("rms"), Kind("instance")
_OWN_ACTIVATIONS = {"evonorm_s0": "SiLU", "evonorm_b0": "ReLU", "filter_response": "ReLU"}
_S, _B = (Kind(name, own_activation=_OWN_ACTIVATIONS[name]) for name in ("evonorm_s0", "evonorm_b0"))


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
    INPLACE_ABN: _BATCH,
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
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": Kind("filter_response", own_activation="ReLU"),
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": Kind("filter_response"),
    "timm.models.mlp_mixer.Affine": Kind("affine", -1, AFFINE_NAMES),
}
LOOKED_FOR = (
    "torch's BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm, torchvision's and timm's "
    "norm layers with and without activation, and the zoo's own"
)
_BASE = "normzoo.layers._base.NormLayer"  # of layers of the zoo, and of those of users that are not registered
# Named after a normalization of weights or of data sets
_NO_LAYERS = ("torch.nn.utils.", "torchvision.transforms.")


def qualified(cls: type) -> str:
    """``module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether a module's class or one of its bases has one of the qualified names."""
    return any(qualified(cls) in names for cls in type(module).__mro__)


def known_class(module: nn.Module) -> KnownClass | None:
    """What a module's class says of it, if the table, the registry or a base in them knows the class."""
    own = type(module)
    for cls in own.__mro__:
        if zoo := norm_name(cls):
            kind = Kind(zoo, getattr(module, "channel_dim", 1), own_activation=_OWN_ACTIVATIONS.get(zoo))
        elif (in_table := KINDS.get(qualified(cls))) is not None:
            kind = in_table
        else:
            continue
        changed = any(getattr(own, n, None) is not getattr(cls, n, None) for n in ("forward", "normalize"))
        return KnownClass(kind, changed or "forward" in vars(module))
    return None


def describe(module: nn.Module) -> str:
    """A module's class and, in brackets, its kind if the class is known."""
    known = known_class(module)
    return f"{type(module).__name__}{'' if known is None or known.overridden else f' ({known.kind.name})'}"


def is_frozen(module: nn.Module) -> bool:
    """Whether a module's running statistics are fixed, by its class: ``frozen_batch``, or one that is called frozen."""
    known = known_class(module)
    named = any("Frozen" in cls.__name__ for cls in type(module).__mro__)
    return named or (known is not None and known.kind.name == "frozen_batch")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by its class and without trying it.

    Normalization layers are

    - those of known classes and subclasses of these, whatever their forward;
    - what :func:`normzoo.convert_norms` has put in the place of one;
    - classes of torch, and subclasses of these, with "norm" in their names;
    - classes of torchvision and timm with "norm" in their names, without inner layers that have parameters.
    """
    if marked_channel_dim(module) is not None:
        return True
    own = type(module)
    for cls in own.__mro__:
        name = qualified(cls)
        if name in KINDS or name == _BASE or norm_name(cls) is not None:
            return True
        if name.startswith("torch.nn.") and _is_named(cls):
            return True
    if not (_is_named(own) and own.__module__.startswith(("timm.", "torchvision."))):
        return False
    return not any(True for child in module.children() for _ in child.parameters())


def channel_dim(module: nn.Module, otherwise: int) -> int:
    """The dimension of a module's channels, as far as its class or a mark tells.

    Args:
        module: a normalization layer or any other module.
        otherwise: the answer for modules that do not tell.
    """
    attribute = getattr(module, "channel_dim", None)
    if isinstance(attribute, int):
        return attribute
    if (marked := marked_channel_dim(module)) is not None:
        return marked
    known = known_class(module)
    of_class = None if known is None or known.overridden else known.kind.channel_dim
    if of_class == 1:
        return 1
    spanned = getattr(module, "normalized_shape", None)
    if spanned is not None and "2d" not in type(module).__name__:  # timm's and torchvision's LayerNorm2d: (N, C, H, W)
        return -len(spanned) if isinstance(spanned, Sequence) else -1
    if of_class is not None:
        return of_class
    return -1 if isinstance(module, nn.Linear) else otherwise


def norm_entries(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """{prefix: {name: tensor}} of the norm layers in a state dict that conversion can replace, without their parts."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        found.setdefault(prefix, {})[name] = value
    names = _entry_names()
    norms = {p: entries for p, entries in found.items() if p and not _is_response(p) and _is_norm_entry(entries, names)}
    return {prefix: entries for prefix, entries in norms.items() if outer_norm(prefix, norms) is None}


def outer_norm(name: str, norms: Iterable[str]) -> str | None:
    """The norm layer within which a dotted name is."""
    parts = name.split(".")
    return next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in norms), None)


def _is_named(cls: type) -> bool:
    return "norm" in cls.__name__.lower() and not cls.__module__.startswith(_NO_LAYERS)


def _is_response(prefix: str) -> bool:
    """Whether it is a GlobalResponseNorm, which ConvNeXt V2 calls ``grn``: no layer of the zoo can take its place."""
    return prefix.rpartition(".")[2] == "grn"


def _entry_names() -> set[str]:
    """Every name that an entry of a norm layer may have."""
    return {key for name in list_norms() for key in create_norm(name, 64, device="meta").state_dict()} | {*TENSORS}


def _is_norm_entry(entries: Mapping[str, Any], known: set[str]) -> bool:
    if not all(isinstance(t, Tensor) for t in entries.values()):
        return False
    if entries.keys() == AFFINE_NAMES.keys():
        return all(t.shape == (1, 1, t.numel()) for t in entries.values())
    flat = [entries[n] for n in PER_CHANNEL if n in entries]
    return (
        not {"weight", "running_mean", "running_var"}.isdisjoint(entries)
        and entries.keys() <= known
        and all(t.ndim == 1 and t.is_floating_point() for t in flat)
        and len({t.numel() for t in flat}) == 1
        and not (entries.keys() == {"weight"} and entries["weight"].numel() == 1)  # PReLU
    )
