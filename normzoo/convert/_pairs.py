"""Norms that are a scale and shift of channels, and the convolutions and linear layers that can take them over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._carrier import Carrier, scaled, shifted
from normzoo.convert._flow import Flow, Link, Seen, Step, storage_of
from normzoo.convert._kinds import Source
from normzoo.convert._sites import Site
from normzoo.convert._trial import CannotBeTriedError, bare_copy
from normzoo.recognition import known_class, qualified

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
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


def affine_of(sites: Sequence[Site]) -> tuple[dict[str, Affine], dict[str, str]]:
    """The scale and shift of those sites that are nothing else in evaluation, and of all others why not, by name."""
    affine: dict[str, Affine] = {}
    why: dict[str, str] = {}
    for site in sites:
        if _touched(site.module):
            why[site.name] = "it has forward hooks, or a forward set on the instance"
        elif any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in site.places):
            why[site.name] = "TransformerEncoderLayer reads its tensors in evaluation and does not call it"
        elif (found := scale_and_shift(site.module, site.source)) is None:
            why[site.name] = "in evaluation it is not a fixed scale and shift of channels"
        else:
            affine[site.name] = found
    return affine, why


def _touched(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own have a part in what a layer computes, or would be lost with it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


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


class Neighbours:
    """The convolutions and linear layers of a model: which can take over scales, and why others cannot.

    A layer of torch's own classes is known; of other classes with ``weight`` and ``bias``, subclasses of these or not,
    a copy is tried.

    Attributes:
        names: of each layer, its dotted name.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._norms = {site.module for site in sites}
        self.names = {m: name for name, m in model.named_modules() if self._is_one(m)}
        self._holders = owners(model.modules())
        self._carriers: dict[nn.Module, Carrier] = {}
        self._scales_outputs: dict[nn.Module, str] = {}
        self._scales_inputs: dict[tuple[nn.Module, bool], str] = {}

    def _is_one(self, module: nn.Module) -> bool:
        if isinstance(module, _LAYERS):
            return True
        known = known_class(module)
        if known is not None and not known.overridden:
            return False
        weight = module._parameters.get("weight")
        return (
            weight is not None
            and weight.ndim >= 2
            and not any(m in self._norms or isinstance(m, _LAYERS) for m in module.modules())
        )

    def problem(
        self, layer: nn.Module, shape: tuple[int, ...] | None, before: bool, shift: bool, held: str = ""
    ) -> str:
        """Why a layer cannot take over a scale, or a scale and shift; empty if it can.

        Args:
            layer: one of these.
            shape: of its only input; None if it has another number of inputs.
            before: of its output's channels, or else of its input's.
            shift: whether there is a shift.
            held: the attribute of the layer that is the norm, where the layer calls it itself.
        """
        weight = layer._parameters.get("weight")
        if _touched(layer):
            return "has forward hooks, or a forward set on the instance"
        if type(layer).__name__.startswith("Parametrized") and hasattr(layer, "parametrizations"):
            return "computes its weight by a parametrization: see torch.nn.utils.parametrize.remove_parametrizations"
        if not isinstance(weight, nn.Parameter):
            return "has no parameter weight of its own, but computes it"
        if "bias" not in layer._parameters and getattr(layer, "bias", ...) is not None:
            return "has no parameter bias"
        if not weight.is_floating_point():
            return f"has weights of {weight.dtype}"
        if any(self._holders[storage_of(p)] > 1 for p in layer._parameters.values() if p is not None):
            return "shares its weight or bias with another module"
        if type(layer) in _LAYERS:
            return "pads its input with zeros, through which no shift passes" * (
                not before and shift and _stops_shifts(layer)
            )
        if shape is None:
            return "is not called with one tensor, so that it cannot be tried"
        return self._tried(layer, shape, before, shift, held)

    def _tried(self, layer: nn.Module, shape: tuple[int, ...], before: bool, shift: bool, held: str) -> str:
        if layer not in self._carriers:
            self._carriers[layer] = Carrier(layer, shape, isinstance(layer, _TRANSPOSED))
        carrier = self._carriers[layer]
        if held:
            why = carrier.absorbs(held)
        elif before:
            if layer not in self._scales_outputs:
                self._scales_outputs[layer] = carrier.scales_outputs()
            why = self._scales_outputs[layer]
        else:
            if (layer, shift) not in self._scales_inputs:
                self._scales_inputs[layer, shift] = carrier.scales_inputs(shift)
            why = self._scales_inputs[layer, shift]
        return f"({type(layer).__name__}) was tried: {why}" if why else ""


def owners(modules: Iterable[nn.Module]) -> Counter[int]:
    """How many of the modules hold each tensor's memory."""
    held = ((*m._parameters.values(), *m._buffers.values()) for m in modules)
    return Counter(storage_of(t) for tensors in held for t in tensors if t is not None)


def find_pairs(
    flow: Flow, sites: Sequence[Site], affine: dict[str, Affine], neighbours: Neighbours, *, shifts: bool = True
) -> tuple[list[Pair], dict[str, str]]:
    """A pair for each site that has a neighbour which can take its scale over, preferably before it.

    Args:
        flow: how data flows between the sites and the neighbours.
        sites: where the norms stand.
        affine: their scales and shifts.
        neighbours: the layers that may take them over.
        shifts: whether the shifts are to go there too.

    Returns:
        the pairs, and by name why each other site has none.
    """
    names = {**neighbours.names, **{site.module: site.name for site in sites}}
    pairs: list[Pair] = []
    why: dict[str, str] = {}
    for site in sites:
        if site.name not in affine:
            continue
        norm, (scale, shift) = site.module, affine[site.name]
        if norm not in flow.ends or flow.calls[norm] != 1:
            calls = flow.calls[norm]
            if calls > 1:
                why[site.name] = f"it is called {calls} times"
            elif outer := flow.inside.get(norm):
                if problem := _held(flow, site, outer, neighbours):
                    why[site.name] = f"it is called inside of {names[outer]} ({type(outer).__name__}){problem}"
                else:
                    pairs.append(Pair(site, outer, True, scale, shift))
            else:
                why[site.name] = "it is not called with one tensor" if calls else "the example does not reach it"
            continue
        x, y = flow.ends[norm]
        if not _same_shape(site, x, y) or x.dtype != y.dtype:
            why[site.name] = "it changes the shape or dtype of its input"
            continue
        obstacles = []
        for before in (True, False):
            found = _walk(flow, site, before, scale, shift * shifts, neighbours, names)
            if isinstance(found, nn.Module):
                pairs.append(Pair(site, found, before, scale, shift))
                break
            obstacles.append(found)
        else:
            why[site.name] = "; ".join(dict.fromkeys(obstacles))
    return pairs, why


def _held(flow: Flow, site: Site, outer: nn.Module, neighbours: Neighbours) -> str:
    """Why a norm cannot go into the layer that holds it and calls it, as detectron2's convolutions do."""
    held = [attribute for parent, attribute in site.places if parent is outer]
    if outer not in neighbours.names or len(held) != len(site.places) or len(held) != 1:
        return ", which does not hold it alone, or is no convolution or linear layer"
    if flow.calls[outer] != 1 or outer in flow.used:
        return ", which is called several times, or whose parameters are used elsewhere too"
    ends = flow.ends.get(outer)
    problem = neighbours.problem(outer, None if ends is None else ends[0].shape, True, True, held[0])
    return f", which {problem}" if problem else ""


def _walk(
    flow: Flow,
    site: Site,
    before: bool,
    scale: Tensor,
    shift: Tensor,
    neighbours: Neighbours,
    names: dict[nn.Module, str],
) -> nn.Module | str:
    """The layer before or behind a norm that can take its scale over; else why there is none.

    Between them may be operations through which the scale and shift pass.
    """
    norm = site.module
    steps: list[Link] = []
    link = (flow.into if before else flow.out_of).get(norm)
    while link is not None and isinstance(node := link.maker if before else link.taker, Step):
        steps.append(link)
        link = (flow.into if before else flow.out_of).get(node)
    end: Any = None if link is None else link.maker if before else link.taker
    if link is None or end not in neighbours.names:
        if not before:
            return "no convolution or linear layer is right behind it"
        made_by = names.get(end) or flow.makers.get(norm)
        return (
            f"its input is the output of {made_by}" if made_by else "no convolution or linear layer is right before it"
        )
    name = neighbours.names[end]
    if not before and not all(idle(m) for m in site.source.after.values()):
        return f"its activation is before {name}"
    links = [*steps, link][::-1] if before else [*steps, link]
    for each in links:
        if each.problem:
            return each.problem.format(names.get(each.blamed, "an operation beside it"))  # type: ignore[arg-type]
    ends = flow.ends.get(end)
    if why := neighbours.problem(end, None if ends is None else ends[0].shape, before, bool(shift.any())):
        return f"{name} {why}"
    x, y = flow.ends[norm]
    dims = _channel_of(end), _channel_dim(norm, site, x if before else y)
    start, stop = dims if before else dims[::-1]
    return _passes(links, start, stop, scale, shift) or end


def _passes(links: Sequence[Link], start: int, stop: int, scale: Tensor, shift: Tensor) -> str:
    """Why the channels of the first link's maker are not those of the last one's taker; empty if they are."""
    dim = start
    for link in links:
        if isinstance(link.taker, Step):
            inside = next(
                (d for d in range(len(link.input.shape)) if link.output.same_channels(dim, link.input, d)), None
            )
            out = None if inside is None else link.taker.passes(scale, shift, inside)
            if out is None:
                negative = "max" in link.taker.name and bool((scale < 0).any())
                what = "negative scales do" if negative else "its scale and shift do"
                return f"{link.taker.name} is between, through which {what} not pass"
            dim = out
        elif not link.output.same_channels(dim, link.input, stop):
            return "its channels are not those of the layer beside it"
    return ""


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
    return 1 - int(neighbour.weight.ndim)


def fused(pair: Pair, *, shift: bool) -> tuple[Tensor, Tensor | None] | None:
    """The neighbour's weight and bias that make up for the norm, or with ``shift=False`` for its scale.

    None where the numbers are too large for the dtype.
    """
    layer: Any = pair.neighbour
    transposed, scale, moved = isinstance(layer, _TRANSPOSED), pair.scale, shift and bool(pair.shift.any())
    weight = layer.weight.detach().cpu().double()
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    groups = getattr(layer, "groups", 1)
    new = scaled(weight, scale, groups, int(pair.before == transposed))
    if pair.before:
        bias = None if bias is None else bias * scale
        added = pair.shift
    elif moved:
        added = shifted(weight, pair.shift, groups)
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


def _stops_shifts(layer: Any) -> bool:
    """Whether a layer of torch's pads its input with zeros, or is a transposed convolution, which does as much."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer, _TRANSPOSED):
        return True
    if layer.padding == "same":
        return any(k > 1 for k in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)
