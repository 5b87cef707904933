"""Group, layer and instance normalization: statistics of each sample over groups of channels and space."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo._shapes import affine, channels_last, statistics_dtype
from normzoo.functional._channel_affine import channel_affine
from normzoo.functional._group_function import channels_last_group_norm
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._pieces import traced


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, statistics of each sample and group of channels.

    Args:
        x: (N, C, ...).
        groups: number of groups of C / groups consecutive channels.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the biased variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: if ``groups`` does not divide C, or if a group holds one value (the output would be the bias
            whatever the input).

    Source: Wu & He 2018, arXiv 1803.08494, equations 1-7.
    """
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the channels: {groups} groups were asked of {channels} channels")
    if x.numel() == 0:
        return affine(x, weight, bias)
    if x[0].numel() == groups:
        raise ValueError(
            f"each of the {groups} groups holds a single value of the input of shape {tuple(x.shape)}: "
            "its normalized value would be 0 whatever it is. Use fewer groups or a larger map"
        )
    dtype = statistics_dtype(x)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    # The native kernel saves a copy of half-precision input beside float32 parameters (but on the CPU), and in
    # channels_last takes the variance as E[x^2] - E[x]^2, which is lost where the mean is large.
    if not traced(x) and not channels_last(x) and (x.dtype == dtype or x.device.type == "cpu"):
        return torch.group_norm(x, groups, weight, bias, eps, False)
    if traced(x):
        return channel_affine(x, GroupRule(groups, eps), weight, bias, sample=True)[0]
    return channels_last_group_norm(x, groups, weight, bias, eps)[0]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalization of each sample over channels and space: :func:`group_norm` with one group.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450; for convolutional maps as in Wu & He 2018, section 3.
    """
    return group_norm(x, 1, weight, bias, eps=eps)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Instance normalization of each sample and channel over space: :func:`group_norm` with C groups.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022.
    """
    return group_norm(x, x.shape[1], weight, bias, eps=eps)
