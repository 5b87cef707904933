"""Normalization of each position over its channels: layer normalization as in ConvNeXt, RMS and positional."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo._shapes import HALF, channels_last, per_channel, statistics_dtype
from normzoo.functional._moments import per_channel_sum, squared_difference
from normzoo.functional._pieces import by_sample, traced, without_autocast
from normzoo.functional.elementwise import Gradients, affine_to


def channel_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, statistics of each position over channels.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the biased variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: with a single channel, whose normalized value would be 0.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450; over the channels of a map, Liu et al. 2022, arXiv 2201.03545.
    """
    _check_channels(x)
    if channels_last(x) and (x.dtype not in HALF or x.device.type == "cpu"):
        dtype = statistics_dtype(x)
        weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
        return torch.layer_norm(x.movedim(1, -1), [x.shape[1]], weight, bias, eps).movedim(-1, 1)
    return by_sample(_Standardize(eps, 0), x, weight, bias)


def positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`channel_layer_norm`.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the variance.
        unbiased: divide the variance by C - 1, as the authors' code does, and not by C, as the paper does.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: with a single channel.

    Source: Li, Wu, Weinberger & Belongie 2019, arXiv 1907.04312, equations 1-3.
    """
    if not unbiased:
        return channel_layer_norm(x, weight, bias, eps=eps)
    _check_channels(x)
    return by_sample(_Standardize(eps, 1), x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight + bias``, the mean of each position over channels.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the mean square.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, equation 4; eps as in later implementations.
    """
    return by_sample(_RootMeanSquare(eps), x, weight, bias)


def _check_channels(x: Tensor) -> None:
    if x.shape[1] == 1:
        raise ValueError(
            f"each position of the input of shape {tuple(x.shape)} has a single channel: "
            "its value normalized over channels would be 0 whatever it is"
        )


@dataclass(frozen=True)
class _Standardize:
    eps: float
    correction: int

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        centred = wide - wide.mean(1, keepdim=True)
        var = centred.square().sum(1, keepdim=True) / (x.shape[1] - self.correction)
        return affine_to(centred * (var + self.eps).rsqrt(), weight, bias).to(x.dtype)

    def vjp(self, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """With ``y = z * weight + bias`` and ``z = (x - mean) * rstd``."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        degrees = x.shape[1] - self.correction
        mean = wide.mean(1, keepdim=True)
        rstd = (squared_difference(wide, mean).sum(1, keepdim=True) / degrees + self.eps).rsqrt()
        z = (wide - mean).mul_(rstd)
        product = z * dy
        d_weight = None if weight is None else per_channel_sum(product)
        along = weighted_sum(product, weight) / degrees
        level = weighted_sum(dy, weight) / x.shape[1]
        dz = dy.clone() if weight is None else dy * per_channel(weight, x)
        dx = dz.addcmul_(z, along, value=-1).sub_(level).mul_(rstd).to(x.dtype)
        return dx, [d_weight, None if bias is None else per_channel_sum(dy)]


@dataclass(frozen=True)
class _RootMeanSquare:
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        return affine_to(wide * self._scale(wide), weight, bias).to(x.dtype)

    def _scale(self, x: Tensor) -> Tensor:
        if channels_last(x) and not traced(x):
            square = torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]
        else:
            square = x.square().mean(1, keepdim=True)
        return (square + self.eps).rsqrt()

    def vjp(self, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """With ``y = x * scale * weight + bias``."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        scale = self._scale(wide)
        product = wide * dy
        along = weighted_sum(product, weight) * scale.pow(3) / -x.shape[1]
        d_weight = None if weight is None else per_channel_sum(product.mul_(scale))
        dx = dy * scale if weight is None else (dy * per_channel(weight, x)).mul_(scale)
        d_bias = None if bias is None else per_channel_sum(dy)
        return dx.addcmul_(wide, along).to(x.dtype), [d_weight, d_bias]


def weighted_sum(x: Tensor, weight: Tensor | None) -> Tensor:
    """``sum(x * weight)`` of each position over channels, (N, 1, ...)."""
    if weight is None:
        return x.sum(1, keepdim=True)
    with without_autocast(x):
        if channels_last(x):
            return (x.movedim(1, -1) @ weight.to(x.dtype)).unsqueeze(1)
        return (weight.to(x.dtype) @ x.flatten(2)).view(x.shape[0], 1, *x.shape[2:])
