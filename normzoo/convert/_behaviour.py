"""What a module on trial does in one mode: a norm's formula, a scale and shift of channels, or something else.

A norm's output is odd in its input about a shift for each channel, ``y = S * d / sqrt(v + eps) + T``, with d the input
or its deviation from a mean and v a mean of squares. T follows from inputs of both signs, eps from inputs of two sizes,
and S by least squares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normzoo.convert._families import Family, Unknown, close, families, least_squares, standardized
from normzoo.convert._trial import CannotBeTriedError, Trial, undisturbed

EXACT, SINGLE = 1e-9, 5e-6  # relative to the largest output, of modules that compute in float64 and in float32
_SIZES = (1.0, 1e-2, 1e-4, 1e-6)  # of inputs, from which eps is fitted
ELEMENTWISE = Unknown("each value of its output depends on one value of its input", False)
_FREE = 0.1  # least share of the standard deviation that a deviation must have to tell of its denominator


def layouts(channels: int) -> list[tuple[int, tuple[int, ...]]]:
    """(channel dimension, shape) of inputs none of whose other sizes is the number of channels."""
    few = (3, 2, 5, 4, 6) if channels > 256 else (5, 3, 7, 4, 6)
    n, a, b, e = [size for size in few if size != channels][:4]
    c = channels
    return [(1, (n, c, a, b)), (1, (n, c, b)), (-1, (n, a, c)), (-1, (n, a, b, c)), (1, (n, c)), (1, (n, c, a, b, e))]


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose mean and spread are others for each entry of the first two dimensions and of the last."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for kept in (1, 2, len(shape)):
        part = [size if i < kept or (kept == len(shape) and i == kept - 1) else 1 for i, size in enumerate(shape)]
        if kept == len(shape):
            part = [1] * (kept - 1) + [shape[-1]]
        x = x * (0.6 + torch.rand(part, generator=generator, dtype=torch.float64))
        x = x + 0.5 * torch.randn(part, generator=generator, dtype=torch.float64)
    return x


def flat(x: Tensor, dim: int) -> Tensor:
    """As (N, C, positions)."""
    return x.movedim(dim, 1).reshape(x.shape[0], x.shape[dim], -1)


def takes_only(module: nn.Module, channels: int) -> int | None:
    """The dimension, 1 or -1, in which alone a module takes its channels; None where it is both, none or not known."""
    generator = torch.Generator().manual_seed(0)
    try:
        with undisturbed():
            trials = [Trial(module, dtype=dtype) for dtype in (torch.float64, torch.float32)]
            inputs = [(dim, noise(shape, generator)) for dim, shape in layouts(channels) if len(shape) > 2]
            dims = {dim for dim, x in inputs if any(trial.run(x) is not None for trial in trials)}
    except CannotBeTriedError:
        return None
    return dims.pop() if len(dims) == 1 else None


@dataclass(frozen=True)
class Behaviour:
    """What a module does in one mode: a family's formula, a scale and shift of channels, or something else.

    Attributes:
        scale: S, (C,).
        shift: T, (C,).
        family: None for a scale and shift, or for something else.
        eps: of the family.
        other: what it is instead.
    """

    scale: Tensor
    shift: Tensor
    family: Family | None = None
    eps: float = 0.0
    other: Unknown | None = None

    @property
    def text(self) -> str:
        """The behaviour in words."""
        if self.other is not None:
            return self.other.text
        return "a scale and shift of channels" if self.family is None else self.family.text

    def predict(self, x: Tensor) -> Tensor:
        """The output for an (N, C, positions) input."""
        d = x
        if self.family is not None:
            d, v = self.family.parts(x)
            d = d * (v + self.eps).rsqrt()
        return d * self.scale[:, None] + self.shift[:, None]


class Observer:
    """Sees what a module does, with random values in its tensors.

    Args:
        module: it is not changed.
        channels: C.
        vectors: names of the tensors of C values.
        without: names of submodules to leave out.
        dtype: in which it is run.
    """

    def __init__(
        self,
        module: nn.Module,
        channels: int,
        vectors: Iterable[str],
        without: Iterable[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.channels = channels
        self.generator = torch.Generator().manual_seed(0)
        self.trial = Trial(module, {name: nn.Identity() for name in without}, dtype)
        held = {n: t for n, t in self.trial.tensors().items() if n in set(vectors)}
        for name, t in held.items():
            if t.is_floating_point():
                drawn = torch.rand(t.shape, generator=self.generator, dtype=torch.float64) + 0.5
                sign = torch.randint(0, 2, t.shape, generator=self.generator) * 2 - 1
                fixed = name in module._buffers or "var" in name.lower()  # which may have to be positive
                t.data.copy_(drawn if fixed else drawn * sign)
        self.trial.keep()
        numbers = [*self.trial.start.values(), *vars(self.trial.copy).values()]
        # constants that were rounded to float32 stay so
        self.trial.reduced = any(isinstance(t, Tensor) and t.numel() == 1 and t.is_floating_point() for t in numbers)
        self.values = {n: t.detach().flatten().to(torch.float64, copy=True) for n, t in held.items()}
        attributes = [getattr(module, n, None) for n in (*vars(module), *vars(type(module)))]
        self.numbers = [v for v in attributes if isinstance(v, float) and v > 0]

    @property
    def tolerance(self) -> float:
        """Relative to the largest output."""
        return SINGLE if self.trial.reduced else EXACT

    def behaviours(self, x: Tensor, dim: int, training: bool) -> list[Behaviour]:
        """What the module does with inputs of the kind of ``x`` in one mode.

        Several are families whose variances differ by a factor, which is another scale and eps.
        """
        nothing = torch.zeros(self.channels, dtype=torch.float64)
        up, down = self.trial.run(x, training), self.trial.run(-x, training)
        if up is None or down is None or not (up.isfinite().all() and down.isfinite().all()):
            return [Behaviour(nothing, nothing, other=Unknown("its output is not finite", False))]
        given, plus, minus = flat(x, dim), flat(up, dim), flat(down, dim)
        odd, even = (plus - minus) / 2, (plus + minus) / 2
        shift = even.mean((0, 2))
        if bool((even - shift[:, None]).abs().max() <= self.tolerance * plus.abs().max()):
            affine = Behaviour((odd * given).sum((0, 2)) / given.square().sum((0, 2)), shift)
            far = self.trial.run(100 * x, training)
            if far is not None and all(
                close(y, affine.predict(size * given), self.tolerance) for size, y in ((1, plus), (100, flat(far, dim)))
            ):
                return [affine]
            if found := self._families(x, dim, training, shift):
                return found
        return [Behaviour(nothing, nothing, other=self._describe(x, dim, training, odd, plus))]

    def _families(self, x: Tensor, dim: int, training: bool, shift: Tensor) -> list[Behaviour]:
        """The families whose formula the module's outputs follow, at all sizes."""
        found: list[Behaviour] = []
        given = flat(x, dim)
        samples: list[tuple[float, Tensor, Tensor]] = []
        for size in _SIZES:
            whole, half = self.trial.run(x * size, training), self.trial.run(x * (size / 2), training)
            if whole is not None and half is not None:
                samples.append((size, flat(whole, dim), flat(half, dim)))
        for family in families(self.channels):
            d, v = family.parts(given)
            rough, _ = least_squares(samples[0][1] - shift[:, None], d * (v + 1e-12).rsqrt())
            if rough > 0.3:
                continue
            fitted = self._fit(d, v, shift, samples)
            for eps in dict.fromkeys((self._plain(fitted), fitted)):
                z = d * (v + eps).rsqrt()
                _, scale = least_squares(samples[0][1] - shift[:, None], z)
                made = Behaviour(scale, shift, family, eps)
                if all(
                    close(y, made.predict(given * size * part), self.tolerance)
                    for size, *ys in samples
                    for y, part in zip(ys, (1.0, 0.5), strict=True)
                ):
                    found.append(made)
                    break
        return found

    def _fit(self, d: Tensor, v: Tensor, shift: Tensor, samples: list[tuple[float, Tensor, Tensor]]) -> float:
        """The eps by which outputs for an input and for half of it differ."""
        free = d.abs() > _FREE * v.sqrt()
        best, distance = 0.0, float("inf")
        for size, whole, half in samples:
            square = ((half - shift[:, None]) / (whole - shift[:, None])).square()[free]
            at = v[free] * size**2
            several = 0.25 * at * (1 - square) / (square - 0.25)
            several = several[several.isfinite()]
            eps, middle = (float(t.median()) if t.numel() else 0.0 for t in (several, at))
            if eps > (1e-4 if self.trial.reduced else 1e-9) * middle and middle:
                away = abs(torch.tensor(eps / middle).log().item())
                if away < distance:
                    best, distance = eps, away
        return best

    def _plain(self, eps: float) -> float:
        """The number that stands in the module or that a person would write."""
        near = 5e-3 if self.trial.reduced else 1e-5
        candidates = [*self.numbers, torch.finfo(torch.float32).eps, float(f"{eps:.1e}")]
        return next((c for c in candidates if abs(c - eps) <= near * eps), eps)

    def is_elementwise(self, x: Tensor, training: bool) -> bool:
        """Whether a large change of one input value changes no output but its own."""
        other = x.clone()
        other.view(-1)[0] += 100.0
        y, moved = self.trial.run(x, training), self.trial.run(other, training)
        if y is None or moved is None:
            return False
        return bool((moved - y).flatten()[1:].abs().max() <= 1e-12 * y.abs().max())

    def is_odd(self, x: Tensor) -> bool:
        """Whether the outputs for an input and its negative are opposite about their mean over all but channels."""
        up, down = self.trial.run(x), self.trial.run(-x)
        if up is None or down is None:
            return False
        even = up + down
        dims = [tuple(d for d in range(x.ndim) if d != kept % x.ndim) for kept in (1, -1)]
        return any(close(even.mean(d, keepdim=True).expand_as(even), even, self.tolerance, 1.0) for d in dims)

    def _describe(self, x: Tensor, dim: int, training: bool, odd: Tensor, plus: Tensor) -> Unknown:
        """What a module that is none of the norms looked like."""
        if self.is_elementwise(x, training):
            return ELEMENTWISE
        given = flat(x, dim)
        distances = {f.text: least_squares(odd, standardized(f, given))[0] for f in families(self.channels)}
        text, distance = min(distances.items(), key=lambda item: item[1])
        if distance > 0.3:
            return Unknown("its values depend on each other as in no known norm", True)
        return Unknown(f"it is closest to {text}, from which its outputs are {100 * distance:.2g} % away", True)
