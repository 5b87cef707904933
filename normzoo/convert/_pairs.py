"""Norms that are a scale and shift of channels, and the convolutions and linear layers that can take them over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._flow import Flow, Seen, storage_of
from normzoo.convert._kinds import Source, qualified
from normzoo.convert._sites import Site
from normzoo.convert._trial import CannotBeTriedError, bare_copy

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = {*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear}
# of timm: a convolution that pads by the size of its input, a linear layer that casts when scripted
_SAME = "timm.layers.conv2d_same.Conv2dSame"
_ALIKE = {_SAME, "timm.layers.linear.Linear"}
_IDLE = {"timm.layers.drop.DropBlock2d", "timm.layers.drop.DropPath"}

Affine = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pair:
    """A norm and the layer that can take over its scale and shift: the one ``before`` it, or the one behind it."""

    site: Site
    neighbour: nn.Module
    before: bool
    scale: Tensor
    shift: Tensor


def affine_of(sites: Sequence[Site]) -> dict[str, Affine]:
    """The scale and shift of those sites that are nothing else in evaluation, by name."""
    found = {s.name: scale_and_shift(s.module, s.source) for s in sites if not _touched(s.module) and not _inlined(s)}
    return {name: affine for name, affine in found.items() if affine is not None}


def _touched(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own have a part in what a layer computes, or would be lost with it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _inlined(site: Site) -> bool:
    """Whether it is in a layer of torch's that in evaluation reads its parts' tensors and does not call them."""
    return any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in site.places)


def idle(module: nn.Module) -> bool:
    """Whether a module does nothing in evaluation."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or qualified(type(module)) in _IDLE


def scale_and_shift(module: nn.Module, source: Source) -> Affine | None:
    """The float64 (C,) scale and shift that a layer is in evaluation, found by trying it; None if it is something else.

    What stands after the norm in the layer, dropout and activation, is left out.
    """
    probe = _probe(module, source)
    if probe is None:
        return None
    c, last = source.num_features, source.kind.channel_dim == -1
    forms = [(6, 3, c), (6, c)] if last else [(6, c, 3, 3), (6, c, 5), (6, c, 3, 3, 3), (6, c)]
    generator, far = torch.Generator().manual_seed(0), 2.0**60  # where what is clamped or saturates has done so
    for form in forms:
        near = torch.randn(form, generator=generator, dtype=torch.float64)
        try:
            zero, up, down, *ys = (probe(x) for x in (near * 0, near * 0 + far, near * 0 - far, near, near * far))
        except Exception:  # it does not take so many dimensions, or cannot be tried here
            continue
        dim = -1 if last else 1
        shift, top, bottom = (v.movedim(dim, -1).reshape(-1, c)[0] for v in (zero, up, down))
        scale = (top - bottom) / (2 * far)
        for x, y in zip((near, near * far), ys, strict=True):
            scaled = x.movedim(dim, -1) * scale
            error = (y.movedim(dim, -1) - (scaled + shift)).abs()
            if not bool((error <= 1e-9 * (scaled.abs() + shift.abs())).all()):  # also where it is not a number
                return None
        return scale, shift
    return None


def _probe(module: nn.Module, source: Source) -> Callable[[Tensor], Tensor] | None:
    """The forward of a float64 copy of a norm, without hooks and what it does after; None if it cannot be had."""
    after = {id(m) for m in source.after.values()}
    try:
        names = [n for n, m in module._modules.items() if id(m) in after]
        probe = bare_copy(module, {n: nn.Identity() for n in [*source.after, *names]}).eval()
    except CannotBeTriedError:
        return None

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return probe.forward(x)

    return run


def neighbours_of(model: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers whose parameters are theirs alone, and are what they compute with."""
    holders = owners(model.modules())
    return [
        m
        for m in model.modules()
        if (type(m) in _PLAIN or qualified(type(m)) in _ALIKE)
        and not _touched(m)
        and isinstance(weight := m._parameters.get("weight"), nn.Parameter)
        and "bias" in m._parameters
        and weight.is_floating_point()
        and all(holders[storage_of(p)] == 1 for p in m._parameters.values() if p is not None)
    ]


def owners(modules: Iterable[nn.Module]) -> Counter[int]:
    """How many of the modules hold each tensor's memory."""
    held = ((*m._parameters.values(), *m._buffers.values()) for m in modules)
    return Counter(storage_of(t) for tensors in held for t in tensors if t is not None)


def find_pairs(
    flow: Flow, sites: Sequence[Site], affine: dict[str, Affine], neighbours: Sequence[nn.Module]
) -> list[Pair]:
    """A pair for each site that has a neighbour which can take its scale over, preferably before it."""
    known = set(neighbours)
    into = {link.taker: link for link in flow.links if link.maker in known}
    out_of = {link.maker: link for link in flow.links if link.taker in known}
    pairs = []
    for site in sites:
        norm = site.module
        if site.name not in affine or norm not in flow.ends:
            continue
        x, y = flow.ends[norm]
        if not _same_shape(site, x, y) or x.dtype != y.dtype:
            continue
        scale, shift = affine[site.name]
        before, behind = into.get(norm), out_of.get(norm)
        if before is not None and before.input.same_channels(
            _channel_dim(norm, site, x), before.output, _channel_of(before.maker)
        ):
            pairs.append(Pair(site, before.maker, True, scale, shift))
        elif (
            behind is not None
            and all(idle(m) for m in site.source.after.values())
            and behind.output.same_channels(_channel_dim(norm, site, y), behind.input, _channel_of(behind.taker))
        ):
            pairs.append(Pair(site, behind.taker, False, scale, shift))
    return pairs


def _same_shape(site: Site, x: Seen, y: Seen) -> bool:
    """Whether a norm keeps the shape; timm's Affine may put dimensions of one before it."""
    added = len(y.shape) - len(x.shape) if site.source.kind.channel_dim == -1 else 0
    return (1,) * added + x.shape == y.shape


def _channel_dim(norm: nn.Module, site: Site, x: Seen) -> int:
    """The dimension of the channels in a norm's input."""
    unbatched = isinstance(norm, nn.modules.instancenorm._InstanceNorm) and len(x.shape) == norm._get_no_batch_dim()
    return -1 if site.source.kind.channel_dim == -1 else 0 if unbatched else 1


def _channel_of(neighbour: Any) -> int:
    """The dimension of the channels in a neighbour's input and output, with a batch or without."""
    return -1 if isinstance(neighbour, nn.Linear) else -1 - len(neighbour.kernel_size)


def fused(pair: Pair, *, shift: bool) -> tuple[Tensor, Tensor | None] | None:
    """The neighbour's weight and bias that make up for the norm, or with ``shift=False`` for its scale.

    None where there are none: a shift does not pass through padding with zeros or a transposed convolution, and numbers
    may be too large for the dtype.
    """
    layer: Any = pair.neighbour
    transposed, scale, moved = isinstance(layer, _TRANSPOSED), pair.scale, shift and bool(pair.shift.any())
    weight = layer.weight.detach().cpu().double()
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    groups = getattr(layer, "groups", 1)
    by_group = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...); transposed: in and out
    view = [groups, 1, -1] if pair.before == transposed else [groups, -1, 1]
    new = (by_group * scale.view(*view, *[1] * (weight.ndim - 2))).flatten(0, 1)
    if pair.before:
        bias = None if bias is None else bias * scale
        added = pair.shift
    elif moved:
        if transposed or _pads_with_zeros(layer):
            return None
        taps = by_group.flatten(3).sum(3) if weight.ndim > 2 else by_group
        added = torch.einsum("goi,gi->go", taps, pair.shift.view(groups, -1)).flatten()
    if moved:
        bias = added if bias is None else bias + added
    made = (
        _like(new, layer.weight),
        None if bias is None else _like(bias, layer.weight if layer.bias is None else layer.bias),
    )
    return made if all(bool(t.isfinite().all()) for t in made if t is not None) else None


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """The values, laid out and placed as the tensor if it has their shape."""
    if value.shape == tensor.shape:
        return torch.empty_like(tensor, requires_grad=False).copy_(value)
    return value.to(tensor.device, tensor.dtype)


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if qualified(type(layer)) == _SAME or layer.padding == "same":
        return any(k > 1 for k in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)
