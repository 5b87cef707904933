"""Folding norms away, and the scales of norms alone."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.changes import LeftSite
from normzoo.convert._flow import Flow, storage_of, trace_flow
from normzoo.convert._outputs import comparable
from normzoo.convert._pairs import Affine, Neighbours, Pair, affine_of, find_pairs, fused, idle, owners
from normzoo.convert._report import FoldedSite, FoldReport
from normzoo.convert._selections import Selections
from normzoo.convert._sites import FOLDED, Site, folded_before, survey
from normzoo.convert._treat import Treat

# Far above rounding, of TensorFloat-32 too: what moves outputs by more is no rounding.
_MOVED = 0.05


def fold(model: nn.Module, example: Any = None, treat: Treat | None = None) -> FoldReport:
    """Fold what can be folded; see :func:`normzoo.fold_norms`."""
    found = survey(model, treat=treat, strict=False, verb="fold", required=not folded_before(model))
    sites = found.sites
    if any(site.module.training for site in sites):
        raise ValueError("folding keeps what a model computes in evaluation: call model.eval() first")
    affine, why = affine_of(sites)
    neighbours = Neighbours(model, sites)
    left = [site for site in sites if site.name in affine]
    folded: list[Pair] = []
    if left and not neighbours.names:
        why |= {site.name: "the model has no convolution or linear layer" for site in left}
    elif left:
        with Undo() as undo, torch.no_grad():
            folded, not_folded = _fold_all(model, example, left, affine, neighbours, undo)
            why |= not_folded
    return FoldReport(
        [FoldedSite(p.site.name, *_described(p.site), neighbours.names[p.neighbour], p.before) for p in folded],
        [*(LeftSite(s.name, *_described(s), why[s.name]) for s in sites if s.name in why), *found.left],
    )


def _described(site: Site) -> tuple[str, int]:
    return f"{type(site.module).__name__} ({site.source.kind.name})", site.source.num_features


def _fold_all(
    model: nn.Module,
    example: Any,
    left: Sequence[Site],
    affine: dict[str, Affine],
    neighbours: Neighbours,
    undo: Undo,
) -> tuple[list[Pair], dict[str, str]]:
    """Fold pairs until there are none, and compare what the model computes; the pairs, and why others are left."""
    layers = [*(site.module for site in left), *neighbours.names]
    compared = {**{n: m for m, n in neighbours.names.items()}, **{site.name: site.module for site in left}}
    selections = Selections()
    gone: list[Pair] = []
    too_large: dict[str, str] = {}
    flow = first = trace_flow(model, layers, example, compared=compared, selections=selections)
    if selections.entries:  # once more, since a first run may select for what it keeps, as torchvision's detectors do
        selections.entries.clear()
        flow = first = trace_flow(model, layers, example, compared=compared, selections=selections)
    while True:
        pairs, why = find_pairs(flow, left, affine, neighbours)
        folded = [pair for pair in pairs if _fold_one(pair, undo)]
        too_large |= {
            pair.site.name: f"the weights of {neighbours.names[pair.neighbour]} would be too large for their dtype"
            for pair in pairs
            if pair not in folded
        }
        left = [site for site in left if site.name in why]
        gone += folded
        if not folded:
            return gone, {**why, **too_large}
        compared |= {pair.site.name: _placed(pair.site) for pair in folded}
        try:
            flow = trace_flow(model, layers, example, compared=compared, selections=selections)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} needs its normalization layers for more than calling them and fails "
                f"without: {type(error).__name__}: {error}. Nothing was folded"
            ) from error
        _check(model, first, flow, gone, neighbours)


def _placed(site: Site) -> nn.Module:
    """The module that is at a site now."""
    parent, attribute = site.places[0]
    module = parent._modules[attribute]
    assert module is not None
    return module


def _check(model: nn.Module, first: Flow, flow: Flow, gone: Sequence[Pair], neighbours: Neighbours) -> None:
    """Raise a ValueError unless the model computes what it computed, without the layers that are gone."""
    name = type(model).__name__
    if called := [pair.site.name for pair in gone if flow.calls[pair.site.module]]:
        raise ValueError(f"{name} keeps {', '.join(called[:5])} elsewhere than in its submodules. Nothing was folded")
    if comparable(first.outputs, flow.outputs):
        for before, now in zip(first.outputs, flow.outputs, strict=True):
            _compare(before, now, f"the outputs of {name}")
        return
    changed = {neighbours.names[p.neighbour] if p.before else p.site.name for p in gone}
    seen = 0
    for layer, samples in first.samples.items():
        for (size, before), (size_now, now) in zip(samples, flow.samples.get(layer, ()), strict=False):
            if layer not in changed and size == size_now:
                _compare(before, now, f"the outputs of {layer}")
                seen += 1
    if not seen:
        raise ValueError(
            f"neither the outputs of {name} nor those of its layers can be compared: they differ in number with the "
            "same example. Nothing was folded"
        )


def _compare(before: Tensor, now: Tensor, what: str) -> None:
    finite = before.isfinite()
    moved = (now - before).abs()[finite]
    bound = _MOVED * before[finite].abs().amax() if moved.numel() else 0
    if not bool((moved <= bound).all()) and before.dtype.itemsize >= 4:  # half precision may round as much
        raise ValueError(
            f"{what} moved by {moved.max():.2g} when norms were folded: the model does not call its layers in the same "
            "order every time, or changes their outputs unseen. Nothing was folded"
        )


def _fold_one(pair: Pair, undo: Undo) -> bool:
    """Replace a norm's neighbour's parameters and the norm; False where the numbers do not fit into the dtype."""
    layer: Any = pair.neighbour
    if (made := fused(pair, shift=True)) is None:
        return False
    if "bias" in vars(layer):  # which is None, and no parameter
        undo.put(vars(layer), "bias", None)
        del layer.bias
        layer.register_parameter("bias", None)
        undo.callback(layer._parameters.pop, "bias")
    for name, value in zip(("weight", "bias"), made, strict=True):
        undo.put(layer._parameters, name, layer._parameters[name])
        if value is not None:
            layer._parameters[name] = nn.Parameter(value, requires_grad=layer.weight.requires_grad)
    undo.callback(pair.site.put, pair.site.module)
    pair.site.put(_remainder(pair.site))
    return True


def _remainder(site: Site) -> nn.Module:
    """What is left of a norm that is folded: its activation if it has one."""
    after = {name: m for name, m in site.source.after.items() if not idle(m)}
    several = nn.Sequential(OrderedDict(after)) if after else nn.Identity()
    left = next(iter(after.values())) if len(after) == 1 else several.train(site.module.training)
    vars(left)[FOLDED] = True
    return left


class Undo(contextlib.ExitStack[None]):
    """A stack of callbacks that run if an error leaves it, and else do not."""

    def put(self, holder: dict[str, Any], name: str, value: Any) -> None:
        """Put the value back under the name."""
        self.callback(holder.__setitem__, name, value)

    def set(self, tensor: Tensor, value: Tensor) -> None:
        """Set a tensor now, and give it back what it held."""
        self.callback(_set, tensor, tensor.detach().clone())
        _set(tensor, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Undo on error."""
        if kind is None:
            self.pop_all()
        super().__exit__(kind, error, trace)


def _set(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def shed_scales(model: nn.Module, sites: Sequence[Site], layers: Sequence[nn.Module], example: Any = None) -> Undo:
    """Multiply every site's scale into its neighbour and put what is left into the new layer's bias, in place.

    Returns:
        a context that undoes it if an error leaves it.

    Raises:
        ValueError: in training mode, or for a site whose scale or shift has no place to go.
    """
    if any(site.module.training for site in sites):
        raise ValueError("fold=True keeps what a model computes in evaluation: call model.eval() first")
    affine, why = affine_of(sites)
    neighbours = Neighbours(model, sites)
    pairs: dict[str, Pair] = {}
    if not neighbours.names:
        why |= dict.fromkeys(affine, "the model has no convolution or linear layer")
    elif affine:
        flow = trace_flow(model, [*(s.module for s in sites), *neighbours.names], example)
        found, no_pair = find_pairs(flow, sites, affine, neighbours, shifts=False)
        pairs, why = {pair.site.name: pair for pair in found}, {**why, **no_pair}
    left = {name: rest for name, pair in pairs.items() if (rest := _left(pair)).isfinite().all()}
    if stuck := [s.name for s in sites if s.name not in left]:
        reasons = [f"{name} ({why.get(name, 'a scale of zero leaves no place for its shift')})" for name in stuck]
        raise ValueError(
            f"the scale of {'; '.join(reasons[:3])}{f' and {len(stuck) - 3} more' if len(stuck) > 3 else ''} cannot be "
            "multiplied into a convolution or linear layer beside it; exclude them, or use fold=False"
        )
    held = [layer._parameters.get("bias") for layer in layers]
    if homeless := [s.name for s, bias in zip(sites, held, strict=True) if bias is None and left[s.name].any()]:
        raise ValueError(f"the shift of {', '.join(homeless[:5])} has no place in layers without bias (affine=False)")
    holders = owners([*model.modules(), *layers])
    with Undo() as undo:
        for site, layer, bias in zip(sites, layers, held, strict=True):
            pair = pairs[site.name]
            neighbour: Any = pair.neighbour
            if (made := fused(pair, shift=False)) is None:
                raise ValueError(f"the scale of {site.name} makes weights that are too large for their dtype")
            undo.set(neighbour.weight, made[0])
            if made[1] is not None:
                undo.set(neighbour.bias, made[1])
            if bias is None:
                continue
            if holders[storage_of(bias)] > 2:  # more than the old layer and the new one
                own = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
                undo.set(own, left[site.name])
                layer._parameters["bias"] = own
            else:
                undo.set(bias, left[site.name])
        return undo.pop_all()


def _left(pair: Pair) -> Tensor:
    """What a layer without scale has to add, once its neighbour has the scale; not finite where nothing would do."""
    if pair.before:
        return pair.shift
    return torch.where(pair.shift == 0, 0.0, pair.shift / pair.scale)
