"""Folding norms away, and the scales of norms alone."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._flow import Flow, storage_of, watch
from normzoo.convert._pairs import Pair, affine_of, find_pairs, fused, idle, neighbours_of, owners
from normzoo.convert._sites import Site, survey
from normzoo.convert._treat import Treat

# Far above rounding, of TensorFloat-32 too: what moves outputs by more is no rounding.
_MOVED = 0.05


def fold(model: nn.Module, example: Any = None, treat: Treat | None = None) -> int:
    """Fold what can be folded; see :func:`normzoo.fold_norms`."""
    sites = survey(model, treat=treat, strict=False).sites
    if any(site.module.training for site in sites):
        raise ValueError("folding keeps what a model computes in evaluation: call model.eval() first")
    affine, neighbours = affine_of(sites), neighbours_of(model)
    left = [site for site in sites if site.name in affine]
    if not left or not neighbours:
        return 0
    gone: list[Site] = []
    layers = [*(site.module for site in left), *neighbours]
    with Undo() as undo, torch.no_grad():
        flow = first = watch(model, layers, example)
        while pairs := find_pairs(flow, left, affine, neighbours):
            folded = [pair.site for pair in pairs if _fold_one(pair, undo)]
            tried = {pair.site.name for pair in pairs}
            left = [site for site in left if site.name not in tried]
            gone += folded
            if not folded:
                break
            try:
                flow = watch(model, layers, example)
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__} needs its normalization layers for more than calling them and fails "
                    f"without: {type(error).__name__}: {error}. Nothing was folded"
                ) from error
            _check(model, first, flow, gone)
    return len(gone)


def _check(model: nn.Module, first: Flow, flow: Flow, gone: Sequence[Site]) -> None:
    """Raise a ValueError unless the model computes what it computed, without the layers that are gone."""
    name = type(model).__name__
    if called := [site.name for site in gone if flow.calls[site.module]]:
        raise ValueError(f"{name} keeps {', '.join(called[:5])} elsewhere than in its submodules. Nothing was folded")
    for before, now in zip(first.outputs, flow.outputs, strict=True):
        finite = before.isfinite()
        moved = (now - before).abs()[finite]
        bound = _MOVED * before[finite].abs().amax() if moved.numel() else 0
        if not bool((moved <= bound).all()) and before.dtype.itemsize >= 4:  # half precision may round as much
            raise ValueError(
                f"the outputs of {name} moved by {moved.max():.2g} when norms were folded: it does not call its layers "
                "in the same order every time, or changes their outputs unseen. Nothing was folded"
            )


def _fold_one(pair: Pair, undo: Undo) -> bool:
    """Replace a norm's neighbour's parameters and the norm; False where the numbers do not fit into the dtype."""
    layer: Any = pair.neighbour
    if (made := fused(pair, shift=True)) is None:
        return False
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
    if len(after) == 1:
        return next(iter(after.values()))
    return (nn.Sequential(OrderedDict(after)) if after else nn.Identity()).train(site.module.training)


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
    affine, neighbours = affine_of(sites), neighbours_of(model)
    pairs: dict[str, Pair] = {}
    if affine and neighbours:
        flow = watch(model, [*(s.module for s in sites), *neighbours], example)
        pairs = {pair.site.name: pair for pair in find_pairs(flow, sites, affine, neighbours)}
    left = {name: rest for name, pair in pairs.items() if (rest := _left(pair)).isfinite().all()}
    if stuck := [s.name for s in sites if s.name not in left]:
        raise ValueError(
            f"the scale of {', '.join(stuck[:5])}{f' and {len(stuck) - 5} more' if len(stuck) > 5 else ''} has no "
            "convolution or linear layer beside it to be multiplied into; exclude them, or use fold=False"
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
