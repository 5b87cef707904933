"""Values for a new layer that make it compute in evaluation what the original computes, where some do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._kinds import Source, read
from normzoo.convert._pairs import Affine, scale_and_shift
from normzoo.recognition import known_class

FOLDED = (
    "running statistics are folded into weight and bias: evaluation computes the same, training no longer normalizes "
    "by the batch"
)
_SAME = 1e-9  # relative, of numbers computed in float64


def wanted_of(old: nn.Module, source: Source) -> Affine | None:
    """The scale and shift that a layer is in evaluation; None for one that is something else, or holds no knowledge.

    Running statistics of mean 0 and variance 1 have seen no batch. Bounds of outputs, as ``online`` has, are left out.
    """
    mean, var = (source.tensors.get(name) for name in ("running_mean", "running_var"))
    if mean is not None and var is not None and not mean.is_meta and not mean.any() and bool((var == 1).all()):
        return None
    return scale_and_shift(unclamped(old), source)


def unclamped(layer: nn.Module) -> nn.Module:
    """The layer, or one that shares its tensors and does not clamp its outputs."""
    if getattr(layer, "compensation", None) != "clamp":
        return layer
    free: Any = copy.copy(layer)
    free.compensation = None
    return free


def lacks(wanted: Affine, source: Source) -> set[str]:
    """Which of weight and bias a scale and shift without statistics needs, and the original does not have."""
    scale, shift = wanted
    return {
        name
        for name, needed in (("weight", bool((scale != 1).any())), ("bias", bool(shift.any())))
        if needed and source.tensors.get(name) is None
    }


def exact_values(layer: nn.Module, wanted: Affine) -> dict[str, Tensor]:
    """Float64 values of the layer's tensors with which it is the wanted scale and shift in evaluation.

    Statistics are set where the layer has some, and weight and bias for what these cannot be. Empty where the layer is
    as wanted already, or no values make it so.
    """
    kind = _kind_name(layer)
    if kind is None:
        return {}
    tensors = {n: t for n, t in {**layer._parameters, **layer._buffers}.items() if t is not None}
    if any(t.is_meta for t in tensors.values()):
        return {}
    now = _affine(layer, {})
    if "running_whitening" not in tensors if now is None else _same(now, wanted):
        return {}
    wide = {n: t.detach().cpu().double() for n, t in tensors.items()}
    values = _statistics(kind, getattr(layer, "eps", 0.0), wide, wanted)
    now = _affine(layer, values)
    if now is not None and "weight" in tensors and not _close(now[0], wanted[0]):
        values["weight"] = torch.where(now[0] != 0, wide["weight"] * wanted[0] / now[0], wide["weight"])
        now = _affine(layer, values)  # the shift depends on the scale
    if now is not None and "bias" in tensors and not _close(now[1], wanted[1]):
        values["bias"] = wide["bias"] + wanted[1] - now[1]
    now = _affine(layer, values)
    finite = all(bool(v.isfinite().all()) for v in values.values())
    return values if finite and now is not None and _same(now, wanted) else {}


def _kind_name(layer: nn.Module) -> str | None:
    known = known_class(layer)
    return None if known is None or known.overridden else known.kind.name


def _statistics(kind: str, eps: float, tensors: Mapping[str, Tensor], wanted: Affine) -> dict[str, Tensor]:
    """Running statistics by which the layer's own weight and bias give the wanted scale and shift."""
    scale, shift = wanted
    weight, bias = tensors.get("weight", torch.ones_like(scale)), tensors.get("bias", torch.zeros_like(scale))
    rstd = scale / weight  # what the normalization has to multiply by
    usable = (weight != 0) & (rstd > 0) & rstd.isfinite()
    rstd = torch.where(usable, rstd, torch.ones_like(rstd))
    values: dict[str, Tensor] = {}
    if "running_mean" in tensors:
        mean = torch.where(scale != 0, (bias - shift) / scale, tensors["running_mean"])
        values["running_mean"] = torch.where(mean.isfinite(), mean, tensors["running_mean"])
    for name in ("running_var", "running_phi"):
        if name in tensors:
            var = (1 / rstd - eps).clamp(min=0).square() if kind == "l1_batch" else (rstd**-2 - eps).clamp(min=0)
            values[name] = torch.where(usable, var, tensors[name])
    if "running_whitening" in tensors:
        groups, size, _ = tensors["running_whitening"].shape
        values["running_whitening"] = torch.diag_embed(rstd.view(groups, size))
    return values


def _affine(layer: nn.Module, values: Mapping[str, Tensor]) -> Affine | None:
    """The scale and shift that the layer is with other values in evaluation."""
    tried = unclamped(_with_values(layer, values))
    try:
        return scale_and_shift(tried, read(tried))
    except ValueError:
        return None


def _with_values(layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A layer that shares all but these values with another."""
    tried = copy.copy(layer)
    tried.__dict__ |= {"_parameters": {**layer._parameters}, "_buffers": {**layer._buffers}}
    for name, value in values.items():
        if name in tried._parameters:
            tried._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            tried._buffers[name] = value
    return tried


def _same(a: Affine, b: Affine) -> bool:
    return _close(a[0], b[0]) and _close(a[1], b[1])


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _SAME * b.abs().max())
