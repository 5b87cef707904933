"""Functions of each value alone that stand in for normalization: affine, dynamic tanh and its error-function form."""

from __future__ import annotations

import math

from torch import Tensor

from normzoo._shapes import channels_last, per_channel, statistics_dtype
from normzoo.functional._moments import per_channel_sum, sigmoid_backward
from normzoo.functional._pieces import by_sample

Gradients = tuple[Tensor, list[Tensor | None]]


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


class _ScaleShift:
    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        return (x.clone() if weight is None and bias is None else affine_to(wide, weight, bias)).to(x.dtype)

    def vjp(self, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """Sums over batch and space for the parameters."""
        wide = dy.to(statistics_dtype(x))
        d_bias = None if bias is None else per_channel_sum(wide)
        if weight is None:
            return dy, [None, d_bias]
        return (wide * per_channel(weight, x)).to(x.dtype), [per_channel_sum(wide * x), d_bias]


class _DynamicTanh:
    # On a CPU the logistic function is ten times as fast as tanh, with an error of a unit in the last place of 1.

    def __call__(self, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        if x.device.type != "cpu":
            return affine_to((wide * alpha).tanh(), weight, bias).to(x.dtype)
        half = (wide * (2 * alpha)).sigmoid()  # (tanh + 1) / 2
        if weight is None:
            return (2 * half - 1 if bias is None else 2 * half + per_channel(bias - 1, x)).to(x.dtype)
        return affine_to(half, 2 * weight, -weight if bias is None else bias - weight).to(x.dtype)

    def vjp(self, x: Tensor, dy: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """Through ``half = sigmoid(2 alpha x)``, where tanh = 2 half - 1."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        half = (wide * (2 * alpha)).sigmoid_()
        d_bias = per_channel_sum(dy)
        inner = sigmoid_backward(dy, half)
        d_weight = None if weight is None else 2 * per_channel_sum(half.mul_(dy)) - d_bias
        gain = alpha.new_full((x.shape[1],), 4.0) if weight is None else 4 * weight
        d_alpha = (per_channel_sum(wide * inner) * gain).sum()[None]
        dx = inner.mul_(per_channel(gain * alpha, x)).to(x.dtype)
        return dx, [d_alpha, d_weight, None if bias is None else d_bias]


class _DynamicErf:
    def __call__(self, x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return affine_to((x.to(statistics_dtype(x)) * alpha + shift).erf(), weight, bias).to(x.dtype)

    def vjp(
        self, x: Tensor, dy: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Gradients:
        """The derivative of erf(u) is 2 / sqrt(pi) * exp(-u^2)."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        inner = (wide * alpha).add_(shift)
        d_weight = None if weight is None else per_channel_sum(inner.erf().mul_(dy))
        slope = inner.square_().neg_().exp_().mul_(dy)
        gain = alpha.new_full((x.shape[1],), 2 / math.sqrt(math.pi))
        gain = gain if weight is None else gain * weight
        d_shift = (per_channel_sum(slope) * gain).sum()[None]
        d_alpha = (per_channel_sum(slope * wide) * gain).sum()[None]
        dx = slope.mul_(per_channel(gain * alpha, x)).to(x.dtype)
        return dx, [d_alpha, d_shift, d_weight, None if bias is None else per_channel_sum(dy)]


_SCALE_SHIFT, _DYNAMIC_TANH, _DYNAMIC_ERF = _ScaleShift(), _DynamicTanh(), _DynamicErf()
