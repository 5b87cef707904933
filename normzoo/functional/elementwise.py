"""Functions of each value alone that stand in for normalization: affine, dynamic tanh and its error-function form."""

from __future__ import annotations

from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._pieces import by_sample


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
    return by_sample(_affine, x, weight, bias)


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
    return by_sample(_dynamic_tanh, x, alpha, weight, bias)


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
    return by_sample(_dynamic_erf, x, alpha, shift, weight, bias)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = y.to(statistics_dtype(y))
    wide = wide if weight is None else wide * per_channel(weight, y)
    return (wide if bias is None else wide + per_channel(bias, y)).to(y.dtype)


def _dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = x.to(statistics_dtype(x)) * alpha
    # On a CPU the logistic function is ten times as fast as tanh, at an absolute error of one unit in the last place.
    y = 2 * (2 * wide).sigmoid() - 1 if x.device.type == "cpu" else wide.tanh()
    return _affine(y, weight, bias).to(x.dtype)


def _dynamic_erf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _affine((x.to(statistics_dtype(x)) * alpha + shift).erf(), weight, bias).to(x.dtype)
