"""Setting one new layer's scale, shift and running statistics by the moments of its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._replace import NEW_STATISTICS, Made
from normzoo.convert._sites import Site
from normzoo.convert._tally import Tally, by_batch, is_stream, running_buffers

TINY = 1e-12  # a variance below which a channel counts as constant


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
class WantedMoments:
    """Moments of each channel where the original's norm ends, and after the activation that follows in it."""

    normalized: Moments | None = None
    activated: Moments | None = None


def channel_moments(y: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in float64."""
    y = y.detach().movedim(channel_dim, -1).reshape(-1, y.shape[channel_dim])
    var, mean = torch.var_mean(y.float() if y.dtype != torch.float64 else y, 0, correction=0)
    return mean.double(), var.double()


def moments_of(y: Tensor, dim: int) -> Moments | None:
    """Those of a tensor; None of an empty one, as of a detector that proposes nothing."""
    return Moments.of(y, dim) if y.numel() else None


class Fit:
    """Sets the scale, shift and running statistics of a new layer.

    Attributes:
        called: whether the layer was called in this forward pass; later calls in it do not count.
        first: moments of the output of the first batch that reached the layer, with scale and shift as they are.
        merged: those of all batches in the pass before, likewise.
    """

    def __init__(self, site: Site, made: Made, wanted: WantedMoments) -> None:
        self.layer: Any = made.layer.norm if isinstance(made.layer, nn.Sequential) else made.layer
        self.made, self.name, self.dim = made, site.name, site.source.kind.channel_dim
        own = isinstance(getattr(self.layer, "act_layer", None), str)
        self.wanted = wanted.activated if own else wanted.normalized
        self.weight, self.bias = (getattr(self.layer, n, None) for n in ("weight", "bias"))
        new = NEW_STATISTICS in made.warnings
        self.statistics = Statistics(site.name, self.layer, self.dim) if new else None
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
            grown = torch.where(self.first.var > TINY * now.var, now.var / self.first.var.clamp(min=1e-300), 1.0)
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
            alive = moments.var > TINY * (wanted.var + TINY)
            ratio = torch.where(alive, (wanted.var / moments.var.where(alive, torch.ones_like(ratio))).sqrt(), ratio)
            self.constant = bool((~alive & (wanted.var > TINY) & (self.weight != 0)).any())
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


class Statistics:
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
        scale = moments.var.sqrt() + moments.mean.abs() + TINY
        if not bool(((written["running_mean"] - moments.mean).abs() <= 1e-3 * scale).all()):
            return None
        biased = moments.var * moments.count
        for correction in (1, 0):
            wanted = biased / (moments.count - correction)
            bound = max(0.2 / moments.count, 1e-5)  # a correction makes 1 / count
            if bool(((written["running_var"] - wanted).abs() <= bound * wanted + TINY).all()):
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
