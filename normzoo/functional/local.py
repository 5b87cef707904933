"""Normalization by neighbourhoods: local response and divisive normalization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._pieces import by_sample


def local_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    mean: bool = False,
) -> Tensor:
    """``y = x / (k + alpha * sum(x^2))^beta * weight + bias``, the sum of each position over ``size`` near channels.

    The window reaches size // 2 channels back and (size - 1) // 2 ahead and is cut off at the first and last channel.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        size: channels of the window.
        alpha: factor of the sum of squares.
        beta: exponent.
        k: what is added.
        mean: divide the sum by ``size``, as ``torch.nn.LocalResponseNorm`` does.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Krizhevsky, Sutskever & Hinton 2012, section 3.3.
    """
    share = alpha / size if mean else alpha
    return by_sample(partial(_local_response, size=size, alpha=share, beta=beta, k=k), x, weight, bias)


def divisive_norm(
    x: Tensor,
    sigma: Tensor | float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean_window: int = 5,
    square_window: int = 5,
) -> Tensor:
    """``v = x - mean(x); y = v / sqrt(sigma^2 + mean(v^2)) * weight + bias``, means over windows and all channels.

    The windows are centred on each position (an even one reaches one further ahead). Beyond the border x and v count
    as 0, and means divide by the whole window. Input (N, C) has no space: there the windows run over the channels.

    Args:
        x: (N, C, ...), not empty.
        sigma: the smoothing, a (1,) tensor or a number.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        mean_window: side of the window of the mean.
        square_window: side of the window of the mean square.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Ren, Liao, Urtasun, Sinz & Zemel 2017, arXiv 1611.04520, equations 8-10.
    """
    sigma = torch.as_tensor(sigma, dtype=statistics_dtype(x), device=x.device)
    return by_sample(partial(_divisive, windows=(mean_window, square_window)), x, sigma, weight, bias)


def _local_response(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    wide = x.to(statistics_dtype(x))
    before, after, space = size // 2, (size - 1) // 2, [0] * (2 * (x.ndim - 2))
    squares = F.pad(wide.square(), [*space, before, after])
    total = squares.narrow(1, 0, x.shape[1])
    for first in range(1, size):  # a few additions; a running sum over channels would cancel digits
        total = total + squares.narrow(1, first, x.shape[1])
    return _affine(wide * (k + alpha * total).pow(-beta), weight, bias).to(x.dtype)


def _divisive(
    x: Tensor, sigma: Tensor, weight: Tensor | None, bias: Tensor | None, *, windows: Sequence[int]
) -> Tensor:
    wide = x.to(statistics_dtype(x))
    centred = wide - _window_mean(wide, windows[0])
    power = _window_mean(centred.square(), windows[1])
    return _affine(centred * (sigma.square() + power).rsqrt(), weight, bias).to(x.dtype)


def _window_mean(x: Tensor, size: int) -> Tensor:
    """Mean over all channels of a window, zeros counted beyond the border; of (N, C) over a window of channels."""
    flat = x[:, None] if x.ndim == 2 else x.mean(1, keepdim=True)
    space = flat.ndim - 2
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[space - 1]
    y = pool(F.pad(flat, [(size - 1) // 2, size // 2] * space), size, stride=1)
    return y[:, 0] if x.ndim == 2 else y


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * per_channel(weight, y)
    return y if bias is None else y + per_channel(bias, y)
