"""Normalization of each position over its channels: layer normalization as in ConvNeXt, RMS and positional."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from normzoo._shapes import HALF, channels_last, per_channel, statistics_dtype
from normzoo.functional._pieces import by_sample


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
    return by_sample(partial(_standardize, eps=eps, correction=0), x, weight, bias)


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
    return by_sample(partial(_standardize, eps=eps, correction=1), x, weight, bias)


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
    return by_sample(partial(_root_mean_square, eps=eps), x, weight, bias)


def _check_channels(x: Tensor) -> None:
    if x.shape[1] == 1:
        raise ValueError(
            f"each position of the input of shape {tuple(x.shape)} has a single channel: "
            "its value normalized over channels would be 0 whatever it is"
        )


def _standardize(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, correction: int) -> Tensor:
    wide = x.to(statistics_dtype(x))
    centred = wide - wide.mean(1, keepdim=True)
    var = centred.square().sum(1, keepdim=True) / (x.shape[1] - correction)
    return _affine(centred * (var + eps).rsqrt(), weight, bias).to(x.dtype)


def _root_mean_square(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    return _affine(wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt(), weight, bias).to(x.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * per_channel(weight, y)
    return y if bias is None else y + per_channel(bias, y)
