"""Batch normalization by mean absolute deviations (Hoffer, Banner, Golan & Soudry 2018, arXiv 1803.01814)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._distributed import all_reduce_mean, all_reduce_sum, several_ranks
from normzoo.functional._moments import affine_backward, refuse_one_value, scale_shift
from normzoo.functional._pieces import by_formula, gradients_of_formula, pieces, summed, traced
from normzoo.functional._recomputation import in_backward
from normzoo.functional.batch import update_running
from normzoo.functional.elementwise import channel_scale_shift

GAUSSIAN = math.sqrt(math.pi / 2)  # std over mean absolute deviation of a normal distribution

_L1Options = tuple[float, bool]  # eps, sync


def l1_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = (x - mean) / (s + eps) * weight + bias`` with ``s = sqrt(pi / 2) * mean(|x - mean|)`` of each channel.

    Training, mean and s are the batch's, over batch and space; the running averages are of mean and s, and
    ``running_var`` is the square of the latter. Not training, the running ones stand in.

    Args:
        x: (N, C, ...), not empty unless ``sync``.
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to s.
        sync: when training, take the statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training on one value per channel, whose deviation is 0.

    Source: Hoffer et al. 2018, arXiv 1803.01814, section 4.
    """
    if not training:
        dtype = statistics_dtype(x)
        scale = 1 / (running_var.to(dtype).sqrt() + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean.to(dtype) * scale
        return channel_scale_shift(x, scale, shift if bias is None else shift + bias)
    sync = sync and several_ranks()
    if not sync:
        refuse_one_value(x, "normalization by deviations")
    normalize = _plain if traced(x) and not sync else _apply
    y, mean, std = normalize(x, weight, bias, (eps, sync))
    update_running(running_mean, mean, momentum)
    if not in_backward():
        running_std = running_var.sqrt()
        running_var.copy_((running_std + momentum * (std - running_std)).square())
    return y


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _L1Options) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in differentiable operations."""
    wide = x.to(statistics_dtype(x))
    dims = [0, *range(2, x.ndim)]
    mean = wide.mean(dims)
    centred = wide - per_channel(mean, x)
    std = GAUSSIAN * centred.abs().mean(dims)
    scale = 1 / (std + options[0])
    y = centred * per_channel(scale if weight is None else scale * weight, x)
    y = y if bias is None else y + per_channel(bias, x)
    return y.to(x.dtype), mean.detach(), std.detach()


@torch.compiler.disable
def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _L1Options) -> tuple[Tensor, Tensor, Tensor]:
    return _L1BatchNorm.apply(x, weight, bias, options)


class _L1BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _L1Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps, sync = options
        dims, dtype, count = [0, *range(2, x.ndim)], statistics_dtype(x), x.numel() // x.shape[1]
        mean, number = _average(x.sum(dims, dtype=dtype), count, sync)
        refuse_one_value(x, "normalization by deviations", number)
        centre = per_channel(mean, x)
        deviation, _ = _average(summed(_deviation(x[rows], centre).sum(dims) for rows in pieces(x)), count, sync)
        std = GAUSSIAN * deviation
        scale = 1 / (std + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        ctx.save_for_backward(x, mean, std, weight, bias)
        ctx.options = options
        ctx.mark_non_differentiable(mean, std)
        y = scale_shift(x, scale[None], (shift if bias is None else shift + bias)[None])
        return y.to(x.dtype), mean, std

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std, weight, bias = ctx.saved_tensors
        eps, sync = ctx.options
        if by_formula(dy, sync=sync):
            inputs, needed = [x, weight, bias], ctx.needs_input_grad[:3]
            return *gradients_of_formula(lambda x, w, b: _plain(x, w, b, ctx.options)[0], inputs, needed, dy), None
        wide, dims = x.to(mean.dtype), [0, *range(2, x.ndim)]
        inverse = 1 / (std + eps)
        scale = inverse if weight is None else inverse * weight
        dx, dot, total = affine_backward(dy.to(mean.dtype), wide, scale, mean)
        directions = (wide - per_channel(mean, x)).sign_()
        signs = directions.sum(dims)
        d_std, d_mean, count = -dot * scale * inverse * GAUSSIAN, -total * scale, torch.full_like(mean, x[:, 0].numel())
        if sync:
            d_std, d_mean, signs, count = all_reduce_sum([d_std, d_mean, signs, count])
        slope = d_std / count
        level = d_mean / count - slope * signs / count
        dx.addcmul_(directions, per_channel(slope, x)).add_(per_channel(level, x))
        d_weight = None if weight is None else dot * inverse
        return dx.to(x.dtype), d_weight, None if bias is None else total, None


def _deviation(x: Tensor, centre: Tensor) -> Tensor:
    """``|x - centre|``, on a CPU in one pass: the smooth L1 loss, where it is smooth nowhere."""
    if x.dtype != centre.dtype or x.device.type != "cpu":
        return (x - centre).abs_()
    return torch.ops.aten.smooth_l1_loss(x, centre, 0, torch.finfo(x.dtype).tiny)


def _average(total: Tensor, count: int, sync: bool) -> tuple[Tensor, int | Tensor]:
    """The mean, and the number of values that it is of."""
    return all_reduce_mean(total, count) if sync else (total / count, count)
