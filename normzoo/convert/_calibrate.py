"""Setting scale and shift of new layers so that their outputs have the moments that the original's had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normzoo.convert._outputs import comparable, floating, sampled
from normzoo.convert._replace import NEW_STATISTICS, Made
from normzoo.convert._report import Movement
from normzoo.convert._running import Forward, batches_of, evaluating, run_batch
from normzoo.convert._selections import Selections
from normzoo.convert._sites import Site
from normzoo.convert._tally import Tally, by_batch, is_stream, running_buffers

_TINY = 1e-12
_MOST_PASSES = 20


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of each channel, (C,), in float64, and of how many values of a channel they are."""

    count: int
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, y: Tensor, channel_dim: int) -> Moments:
        """Those of a tensor."""
        return cls(y.numel() // max(y.shape[channel_dim], 1), *channel_moments(y, channel_dim))

    def merged(self, other: Moments | None) -> Moments:
        """Those of both together (Chan, Golub & LeVeque 1983)."""
        if other is None:
            return self
        total = self.count + other.count
        gap, share = other.mean - self.mean, other.count / total
        within = self.var + (other.var - self.var) * share
        return Moments(total, self.mean + gap * share, within + gap.square() * (share * self.count / total))

    def moved(self, ratio: Tensor, shift: Tensor) -> Moments:
        """Those of the values times ``ratio`` plus ``shift``."""
        return Moments(self.count, self.mean * ratio + shift, self.var * ratio.square())


@dataclass
class Target:
    """Moments of each channel where the original's norm ends, and after the activation that follows in it."""

    normalized: Moments | None = None
    activated: Moments | None = None


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
        kept, targets = _observe(runner, sites, batches)
        if not kept:
            raise ValueError("calibrate has no batches")
        if any(bool(y.isnan().any()) for k in kept for y in k.outputs):
            raise ValueError("the model's outputs on the calibration batches are not finite")
        change()
        runner.prefix = "with the new layers, "
        before = _distance(runner, kept, layers)
        fits = [_Fit(site, m, target) for site, m, target in zip(sites, made, targets, strict=True)]
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


def channel_moments(y: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in float64."""
    y = y.detach().movedim(channel_dim, -1).reshape(-1, y.shape[channel_dim])
    var, mean = torch.var_mean(y.float() if y.dtype != torch.float64 else y, 0, correction=0)
    return mean.double(), var.double()


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


def _observe(runner: _Runner, sites: Sequence[Site], batches: Iterable[Any]) -> tuple[list[_Kept], list[Target]]:
    """The batches, and the targets of the sites: of the first call of each in each batch."""
    targets = [Target() for _ in sites]
    kept: list[_Kept] = []
    for number, batch in enumerate(batches_of(batches)):
        if not number:  # a first run may select for what it keeps, as torchvision's detectors do
            runner(_Kept(batch, number))
        now, seen = _Kept(batch, number), [Target() for _ in sites]
        modules = [site.module for site in sites]
        with (
            _hooks(h for site, target in zip(sites, seen, strict=True) for h in _observing(site, target)),
            _hooks(_sampling(modules, now.samples)),
            now.selections.recorded(modules),
        ):
            now.outputs = floating(runner(now))
        for target, one in zip(targets, seen, strict=True):
            if one.normalized is not None:
                target.normalized = one.normalized.merged(target.normalized)
            if one.activated is not None:
                target.activated = one.activated.merged(target.activated)
                now.size += one.activated.count
        kept.append(now)
    return kept, targets


def _observing(site: Site, target: Target) -> list[Any]:
    dim = site.source.kind.channel_dim
    first = next((m for n in ("drop", "act") if isinstance(m := getattr(site.module, n, None), nn.Module)), None)

    def before_activation(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        target.normalized = target.normalized or _moments(inputs[0], dim)

    def end(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        target.activated = target.activated or _moments(y, dim)
        if first is None and site.source.own_activation is None and not site.source.after:
            target.normalized = target.normalized or target.activated

    handles = [site.module.register_forward_hook(end)]
    if first is not None:
        handles.append(first.register_forward_pre_hook(before_activation))
    return handles


def _moments(y: Tensor, dim: int) -> Moments | None:
    """Those of a tensor; None of an empty one, as of a detector that proposes nothing."""
    return Moments.of(y, dim) if y.numel() else None


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
        return Movement((self.difference / max(self.size, _TINY)) ** 0.5, same)


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


def _fit(runner: _Runner, kept: Sequence[_Kept], fits: Sequence[_Fit]) -> float | None:
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


class _Fit:
    """Sets the scale, shift and running statistics of a new layer.

    Attributes:
        called: whether the layer was called in this forward pass; later calls in it do not count.
        first: moments of the output of the first batch that reached the layer, with scale and shift as they are.
        merged: those of all batches in the pass before, likewise.
    """

    def __init__(self, site: Site, made: Made, target: Target) -> None:
        self.layer: Any = made.layer.norm if isinstance(made.layer, nn.Sequential) else made.layer
        self.made, self.name, self.dim = made, site.name, site.source.kind.channel_dim
        own = isinstance(getattr(self.layer, "act_layer", None), str)
        self.wanted = target.activated if own else target.normalized
        self.weight, self.bias = (getattr(self.layer, n, None) for n in ("weight", "bias"))
        new = NEW_STATISTICS in made.warnings
        self.statistics = _Statistics(site.name, self.layer, self.dim) if new else None
        self.called = self.reached = False
        self.first: Moments | None = None
        self.merged: Moments | None = None
        self.this_pass: Moments | None = None
        self.tolerance = 0.0
        self.constant = False

    def hooks(self) -> list[Any]:
        """Hooks for one forward pass."""
        handles = [self.layer.register_forward_pre_hook(self._start)]
        act = getattr(self.layer, "act", None)
        if act is not None:
            handles.append(act.register_forward_pre_hook(lambda _, inputs: (self._end(inputs[0]), *inputs[1:])))
        else:
            handles.append(self.layer.register_forward_hook(lambda _, inputs, y: self._end(y)))
        return handles

    def begin_pass(self) -> None:
        self.this_pass = None
        if self.statistics is not None:
            self.statistics.begin_pass()

    def _start(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.statistics is not None and not self.called and inputs[0].numel():
            self.statistics.add(inputs[0])

    def _end(self, y: Tensor) -> Tensor:
        if self.called or not y.numel():
            return y
        self.called = self.reached = True
        if not self._can_be_set():
            return y
        now = Moments.of(y, self.dim)
        self.tolerance = 1e-11 if y.dtype == torch.float64 else max(3e-6, torch.finfo(y.dtype).eps)
        if self.this_pass is not None:
            self.this_pass = now.merged(self.this_pass)
            return y
        expected = now
        if self.first is not None and self.merged is not None:  # all batches moved by about as much as this one
            grown = torch.where(self.first.var > _TINY * now.var, now.var / self.first.var.clamp(min=1e-300), 1.0)
            expected = Moments(
                self.merged.count, self.merged.mean + now.mean - self.first.mean, self.merged.var * grown
            )
        ratio, shift = self._set(expected)
        self.first = self.this_pass = now.moved(ratio, shift)
        view = [-1] + [1] * (y.ndim - 2) if self.dim == 1 else [-1]
        return (y * ratio.to(y.dtype).view(view)).add_(shift.to(y.dtype).view(view))

    def _can_be_set(self) -> bool:
        has_any = self.weight is not None or self.bias is not None
        return has_any and self.wanted is not None and not hasattr(self.layer, "inner")

    def end_pass(self) -> tuple[float, float]:
        """Set the layer by the moments of all batches.

        Returns:
            the L2 norm of what that changes in its outputs over that of the outputs, and what counts as nothing.
        """
        change = 0.0 if self.statistics is None else self.statistics.write()
        if self.this_pass is None or self.first is None or self.wanted is None:
            return change, self.tolerance
        ratio, shift = self._set(self.this_pass)
        self.first, self.merged = self.first.moved(ratio, shift), self.this_pass.moved(ratio, shift)
        size = (self.wanted.mean.square() + self.wanted.var).sum().clamp(min=1e-300)
        moved = ((ratio - 1).square() * self.wanted.var + ((ratio - 1) * self.wanted.mean + shift).square()).sum()
        return max(change, float((moved / size).sqrt())), self.tolerance

    def _set(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Set scale and shift so that outputs of these moments have the wanted ones; by what outputs are changed."""
        wanted = self.wanted
        assert wanted is not None
        ratio, shift = torch.ones_like(moments.mean), torch.zeros_like(moments.mean)
        if self.weight is not None:
            # a channel that is constant in the new layer, such as one whose scale is zero, stays so
            alive = moments.var > _TINY * (wanted.var + _TINY)
            ratio = torch.where(alive, (wanted.var / moments.var.where(alive, torch.ones_like(ratio))).sqrt(), ratio)
            self.constant = bool((~alive & (wanted.var > _TINY) & (self.weight != 0)).any())
            self.weight.copy_(self.weight * ratio)
        if self.bias is not None:
            shift = wanted.mean - moments.mean * ratio
        for moved in (self.bias, getattr(self.layer, "tau", None)):  # tau is the level below which nothing passes
            if moved is not None:
                moved.copy_(moved * ratio + shift)
        return ratio, shift

    def finish(self) -> None:
        """Say what could not be set."""
        warn = self.made.warnings.append
        if not self.reached:
            warn("the calibration batches did not reach it")
            return
        if self.statistics is not None:
            self.made.warnings.remove(NEW_STATISTICS)
        if hasattr(self.layer, "inner"):
            warn("not calibrated: its scale and shift lie inside its activation")
        elif self.wanted is None:
            warn("not calibrated: the original's activation is a part of its formula")
        elif self.weight is None and self.bias is None:
            warn("not calibrated: it has neither scale nor shift")
        elif self.weight is None:
            warn("only the means are calibrated: it has no scale")
        elif self.bias is None:
            warn("only the variances are calibrated: it has no shift")
        if self.constant:
            warn("some channels are constant in the new layer and were not in the original's")


class _Statistics:
    """The running statistics of a new layer, of all batches.

    Mean and variance are those of all values, the variance with the layer's correction; what other statistics there
    are, are averages over the batches, weighed by their numbers of values.
    """

    def __init__(self, name: str, layer: Any, dim: int) -> None:
        self.name, self.layer, self.dim = name, layer, dim
        self.tally: Tally | None = None
        self.moments: Moments | None = None
        self.correction: int | None = None
        self.started = False

    def begin_pass(self) -> None:
        self.moments = None
        if self.tally is not None:
            self.tally.clear()

    def add(self, x: Tensor) -> None:
        """Count a batch's input; the first one of all is written at once."""
        moments = Moments.of(x, self.dim)
        try:
            if not self.started:
                self.correction = self._correction(x, moments)
            elif self.correction is None:
                self._count(x)
        except ValueError as error:
            raise ValueError(f"the running statistics of {self.name} cannot be taken: {error}") from error
        self.moments = moments.merged(self.moments)
        if not self.started:
            self.started = True
            self.write()

    def _count(self, x: Tensor) -> None:
        assert self.tally is not None
        with by_batch(self.layer):
            self.tally.before(self.layer, (x,), {})
            type(self.layer).forward(self.layer, x.clone())
            self.tally.after(self.layer, (x,), {}, None)

    def _correction(self, x: Tensor, moments: Moments) -> int | None:
        """The correction of the layer's variance, from what it writes when it trains; None if that is no variance."""
        held = running_buffers(self.layer)
        plain = set(held) == {"running_mean", "running_var"} and all(
            buffer.shape == moments.mean.shape for buffer in held.values()
        )
        if plain and (is_stream(self.layer) or "momentum" not in vars(self.layer)):
            return 0  # it writes no statistics of batches, and normalizes by mean and variance
        self.tally = Tally.of(self.name, self.layer)
        self._count(x)
        if not plain or moments.count < 2:
            return None
        written = self.tally.result()
        scale = moments.var.sqrt() + moments.mean.abs() + _TINY
        if not bool(((written["running_mean"] - moments.mean).abs() <= 1e-3 * scale).all()):
            return None
        biased = moments.var * moments.count
        for correction in (1, 0):
            wanted = biased / (moments.count - correction)
            bound = max(0.2 / moments.count, 1e-5)  # a correction makes 1 / count
            if bool(((written["running_var"] - wanted).abs() <= bound * wanted + _TINY).all()):
                return correction
        return None

    def write(self) -> float:
        """Put the statistics of the batches counted so far into the layer; how much they changed."""
        if self.moments is None:
            return 0.0
        if self.correction is None:
            new = {} if self.tally is None else self.tally.result()
        else:
            n = self.moments.count
            new = {"running_mean": self.moments.mean, "running_var": self.moments.var * n / max(n - self.correction, 1)}
        change = 0.0
        for name, value in new.items():
            held = getattr(self.layer, name)
            size = self.moments.var.sqrt().max() if name == "running_mean" else value.abs().max()
            change = max(change, float((held.double() - value).abs().max() / size.clamp(min=1e-300)))
            held.copy_(value)
        return change
