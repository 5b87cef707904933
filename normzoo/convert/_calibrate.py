"""Setting scale and shift of new layers so that their outputs have the moments that the original's had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normzoo.convert._fit import TINY, Fit, WantedMoments, moments_of
from normzoo.convert._outputs import comparable, floating, sampled
from normzoo.convert._replace import Made
from normzoo.convert._report import Movement
from normzoo.convert._running import Forward, batches_of, evaluating, run_batch
from normzoo.convert._selections import Selections
from normzoo.convert._sites import Site

_MOST_PASSES = 20


@dataclass
class _Kept:
    """A batch, and what the original made of it.

    Attributes:
        batch: as the loader gave it.
        number: its place in the loader.
        selections: what the original selected by its values.
        outputs: its floating-point outputs.
        samples: values of the outputs of each site that was reached.
        size: the number of values that reached sites.
    """

    batch: Any
    number: int
    selections: Selections = field(default_factory=Selections)
    outputs: list[Tensor] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    size: int = 0


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    made: Sequence[Made],
    batches: Iterable[Any],
    forward: Forward | None,
    change: Callable[[], None],
) -> tuple[Movement, Movement, list[str]]:
    """Change the layers and calibrate the new ones.

    Every layer's scale and shift depend on those of the layers before it, so that all batches would have to come to a
    layer before any goes on. Instead the largest batch goes first: each layer is set when it comes there, by that
    batch's moments and by how far those of all batches were from them in the pass before. The other batches follow, and
    each layer is set again by the moments of all. Passes are repeated until nothing moves any more. That needs no more
    passes than there are layers, since the first layer is right after one pass, the second after two; with float32 it
    is four to eight, and with a single batch it is one.

    Args:
        model: with the original layers.
        sites: where these stand.
        made: the new layers.
        batches: iterated over once, and kept.
        forward: runs the model on a batch of another kind.
        change: puts the new layers into their places.

    Returns:
        how far outputs moved, before and after calibration, and warnings.
    """
    layers = [m.layer for m in made]
    runner = _Runner(model, forward)
    warnings: list[str] = []
    with evaluating(model, *layers), torch.no_grad():
        kept, wanted = _observe(runner, sites, batches)
        if not kept:
            raise ValueError("calibrate has no batches")
        if any(bool(y.isnan().any()) for k in kept for y in k.outputs):
            raise ValueError("the model's outputs on the calibration batches are not finite")
        change()
        runner.prefix = "with the new layers, "
        before = _distance(runner, kept, layers)
        fits = [Fit(site, m, moments) for site, m, moments in zip(sites, made, wanted, strict=True)]
        if (moving := _fit(runner, kept, fits)) is not None:
            warnings.append(f"calibration did not settle: in the last of {_MOST_PASSES} passes {moving:.1g} changed")
        for fit in fits:
            fit.finish()
        after = _distance(runner, kept, layers)
    if before.of_outputs is None or after.of_outputs is None:
        warnings.append(
            "the model's outputs cannot be compared, as they differ in number, are empty or hold no floating-point "
            "tensors: how far they are away is that of the converted layers' outputs"
        )
        return before.of_layers, after.of_layers, warnings
    return before.of_outputs, after.of_outputs, warnings


class _Runner:
    """Runs a model on batches, each time with the same random numbers, and leaves the batches as they are."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        self.model, self.forward = model, forward
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self.prefix = ""

    def __call__(self, kept: _Kept) -> Any:
        with torch.random.fork_rng(self.devices):
            batch = tree_map_only(Tensor, torch.clone, kept.batch)  # a model may change its input in place
            try:
                return run_batch(self.model, batch, kept.number, self.forward)
            except ValueError as error:
                raise ValueError(f"{self.prefix}{error}") from error


@contextlib.contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _observe(runner: _Runner, sites: Sequence[Site], batches: Iterable[Any]) -> tuple[list[_Kept], list[WantedMoments]]:
    """The batches, and the moments of the original at the sites: of the first call of each in each batch."""
    wanted = [WantedMoments() for _ in sites]
    kept: list[_Kept] = []
    for number, batch in enumerate(batches_of(batches)):
        if not number:  # a first run may select for what it keeps, as torchvision's detectors do
            runner(_Kept(batch, number))
        now, seen = _Kept(batch, number), [WantedMoments() for _ in sites]
        modules = [site.module for site in sites]
        with (
            _hooks(h for site, moments in zip(sites, seen, strict=True) for h in _observing(site, moments)),
            _hooks(_sampling(modules, now.samples)),
            now.selections.recorded(modules),
        ):
            now.outputs = floating(runner(now))
        for moments, one in zip(wanted, seen, strict=True):
            if one.normalized is not None:
                moments.normalized = one.normalized.merged(moments.normalized)
            if one.activated is not None:
                moments.activated = one.activated.merged(moments.activated)
                now.size += one.activated.count
        kept.append(now)
    return kept, wanted


def _observing(site: Site, moments: WantedMoments) -> list[Any]:
    dim = site.source.kind.channel_dim
    first = next((m for n in ("drop", "act") if isinstance(m := getattr(site.module, n, None), nn.Module)), None)

    def before_activation(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.normalized = moments.normalized or moments_of(inputs[0], dim)

    def end(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        moments.activated = moments.activated or moments_of(y, dim)
        if first is None and site.source.own_activation is None and not site.source.after:
            moments.normalized = moments.normalized or moments.activated

    handles = [site.module.register_forward_hook(end)]
    if first is not None:
        handles.append(first.register_forward_pre_hook(before_activation))
    return handles


def _sampling(modules: Sequence[nn.Module], samples: dict[int, Tensor]) -> list[Any]:
    """Hooks that keep some values of the first output of each module in this pass."""

    def hook(i: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            if i not in samples:
                samples[i] = sampled(y)

        return keep

    return [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]


@dataclass
class _Distances:
    """How far a pass was from the original's: of its outputs, None if they cannot be compared, and of its layers'."""

    of_outputs: Movement | None
    of_layers: Movement


class _Sums:
    """Sums of squares of differences and values, and of classes that are the same."""

    def __init__(self) -> None:
        self.difference = self.size = 0.0
        self.same: list[Tensor] = []
        self.classified = True

    def add(self, original: Tensor, now: Tensor) -> None:
        there = original.isfinite()
        a, b = original[there].double(), now[there].double()
        self.difference += float((a - b).square().sum())
        self.size += float(a.square().sum())

    def movement(self) -> Movement:
        same = float(torch.cat(self.same).double().mean()) if self.same and self.classified else None
        return Movement((self.difference / max(self.size, TINY)) ** 0.5, same)


def _distance(runner: _Runner, kept: Sequence[_Kept], layers: Sequence[nn.Module]) -> _Distances:
    """How far the model is from the original, which both select the same where they select by their values."""
    outputs, inside, compared = _Sums(), _Sums(), True
    for k in kept:
        samples: dict[int, Tensor] = {}
        with _hooks(_sampling(layers, samples)), k.selections.repeated(layers):
            now = floating(runner(k))
        for i in samples.keys() & k.samples.keys():
            if samples[i].shape == k.samples[i].shape:
                inside.add(k.samples[i], samples[i])
        compared = compared and comparable(k.outputs, now)
        if not compared:
            continue
        for a, b in zip(k.outputs, now, strict=True):
            outputs.add(a, b)
        if len(now) == 1 and now[0].ndim == 2 and now[0].shape[1] > 1:
            outputs.same.append(k.outputs[0].argmax(1) == now[0].argmax(1))
        else:
            outputs.classified = False
    return _Distances(outputs.movement() if compared else None, inside.movement())


def _fit(runner: _Runner, kept: Sequence[_Kept], fits: Sequence[Fit]) -> float | None:
    """Run the passes that set the layers; what still moved in the last one, None if nothing did."""
    order = sorted(kept, key=lambda k: -k.size)
    last = float("inf")
    for _ in range(_MOST_PASSES):
        for fit in fits:
            fit.begin_pass()
        for k in order:
            for fit in fits:
                fit.called = False
            with _hooks(handle for fit in fits for handle in fit.hooks()):
                runner(k)
        changes = [fit.end_pass() for fit in fits]
        now, tolerance = max(c for c, _ in changes), max(t for _, t in changes)
        if len(kept) == 1 or now <= tolerance or (now < 1e-3 and now > last / 2):  # what is left is rounding
            return None
        last = now
    return last
