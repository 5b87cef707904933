"""Functions of each value alone that stand in for normalization: affine, dynamic tanh and its error-function form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normzoo._shapes import channels_last, per_channel, statistics_dtype
from normzoo.functional._moments import affine_backward, dot, per_channel_sum, sigmoid_backward_
from normzoo.functional._pieces import by_sample

Gradients = tuple[Tensor, list[Tensor | None]]
Kept = tuple[Tensor, ...]


def channel_scale_shift(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y = x * weight + bias``.

    Args:
        x: (N, C, ...).
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Touvron et al. 2021, arXiv 2105.03404, equation 1.
    """
    return by_sample(_SCALE_SHIFT, x, weight, bias)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y = tanh(alpha * x) * weight + bias``.

    Args:
        x: (N, C, ...).
        alpha: (1,), the slope at 0.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Zhu, Chen, He, LeCun & Liu 2025, arXiv 2503.10622, equation 1.
    """
    return by_sample(_DYNAMIC_TANH, x, alpha, weight, bias)


def dynamic_erf(
    x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``y = erf(alpha * x + shift) * weight + bias``.

    Args:
        x: (N, C, ...).
        alpha: (1,), the slope.
        shift: (1,), what is added before the error function.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Chen, Lu, Zhu, Sun & Liu 2025, arXiv 2512.10938.
    """
    return by_sample(_DYNAMIC_ERF, x, alpha, shift, weight, bias)


def affine_to(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x * weight + bias``, differentiable, one pass where the memory format allows it."""
    if weight is None:
        return x if bias is None else x + per_channel(bias, x)
    if bias is None:
        return x * per_channel(weight, x)
    if channels_last(x) or x.device.type != "cpu":
        return per_channel(bias, x).addcmul(x, per_channel(weight, x))
    return x * per_channel(weight, x) + per_channel(bias, x)


def affine_into(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """``y[...] = x * weight + bias``, in few passes; ``x`` may be overwritten, and may be ``y``."""
    if any(t is not None and t.dtype != x.dtype for t in (y, weight, bias)):
        y.copy_(affine_to(x, weight, bias))
    elif weight is None:
        y.copy_(x) if bias is None else torch.add(x, per_channel(bias, x), out=y)
    elif bias is None:
        torch.mul(x, per_channel(weight, x), out=y)
    elif channels_last(x):
        torch.addcmul(per_channel(bias, x), x, per_channel(weight, x), out=y)
    else:
        torch.add(x.mul_(per_channel(weight, x)), per_channel(bias, x), out=y)


def product_into(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor``, put into ``y`` where that has the dtype: a chain of operations on one tensor stays in cache."""
    return torch.mul(x, factor, out=y) if x.dtype == y.dtype == factor.dtype else x * factor


class _ScaleShift:
    one_pass = True

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        return (x.clone() if weight is None and bias is None else affine_to(wide, weight, bias)).to(x.dtype)

    def vjp(
        self, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, *, kept: Kept, out: Tensor | None
    ) -> Gradients:
        """Sums over batch and space for the parameters."""
        wide = dy.to(statistics_dtype(x))
        if weight is None:
            return dy, [None, None if bias is None else per_channel_sum(wide)]
        dx, d_weight, d_bias = affine_backward(wide, x.to(wide.dtype), weight)
        return dx.to(x.dtype), [d_weight, None if bias is None else d_bias]


class _DynamicTanh:
    # On a CPU the logistic function is ten times as fast as tanh, with an error of a unit in the last place of 1.

    def __call__(self, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        if x.device.type != "cpu":
            return affine_to((wide * alpha).tanh(), weight, bias).to(x.dtype)
        return affine_to((wide * (2 * alpha)).sigmoid(), *self._of_half(x, weight, bias)).to(x.dtype)

    def write(self, y: Tensor, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """The output, by few passes."""
        wide = x.to(statistics_dtype(x))
        if x.device.type != "cpu":
            affine_into(y, (wide * alpha).tanh_(), weight, bias)
        else:
            half = product_into(y, wide, 2 * alpha).sigmoid_()
            affine_into(y, half, *self._of_half(x, weight, bias))

    def _of_half(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias for (tanh + 1) / 2."""
        weight = x.new_ones(x.shape[1], dtype=statistics_dtype(x)) if weight is None else weight
        return 2 * weight, -weight if bias is None else bias - weight

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        alpha: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """Through ``half = sigmoid(2 alpha x)``, where tanh = 2 half - 1."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        half = (wide * (2 * alpha)).sigmoid_()
        d_half, d_weight, d_bias = affine_backward(dy, half, alpha.new_ones(x.shape[1]) if weight is None else weight)
        inner = sigmoid_backward_(d_half, half)
        d_alpha = 4 * dot(wide, inner)
        dx = torch.mul(inner, 4 * alpha, out=inner if out is None else out).to(x.dtype)
        return dx, [d_alpha, None if weight is None else 2 * d_weight - d_bias, None if bias is None else d_bias]


class _DynamicErf:
    def __call__(self, x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return affine_to((x.to(statistics_dtype(x)) * alpha + shift).erf(), weight, bias).to(x.dtype)

    def write(
        self, y: Tensor, x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """The output, by few passes."""
        affine_into(y, product_into(y, x.to(statistics_dtype(x)), alpha).add_(shift).erf_(), weight, bias)

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        alpha: Tensor,
        shift: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """The derivative of erf(u) is 2 / sqrt(pi) * exp(-u^2)."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        inner = (wide * alpha).add_(shift)
        gain = 2 / math.sqrt(math.pi)
        ones = alpha.new_ones(x.shape[1])
        slope, d_weight, d_bias = affine_backward(dy, inner.erf(), ones if weight is None else weight)
        slope.mul_(inner.square_().neg_().exp_())
        d_alpha, d_shift = gain * dot(wide, slope), gain * slope.sum()[None]
        dx = torch.mul(slope, gain * alpha, out=slope if out is None else out).to(x.dtype)
        return dx, [d_alpha, d_shift, None if weight is None else d_weight, None if bias is None else d_bias]


_SCALE_SHIFT, _DYNAMIC_TANH, _DYNAMIC_ERF = _ScaleShift(), _DynamicTanh(), _DynamicErf()
