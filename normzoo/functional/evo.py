"""EvoNorm-B0 and EvoNorm-S0, normalization and activation in one (Liu et al. 2020, arXiv 2004.02967)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from normzoo._shapes import per_channel, spread, statistics_dtype
from normzoo.functional._moments import batch_variance
from normzoo.functional._pieces import by_sample
from normzoo.functional.batch import update_running


def evonorm_s0(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-5,
) -> Tensor:
    """``y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias``, var of each sample's groups of channels.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        v: (C,), the slope of the gate; without it there is no gate: ``x / sqrt(var + eps)``.
        groups: number of groups of C / groups consecutive channels.
        eps: added to the biased variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: if ``groups`` does not divide C.

    Source: Liu et al. 2020, arXiv 2004.02967, table 2 and appendix A.
    """
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the channels: {groups} groups were asked of {x.shape[1]} channels")
    return by_sample(partial(_s0, groups=groups, eps=eps), x, weight, bias, v)


def evonorm_b0(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-3,
    sync: bool = False,
) -> Tensor:
    """``y = x / max(sqrt(var_B + eps), v * x + sqrt(var_I + eps)) * weight + bias``.

    var_B is the variance over batch and space (biased in training, else ``running_var``, which is moved towards the
    unbiased one), var_I each sample's over space (biased).

    Args:
        x: (N, C, ...), not empty.
        running_var: (C,); updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        v: (C,); without it the denominator is ``sqrt(var_B + eps)`` alone.
        training: use the batch's variance.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to both variances.
        sync: take the batch's variance over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when not training and without a running variance.

    Source: Liu et al. 2020, arXiv 2004.02967, table 2 and appendix A.
    """
    if training:
        var, unbiased = batch_variance(x, sync=sync)
        if running_var is not None:
            update_running(running_var, unbiased, momentum)
    elif running_var is None:
        raise ValueError("EvoNorm-B0 needs running_var when not training")
    else:
        var = running_var.to(statistics_dtype(x))
    return by_sample(partial(_b0, eps=eps), x, weight, bias, v, var)


def _s0(x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None, *, groups: int, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    grouped = wide.unflatten(1, (groups, -1))
    dims = tuple(range(2, grouped.ndim))
    var = (grouped - grouped.mean(dims, keepdim=True)).square().mean(dims)
    scale = (var + eps).rsqrt().repeat_interleave(x.shape[1] // groups, dim=1)
    y = wide if v is None else wide * (wide * per_channel(v, x)).sigmoid()
    y = y * spread(scale if weight is None else scale * weight, x)
    return (y if bias is None else y + per_channel(bias, x)).to(x.dtype)


def _b0(x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None, var: Tensor, *, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    std = per_channel((var + eps).sqrt(), x)
    if v is not None:
        dims = tuple(range(2, x.ndim))
        instance = (wide - wide.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) if dims else 0 * wide
        gated = wide * per_channel(v, x) + (instance + eps).sqrt()
        std = torch.where(std >= gated, std, gated)
    y = wide / std
    y = y if weight is None else y * per_channel(weight, x)
    return (y if bias is None else y + per_channel(bias, x)).to(x.dtype)
