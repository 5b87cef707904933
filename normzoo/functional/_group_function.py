"""Group normalization of channels-last maps, where the native kernel's forward loses precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import memory_format, positions
from normzoo.functional._channel_affine import ChannelAffineOptions, plain_channel_affine
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import combine, moments, projections, scale_shift
from normzoo.functional._pieces import by_formula, gradients_of_formula

# Channels of a group from which on the native kernel's backward is fast.
NATIVE = 8


@torch.compiler.disable
def channels_last_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.group_norm``, the variance taken around the mean in every memory format.

    Returns:
        the output, and without gradient mean and biased variance of the groups, (N, groups, 1).
    """
    return _GroupNorm.apply(x, groups, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, rstd = standardized(x, groups, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad, ctx.groups
        if by_formula(dy):
            options = ChannelAffineOptions(
                GroupRule(groups, ctx.eps), sample=True, batch=False, sync=False, after=None, after_tensors=0
            )
            dx, d_weight, d_bias = gradients_of_formula(
                lambda *a: plain_channel_affine(a[0], options, *a[1:])[0],
                [x, weight, bias],
                (needs[0], *needs[2:4]),
                dy,
            )
            return dx, None, d_weight, d_bias, None
        if x.shape[1] // groups < NATIVE or x.device.type != "cpu":
            dx, d_weight, d_bias = standardized_gradients(x, dy, mean, rstd, weight)
        else:
            layout = memory_format(x)  # one for both: the kernel of torch 2.12 reads dy as if it were laid out like x
            dx, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
                dy.to(rstd.dtype).contiguous(memory_format=layout),
                x.to(rstd.dtype).contiguous(memory_format=layout),
                mean.view(x.shape[0], groups),
                rstd.view(x.shape[0], groups),
                weight,
                *x.shape[:2],
                positions(x),
                groups,
                [needs[0], weight is not None, bias is not None],
            )
        d_weight = None if weight is None else d_weight
        return dx.to(x.dtype) if needs[0] else None, None, d_weight, None if bias is None else d_bias, None


def standardized(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, ``into`` a tensor if given, and mean, biased variance and 1 / std of groups, each (N, groups, 1)."""
    into = torch.empty_like(x) if into is None else into
    mean, var = moments(x, per_sample=True, scratch=into)
    n, c = mean.shape
    mean, var = mean.view(n, groups, -1), var.view(n, groups, -1)
    if groups < c:
        whole = mean.mean(-1, keepdim=True)
        offset, mean = mean - whole, whole
        var = torch.addcmul(var, offset, offset).mean(-1, keepdim=True)
    rstd = (var + eps).rsqrt_()
    scale = rstd.expand(n, groups, c // groups) if weight is None else rstd * weight.view(groups, -1)
    level = mean * scale
    level = (-level).reshape(n, c) if bias is None else bias - level.view(n, c)
    return scale_shift(x, scale.reshape(n, c), level, into), mean, var, rstd


def standardized_gradients(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those for x, put ``into`` a tensor if given, weight and bias, by sums over each sample's channels."""
    (n, groups, _), c = mean.shape, x.shape[1]
    into = torch.empty_like(x) if into is None else into
    of_channels = mean.expand(n, groups, c // groups).reshape(n, c)
    products, sums = (v.view(n, groups, -1) for v in projections(dy, x, of_channels, per_sample=True, scratch=into))
    d_weight, d_bias = (products * rstd).sum(0).flatten(), sums.sum(0).flatten()
    scale = rstd.expand_as(products)
    if weight is not None:
        by_group = weight.view(groups, -1)
        scale, products, sums = rstd * by_group, products * by_group, sums * by_group
    if groups < c:
        products, sums = products.sum(-1, keepdim=True), sums.sum(-1, keepdim=True)
    share = rstd / (-positions(x) * (c // groups))
    slope = products * (share * rstd * rstd)
    level = torch.addcmul(sums * share, slope, mean, value=-1)
    slope, level = (v.expand_as(scale).reshape(n, c) for v in (slope, level))
    return combine(dy, scale.reshape(n, c), x, slope, level, into), d_weight, d_bias
