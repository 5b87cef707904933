"""Making the layer that takes another's place, with all that the other knew."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normzoo._errors import near_matches
from normzoo.convert._behaviour import takes_only
from normzoo.convert._exact import FOLDED, exact_values, lacks, wanted_of
from normzoo.convert._hooks import share_hooks
from normzoo.convert._kinds import Source
from normzoo.convert._pairs import Affine
from normzoo.registry import get_norm, mark_as_norm, norm_info, split_weight_method

Options = Mapping[str, Any]
NormSpec = str | Mapping[str, Any] | Callable[..., nn.Module]

NEW_STATISTICS = "running statistics start anew: calibrate, train or reestimate_statistics"
# Norms with statistics over positions too, which see what a causal model must not, if they take the place of others.
_OVER_POSITIONS = {
    *("group", "layer", "instance", "filter_response", "evonorm_s0", "evonorm_b0"),
    *("switchable", "batch_instance", "batch_group", "proxy"),
}
# Without statistics in evaluation, or without a mean: what running statistics do then is for weight and bias.
_FIXED = {"affine", "power", "evonorm_b0"}
STATISTICS_GO_ELSEWHERE = {*_FIXED, "iter_norm"}
_LAYER_NORMS = {"layer_channel", "positional"}
_AS_GROUPS = {"layer", "instance"}
# Channels of a group, at least, where no number of groups is asked for (Wu & He 2018, table 3).
CHANNELS = 16


@dataclass(frozen=True)
class TargetNorm:
    """What to convert to.

    Attributes:
        label: what to call it.
        norm: the canonical name; None for a factory.
        factory: makes a layer from a channel count.
        known: the options that the layer has; None if any may be asked of the factory.
        options: what was asked for; functions are called with the channel count.
        weights: ``"ws"`` or ``"scaled_ws"`` if the weights of convolutions are standardized too.
    """

    label: str
    norm: str | None
    factory: Callable[..., nn.Module]
    known: dict[str, Any]
    options: dict[str, Any]
    weights: str | None = None


@dataclass
class Made:
    """A new layer and what became of the old one's tensors.

    Attributes:
        layer: the new layer.
        carried: names of tensors that both share.
        new: of those that the old layer did not have.
        dropped: of those that the new one does not have.
        warnings: what to know of it.
        values: (module, name, float64 value) that its tensors take in the model's place of the old ones.
    """

    layer: nn.Module
    carried: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    values: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)


def target_norm(to: NormSpec, options: Options | None) -> TargetNorm:
    """The target for a name, a mapping with ``name`` and options, or a factory.

    Raises:
        UnknownNameError: a ValueError, for a name that is not registered.
        TypeError: for an option that the layer does not have.
    """
    asked = dict(options or {})
    if isinstance(to, Mapping):
        asked = {**to, **asked}
        if "name" not in asked:
            raise ValueError(f"a norm with options needs its name, as in {{name: group, groups: 8}}; got {dict(to)}")
        to = asked.pop("name")
    if not isinstance(to, str):
        if not callable(to) or isinstance(to, nn.Module):
            layer = ", a layer: give what makes one" * isinstance(to, nn.Module)
            raise TypeError(f"to must be a name, a mapping with a name or a factory, not {type(to).__name__}{layer}")
        parameters = inspect.signature(to).parameters
        label = getattr(getattr(to, "func", to), "__name__", repr(to))
        bound = dict(to.keywords) if isinstance(to, functools.partial) else {}
        known = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY or n in ("channel_dim",)}
        target = TargetNorm(label, None, to, known, {**bound, **asked})
    else:
        name, weights = split_weight_method(to)
        factory = get_norm(name)
        known = {n: p.default for n, p in inspect.signature(factory).parameters.items() if p.kind is p.KEYWORD_ONLY}
        target = TargetNorm(to, norm_info(name).name, factory, known, asked, weights)
    valid = set(target.known) - {"device", "dtype", "channel_dim"}
    valid |= {"channels_per_group"} if "groups" in valid else set()
    for option in asked:
        if option not in valid:
            near = near_matches(option, valid)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"norm {target.label!r} has no option {option!r}{hint} Options: {', '.join(sorted(valid))}")
    return target


def largest_divisor(channels: int, wish: int) -> int:
    """The largest divisor of ``channels`` that is not above ``wish``, at least 1.

    Example:
        >>> largest_divisor(48, 32), largest_divisor(7, 4)
        (24, 1)
    """
    return next(d for d in range(max(1, min(wish, channels)), 0, -1) if channels % d == 0)


def make(target: TargetNorm, source: Source, old: nn.Module, own_affine: bool = False) -> Made:
    """The layer that takes the place of ``old``.

    Args:
        target: what to make.
        source: what ``old`` is.
        old: the layer.
        own_affine: whether one without scale and shift gets some, to be calibrated.
    """
    wanted = None if target.norm == source.kind.name else wanted_of(old, source)
    missing = lacks(wanted, source) if wanted is not None and target.norm in _FIXED else set()
    options, placement = _options(target, source, own_affine or bool(missing)), _placement(source)
    if target.norm == "power" and wanted is not None and "groups" not in target.options:
        options["groups"] = None  # groups of a batch norm are not the groups that power scales by first
    made = Made(
        target.factory(source.num_features, **options, **{k: v for k, v in placement.items() if k in target.known})
    )
    if target.norm is None:  # callbacks find layers of the zoo by their classes
        mark_as_norm(made.layer, source.kind.channel_dim)
    made.warnings += source.remarks
    if "channel_dim" not in target.known and (target.norm is not None or source.kind.channel_dim == -1):
        _check_layout(made.layer, source)
    _keep_untracked(made.layer, source, old)
    _carry(made, source, target.norm == source.kind.name, missing)
    _set_exactly(made, target, source, wanted)
    _attach(made, target, source)
    layer = made.layer
    reference = list(old.parameters(recurse=False))
    trained = any(p.requires_grad for p in reference) or not reference
    for name in made.new:
        param = layer._parameters.get(name)
        if param is not None:
            param.requires_grad_(trained)
            param.data = param.data.to(device=placement["device"], dtype=placement["dtype"])
    if source.kind.channel_dim == -1 and target.norm in _OVER_POSITIONS:
        made.warnings.append("its statistics are over positions too: in causal models use layer_channel or rms")
    if getattr(old, "process_group", None) is not None:
        made.warnings.append("its process group is not carried over: statistics are taken over all ranks")
    share_hooks(layer, old)
    layer.train(old.training)
    return made


def _set_exactly(made: Made, target: TargetNorm, source: Source, wanted: Affine | None) -> None:
    """Note the values with which the new layer computes what the old one computes in evaluation, if there are some."""
    layer = made.layer
    if wanted is not None and (values := exact_values(layer, wanted)):
        made.values += [(layer, name, value) for name, value in values.items()]
        if source.tensors.get("running_var") is not None and layer._buffers.get("running_mean") is None:
            made.warnings.append(FOLDED)
        elif source.tensors.get("running_var") is not None and NEW_STATISTICS in made.warnings:
            made.warnings.remove(NEW_STATISTICS)  # they are the original's, in other terms
    ratio = _variance_ratio(source, getattr(layer, "unbiased", False)) if target.norm in _LAYER_NORMS else 1.0
    if ratio != 1 and isinstance(weight := layer._parameters.get("weight"), Tensor) and "eps" not in target.options:
        made.values.append((layer, "weight", weight.detach().double() / ratio**0.5))
    if source.kind.name == "instance" and target.norm == "batch_instance" and not source.remarks:
        made.values.append((layer, "gate", torch.zeros(source.num_features, dtype=torch.float64)))


def _variance_ratio(source: Source, unbiased: bool) -> float:
    """The variance that the source divides by over that of a layer norm of each position, unbiased or not."""
    had = source.options.get("unbiased", False)
    if source.kind.name not in _LAYER_NORMS or had == unbiased:
        return 1.0
    ratio = source.num_features / (source.num_features - 1)
    return ratio if had else 1 / ratio


def _options(target: TargetNorm, source: Source, own_affine: bool) -> dict[str, Any]:
    """What the layer is made with: what was asked, else what the source had."""
    c, known = source.num_features, target.known
    asked = {n: v(c) if callable(v) and n != "act_layer" else v for n, v in target.options.items()}
    held = {**source.options, **source.settings} if target.norm == source.kind.name else source.options
    options = {n: v for n, v in held.items() if n in known and n not in asked}
    if target.norm in _LAYER_NORMS and "eps" in options:
        unbiased = asked.get("unbiased", options.get("unbiased", False))
        options["eps"] /= _variance_ratio(source, unbiased)
    if target.norm == "group" and not {"groups", "channels_per_group"} & asked.keys():
        options |= {"groups": {"layer": 1, "instance": c}[source.kind.name]} if source.kind.name in _AS_GROUPS else {}
    if "affine" in known and "affine" not in asked and target.norm != "none":  # which always has a bias
        learnt = source.tensors.get("weight") is not None or source.tensors.get("bias") is not None
        options["affine"] = learnt or own_affine or "weight" not in source.tensors
    if "bias" in known and "bias" not in asked:
        options["bias"] = source.tensors.get("bias") is not None
    if "groups" in known:
        options["groups"] = groups_for(c, asked, options, known["groups"])
    if "channel_dim" in known and source.kind.channel_dim != 1:
        options["channel_dim"] = source.kind.channel_dim
    own = known.get("act_layer")
    if own is not None and "act_layer" not in asked:
        # a norm with an activation of its own takes the place of norm and activation
        fused = "act" in source.after or source.own_activation is not None
        if not fused:
            options["act_layer"] = None
        elif not isinstance(own, str):  # whatever the activation
            options["act_layer"] = functools.partial(_same, source.after.get("act"), source.own_activation)
    return {**options, **asked}


def _same(act: nn.Module | None, own: Callable[[], nn.Module] | None) -> nn.Module:
    """The activation of the source."""
    return act if act is not None else own() if own is not None else nn.Identity()


def groups_for(channels: int, asked: dict[str, Any], held: dict[str, Any], default: Any) -> Any:
    """The number of groups: a divisor of the channels, unless what was asked is for the layer to refuse."""
    if "channels_per_group" in asked and "groups" in asked:
        raise ValueError("give groups or channels_per_group, not both")
    if "channels_per_group" in asked:
        size = asked.pop("channels_per_group")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"channels_per_group must be at least 1, not {size!r}")
        return largest_divisor(channels, channels // size)
    if "groups" in asked or "groups" in held:
        wish = asked.pop("groups", held.get("groups"))
    else:  # small groups forget how large a channel was in a sample, which a trained network knows how to use
        wish = min(default, max(1, channels // CHANNELS)) if isinstance(default, int) else default
    whole = isinstance(wish, int) and not isinstance(wish, bool) and wish > 0
    return largest_divisor(channels, wish) if whole else wish


def _placement(source: Source) -> dict[str, Any]:
    """Device and floating-point dtype of the source's tensors."""
    tensors = [t for n, t in source.tensors.items() if t is not None and n != "num_batches_tracked"]
    first = tensors[0] if tensors else torch.empty(0)
    return {"device": first.device, "dtype": first.dtype}


def _check_layout(layer: nn.Module, source: Source) -> None:
    """Raise a ValueError for a layer without ``channel_dim`` that takes its channels in another dimension."""
    dim = source.kind.channel_dim
    if (takes_only(layer, source.num_features) or dim) != dim:
        here, there = ("last", "in dimension 1") if dim == -1 else ("in dimension 1", "last")
        raise ValueError(f"its channels are {here}, and {type(layer).__name__} takes them {there}")


def _keep_untracked(layer: Any, source: Source, old: nn.Module) -> None:
    """Of a batch norm that does not track its statistics make another: by the batch alone if it keeps none."""
    tracking = getattr(
        old, "track_running_stats", not source.recognised or source.tensors.get("running_var") is not None
    )
    if source.kind.name == "batch" and not tracking and hasattr(layer, "track_running_stats"):
        layer.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if source.tensors.get(name) is None:
                layer._buffers[name] = None


def _carry(made: Made, source: Source, same_kind: bool, missing: set[str]) -> None:
    """Put the source's tensors themselves into the new layer, where it has some of the name.

    Args:
        made: the new layer.
        source: what the old one is.
        same_kind: whether both are of one kind, so that all tensors mean the same.
        missing: those of weight and bias that the new layer needs and the old one does not have.
    """
    layer = made.layer
    held = {**layer._parameters, **layer._buffers}
    tensors = {**source.tensors, **(source.extras if same_kind else {})}
    for name, new in held.items():
        old = tensors.get(name)
        if name in ("weight", "bias") and old is None and new is not None:
            if _is_left_out(layer, source) and name not in missing:
                _put(layer, name, None)
            else:
                made.new.append(name)
        elif new is None:
            if old is not None:
                made.dropped.append(name)
        elif old is None or old.shape != new.shape:
            if old is not None and old.numel() != new.numel() and name not in source.extras:
                raise ValueError(f"its {name} has {new.numel()} values, not one for each channel")
            made.new.append(name)
            made.dropped += [name] * (old is not None)
        else:
            frozen = source.kind.name == "frozen_batch"
            if name in layer._parameters and not isinstance(old, nn.Parameter) and not frozen and not source.remarks:
                made.warnings.append("its parameters are new tensors of the same values: make optimizers anew")
            _put(layer, name, old, old.requires_grad or frozen)
            made.carried.append(name)
    lost = [n for n, t in {**source.extras, **tensors}.items() if t is not None and (n not in held or n not in tensors)]
    made.dropped += [n for n in lost if n != "num_batches_tracked"]
    if any(n.startswith("running_") for n in made.new):
        made.warnings.append(NEW_STATISTICS)


def _is_left_out(layer: nn.Module, source: Source) -> bool:
    """Whether a scale or shift that the source has not is left out: it has the other, and the new layer knows both."""
    learnt = any(source.tensors.get(n) is not None for n in ("weight", "bias"))
    return learnt and source.kind.name != "none" and getattr(layer, "weight", None) is not None


def _put(layer: nn.Module, name: str, value: Tensor | None, trained: bool = True) -> None:
    """Make ``value`` the layer's parameter or buffer: the same object where that is possible."""
    if name in layer._buffers:
        layer._buffers[name] = None if value is None else value.detach() if isinstance(value, nn.Parameter) else value
        return
    if value is not None and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value.detach(), requires_grad=trained)
    layer._parameters[name] = value
    if value is None:
        getattr(layer, "_initial", {}).pop(name, None)


def _attach(made: Made, target: TargetNorm, source: Source) -> None:
    """Give the new layer the dropout and activation that the old one applied."""
    after = dict(source.after)
    own = isinstance(getattr(made.layer, "act_layer", None), str)
    inside: Any = made.layer
    if "act_layer" in target.options:
        after.pop("act", None)
    elif isinstance(getattr(inside, "inner", None), nn.Module):  # the activation is inside, whatever it is
        inside.act_layer = type(inside.inner)
        if set(after) - {"act"}:
            made.warnings.append("dropout between norm and activation is gone: the new layer is both in one")
        after.clear()
    elif own:
        if after.pop("act", None) is not None:
            made.warnings.append(f"the activation is now {target.label}'s own")
        if after:
            made.warnings.append("dropout between norm and activation is gone: the new layer is both in one")
            after.clear()
    elif source.own_activation is not None and "act" not in after:
        after["act"] = source.own_activation()
        made.warnings.append(f"{source.kind.name}'s own activation became {type(after['act']).__name__}")
    if not after:
        return
    last = next(iter(after.values())) if len(after) == 1 else nn.Sequential(OrderedDict(after))
    layer: Any = made.layer
    if hasattr(layer, "act"):
        layer.act, layer.act_layer = last, type(last)
    else:
        made.layer = nn.Sequential(OrderedDict(norm=made.layer, act=last))
