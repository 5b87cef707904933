"""Setting scale and shift of new layers so that their outputs have the moments that the original's had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normzoo.convert._replace import NEW_STATISTICS, Made
from normzoo.convert._report import Movement
from normzoo.convert._running import evaluating
from normzoo.convert._sites import Site

Moments = tuple[Tensor, Tensor]
_TINY = 1e-12
_PASSES = 200  # after which running averages of an unknown rate are those of the batch


def gathered(batches: Iterable[Any]) -> Tensor:
    """Batches, each a tensor or a sequence whose first is the input, as one tensor.

    Raises:
        ValueError: if there is none, or they do not have one shape.
        TypeError: for batches of another kind.
    """
    inputs = []
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"calibrate takes tensors or (input, ...) pairs of them, not {type(x).__name__}")
        inputs.append(x)
    if not inputs or not sum(len(x) for x in inputs):
        raise ValueError("calibrate has no batches")
    if len({x.shape[1:] for x in inputs}) > 1:
        raise ValueError(
            f"the batches to calibrate with differ in shape: {sorted({tuple(x.shape[1:]) for x in inputs})}"
        )
    return torch.cat(inputs)


@dataclass
class Target:
    """Moments of each channel where the original's norm ends, and after the activation that follows in it."""

    normalized: Moments | None = None
    activated: Moments | None = None


def calibrate(
    model: nn.Module, sites: Sequence[Site], made: Sequence[Made], x: Tensor, change: Callable[[], None]
) -> tuple[Movement, Movement]:
    """Change the layers and calibrate the new ones.

    Args:
        model: with the original layers.
        sites: where these stand.
        made: the new layers.
        x: the inputs.
        change: puts the new layers into their places.

    Returns:
        how far outputs moved, before and after calibration.
    """
    with evaluating(model, *(m.layer for m in made)), torch.no_grad():
        try:
            targets, original = _observe(model, sites, x)
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"the model cannot be run on the calibration batches: {error}") from error
        if not all(bool(y.isfinite().all()) for y in original):
            raise ValueError("the model's outputs on the calibration batches are not finite")
        change()
        before = _movement(original, _outputs(model(x)))
        reached: set[int] = set()
        with _hooks(
            hook
            for i, (site, m, target) in enumerate(zip(sites, made, targets, strict=True))
            for hook in _calibrating(i, site, m, target, reached)
        ):
            model(x)
        for i, m in enumerate(made):
            if i not in reached:
                m.warnings.append("the calibration batches did not reach it")
        return before, _movement(original, _outputs(model(x)))


def channel_moments(y: Tensor, channel_dim: int) -> Moments:
    """Mean and biased variance of each channel, (C,), in float64."""
    y = y.detach().movedim(channel_dim, -1).reshape(-1, y.shape[channel_dim])
    var, mean = torch.var_mean(y.float() if y.dtype != torch.float64 else y, 0, correction=0)
    return mean.double(), var.double()


@contextlib.contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _observe(model: nn.Module, sites: Sequence[Site], x: Tensor) -> tuple[list[Target], list[Tensor]]:
    """The targets of the sites, from the first call of each, and the outputs."""
    targets = [Target() for _ in sites]
    with _hooks(h for site, target in zip(sites, targets, strict=True) for h in _observing(site, target)):
        outputs = _outputs(model(x))
    return targets, outputs


def _observing(site: Site, target: Target) -> list[Any]:
    dim = site.source.kind.channel_dim
    first = next((m for n in ("drop", "act") if isinstance(m := getattr(site.module, n, None), nn.Module)), None)

    def before_activation(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        target.normalized = target.normalized or channel_moments(inputs[0], dim)

    def end(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        target.activated = target.activated or channel_moments(y, dim)
        if first is None and site.source.own_activation is None and not site.source.after:
            target.normalized = target.normalized or target.activated

    handles = [site.module.register_forward_hook(end)]
    if first is not None:
        handles.append(first.register_forward_pre_hook(before_activation))
    return handles


def _calibrating(i: int, site: Site, made: Made, target: Target, reached: set[int]) -> list[Any]:
    """Hooks that set the layer's statistics and parameters at its first call, and correct that call's output."""
    layer: Any = made.layer.norm if isinstance(made.layer, nn.Sequential) else made.layer
    own = isinstance(getattr(layer, "act_layer", None), str)
    act = getattr(layer, "act", None)
    wanted = target.activated if own else target.normalized
    dim = site.source.kind.channel_dim

    def start(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if i not in reached and any(n.startswith("running_") for n in made.new):
            _take_statistics(layer, inputs[0], site.name)
            made.warnings.remove(NEW_STATISTICS)

    def end(y: Tensor) -> Tensor:
        if i in reached:
            return y
        reached.add(i)
        if hasattr(layer, "inner"):
            made.warnings.append("not calibrated: its scale and shift lie inside its activation")
            return y
        if wanted is None:
            made.warnings.append("not calibrated: the original's activation is a part of its formula")
            return y
        return _match(layer, y, wanted, dim, made)

    handles = [layer.register_forward_pre_hook(start)]
    if act is not None:
        handles.append(act.register_forward_pre_hook(lambda _, inputs: (end(inputs[0]), *inputs[1:])))
    else:
        handles.append(layer.register_forward_hook(lambda _, inputs, y: end(y)))
    return handles


def _take_statistics(layer: Any, x: Tensor, name: str) -> None:
    """Make the running statistics those of ``x``."""
    held = {n: getattr(layer, n) for n in ("momentum", "sync") if hasattr(layer, n)}
    layer.train()
    try:
        # as the batches are joined, and without waiting for other ranks
        vars(layer).update({n: 1.0 if n == "momentum" else False for n in held})
        if hasattr(layer, "normalize") and hasattr(layer, "channel_dim"):
            layer.normalize(x.movedim(-1, 1) if layer.channel_dim == -1 and x.ndim > 2 else x)
        else:
            for _ in range(1 if "momentum" in held else _PASSES):
                layer.forward(x)
    except ValueError as error:
        raise ValueError(f"the running statistics of {name} cannot be taken from the batches: {error}") from error
    finally:
        layer.eval()
        vars(layer).update(held)


def _match(layer: nn.Module, y: Tensor, wanted: Moments, dim: int, made: Made) -> Tensor:
    """Set scale and shift so that ``y`` would have had the wanted moments; returns what ``y`` would then have been."""
    weight, bias = (getattr(layer, n, None) for n in ("weight", "bias"))
    if weight is None and bias is None:
        made.warnings.append("not calibrated: it has neither scale nor shift")
        return y
    mean, var = channel_moments(y, dim)
    ratio, shift = torch.ones_like(mean), torch.zeros_like(mean)
    if weight is not None:
        # a channel that is constant in the new layer, such as one whose scale is zero, stays so
        alive = var > _TINY * (wanted[1] + _TINY)
        ratio = torch.where(alive, (wanted[1] / var.where(alive, torch.ones_like(var))).sqrt(), ratio)
        if bool((~alive & (wanted[1] > _TINY) & (weight != 0)).any()):
            made.warnings.append("some channels are constant in the new layer and were not in the original's")
    else:
        made.warnings.append("only the means are calibrated: it has no scale")
    if bias is not None:
        shift = wanted[0] - mean * ratio
    else:
        made.warnings.append("only the variances are calibrated: it has no shift")
    if weight is not None:
        weight.copy_(weight * ratio)
    for moved in (bias, getattr(layer, "tau", None)):  # tau is the level below which nothing passes
        if moved is not None:
            moved.copy_(moved * ratio + shift)
    view = [-1] + [1] * (y.ndim - 2) if dim == 1 else [-1]
    return (y * ratio.to(y.dtype).view(view)).add_(shift.to(y.dtype).view(view))


def _outputs(y: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tree_leaves(y) if isinstance(t, Tensor) and t.is_floating_point()]


def _movement(original: list[Tensor], now: list[Tensor]) -> Movement:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(original, now, strict=True))
    size = sum(float(a.double().square().sum()) for a in original)
    same = None
    if len(original) == 1 and original[0].ndim == 2 and original[0].shape[1] > 1:
        same = float((original[0].argmax(1) == now[0].argmax(1)).double().mean())
    return Movement((difference / max(size, _TINY)) ** 0.5, same)
