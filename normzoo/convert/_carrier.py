"""Whether a layer can take over scales and shifts of channels, found by trying a copy of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.convert._trial import CannotBeTriedError, bare_copy, undisturbed

_FAR = 2.0**60  # where what is clamped or saturates has done so


class Carrier:
    """Whether a convolution or linear layer, of whatever class, can take over scales and shifts of channels.

    A copy is tried with random weights, on inputs of several sizes, near zero and where saturation would show.

    Args:
        layer: has ``weight``, of at least two dimensions, and ``bias``.
        shape: of its input in the model.
        transposed: whether the weight's second dimension is the one of the output channels.
    """

    def __init__(self, layer: Any, shape: Sequence[int], transposed: bool) -> None:
        self.shape, self.transposed = tuple(shape), transposed
        self.dims = layer.weight.ndim - 2
        self.groups = getattr(layer, "groups", 1)
        try:
            self.copy = bare_copy(layer, most_values=sys.maxsize).eval()
        except CannotBeTriedError as error:
            self.copy, self.failure = None, str(error)
            return
        vars(self.copy).pop("bias", None)  # where it is None and no parameter
        self.generator = torch.Generator().manual_seed(0)
        self.weight = self._random(layer.weight.shape)
        self.channels = self.weight.shape[1] * self.groups if transposed else len(self.weight)
        self.bias = None if layer.bias is None else self._random((self.channels,))

    def scales_outputs(self) -> str:
        """Why ``scale * output + shift`` is not what scaled weight and bias give; empty if it is."""
        if self.copy is None:
            return self.failure
        scale, shift = self._random((self.channels,)), self._random((self.channels,))
        weight = scaled(self.weight, scale, self.groups, int(self.transposed))
        bias = shift if self.bias is None else self.bias * scale + shift

        def on(x: Tensor) -> str:
            y = self(x, self.weight, self.bias)
            dim = y.ndim - 1 - self.dims
            if dim < 0 or y.shape[dim] != self.channels:
                return f"it does not return its {self.channels} channels in dimension {dim - y.ndim}"
            wanted = y.movedim(dim, -1) * scale + shift
            if not _close(self(x, weight, bias).movedim(dim, -1), wanted):
                return "its output is not linear in weight and bias, channel by channel"
            if self.bias is None and not _close(self(x, weight, None).movedim(dim, -1), wanted - shift):
                return "its output is not linear in its weight, channel by channel"
            return ""

        return self._first_reason(on)

    def scales_inputs(self, with_shift: bool) -> str:
        """Why weight and bias cannot make up for a scale, or scale and shift, of the inputs; empty if they can."""
        if self.copy is None:
            return self.failure
        channels = len(self.weight) if self.transposed else self.weight.shape[1] * self.groups
        scale, shift = self._random((channels,)), self._random((channels,)) * with_shift
        weight = scaled(self.weight, scale, self.groups, int(not self.transposed))
        added = None
        if with_shift:
            if self.transposed:
                return "no shift passes through a transposed convolution"
            added = shifted(self.weight, shift, self.groups)
        bias = self.bias if added is None else added if self.bias is None else self.bias + added

        def on(x: Tensor) -> str:
            dim = x.ndim - 1 - self.dims
            moved = (x.movedim(dim, -1) * scale + shift).movedim(-1, dim)
            if _close(self(x, weight, bias), self(moved, self.weight, self.bias)):
                return ""
            if with_shift and not self.scales_inputs(with_shift=False):
                return "it pads its input with zeros, through which no shift passes"
            return "a scale of its input is not one of its weight"

        return self._first_reason(on)

    def absorbs(self, attribute: str) -> str:
        """Why a scale and shift that the layer itself calls cannot go into its weight and bias; empty if they can."""
        if self.copy is None:
            return self.failure
        scale, shift = self._random((self.channels,)), self._random((self.channels,))
        weight = scaled(self.weight, scale, self.groups, int(self.transposed))
        bias = shift if self.bias is None else self.bias * scale + shift
        norm = self.copy._modules[attribute]

        def on(x: Tensor) -> str:
            self.copy._modules[attribute] = _Affine(scale, shift, self.dims)
            wanted = self(x, self.weight, self.bias)
            self.copy._modules[attribute] = nn.Identity()
            same = _close(self(x, weight, bias), wanted)
            return "" if same else f"its weight and bias cannot make up for its {attribute}"

        try:
            return self._first_reason(on)
        finally:
            self.copy._modules[attribute] = norm

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.copy._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        self.copy._parameters["bias"] = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        with undisturbed():
            torch.manual_seed(0)
            y = self.copy.forward(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns a {type(y).__name__}")
        return y

    def _first_reason(self, on: Callable[[Tensor], str]) -> str:
        """What a check says first on one of the inputs, or that the layer cannot be tried; empty if it says nothing."""
        try:
            return next(filter(None, map(on, self._inputs())), "")
        except Exception as error:  # the layer is of an unknown class, and may refuse an input by any error
            return f"it cannot be tried: {type(error).__name__}: {error}"

    def _inputs(self) -> Iterator[Tensor]:
        """Inputs of several sizes, or of the one that was seen if it takes no other."""
        if not self.dims:
            shapes = [(*(min(n, 3) for n in self.shape[:-1]), self.shape[-1])]
        else:
            batch = tuple(min(n, 2) for n in self.shape[: -1 - self.dims])
            smallest = [_reach(self.copy, i, k) for i, k in enumerate(self.weight.shape[2:])]
            steps = 1 + max(_numbers(self.copy, "stride", self.dims))
            shapes = [(*batch, self.shape[-1 - self.dims], *(n + i for n in smallest)) for i in range(steps)]
            try:
                self(torch.zeros(shapes[0], dtype=torch.float64), self.weight, self.bias)
            except Exception:  # a module may refuse a smaller input by any error
                shapes = [(*batch, *self.shape[-1 - self.dims :])]
        for shape in shapes:
            x = self._random(shape)
            yield x
            yield x * _FAR

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)


class _Affine(nn.Module):
    """A scale and shift of channels, which are before the last ``dims`` dimensions."""

    def __init__(self, scale: Tensor, shift: Tensor, dims: int) -> None:
        super().__init__()
        self.scale, self.shift, self.dims = scale, shift, dims

    def forward(self, x: Tensor) -> Tensor:
        dim = x.ndim - 1 - self.dims
        return (x.movedim(dim, -1) * self.scale + self.shift).movedim(-1, dim)


def scaled(weight: Tensor, scale: Tensor, groups: int, dim: int) -> Tensor:
    """A convolution's weight times a value for each channel along its first dimension (0) or its second (1)."""
    by_group = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...); transposed: in, out
    view = [groups, -1, 1] if dim == 0 else [groups, 1, -1]
    return (by_group * scale.view(*view, *[1] * (weight.ndim - 2))).flatten(0, 1)


def shifted(weight: Tensor, shift: Tensor, groups: int) -> Tensor:
    """What a shift of a convolution's input channels adds to its output, where nothing is padded with zeros."""
    by_group = weight.unflatten(0, (groups, -1))
    taps = by_group.flatten(3).sum(3) if weight.ndim > 2 else by_group
    return torch.einsum("goi,gi->go", taps, shift.view(groups, -1)).flatten()


def _numbers(layer: Any, name: str, dims: int) -> list[int]:
    value = getattr(layer, name, 1)
    several = value if isinstance(value, tuple | list) else [value] * dims
    return [n if isinstance(n, int) else 1 for n in several]


def _reach(layer: Any, i: int, kernel: int) -> int:
    """A size of the input in one dimension that is larger than the kernel and the padding."""
    dilation = [*_numbers(layer, "dilation", i + 1), 1][i]
    padding = [*_numbers(layer, "padding", i + 1), 1][i]
    return dilation * (kernel - 1) + 3 + padding


def _close(y: Tensor, wanted: Tensor) -> bool:
    """Whether both are the same up to rounding, of float32 where the layer computes in it."""
    if y.shape != wanted.shape:
        return False
    tolerance = 1e-9 if y.dtype == torch.float64 else 5e-6
    return bool(((y.double() - wanted.double()).abs() <= tolerance * wanted.abs().amax().double()).all())
