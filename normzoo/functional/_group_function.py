"""Group normalization in few passes and calls, for the memory formats in which the native kernel loses precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normzoo.functional._channel_affine import Plan, plain_channel_affine
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import combine, moments, projections, scale_shift
from normzoo.functional._pieces import differentiable_gradients


@torch.compiler.disable
def native_free_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As ``torch.group_norm``, the variance taken around the mean in every memory format."""
    return _GroupNorm.apply(x, groups, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        mean, var = moments(x, per_sample=True)
        n, c = mean.shape
        mean, var = mean.view(n, groups, -1), var.view(n, groups, -1)
        if groups < c:
            whole = mean.mean(-1, keepdim=True)
            offset, mean = mean - whole, whole
            var = torch.addcmul(var, offset, offset).mean(-1, keepdim=True)
        rstd = var.add_(eps).rsqrt_()
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        scale = rstd.expand(n, groups, c // groups) if weight is None else rstd * weight.view(groups, -1)
        level = mean * scale
        level = (-level).reshape(n, c) if bias is None else bias - level.view(n, c)
        return scale_shift(x, scale.reshape(n, c), level).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad, ctx.groups
        if torch.is_grad_enabled():
            plan = Plan(GroupRule(groups, ctx.eps), sample=True, batch=False, sync=False, after=None, after_tensors=0)
            dx, d_weight, d_bias = differentiable_gradients(
                lambda *a: plain_channel_affine(a[0], plan, *a[1:])[0], [x, weight, bias], (needs[0], *needs[2:4]), dy
            )
            return dx, None, d_weight, d_bias, None
        n, c = x.shape[:2]
        shape = (n, groups, c // groups)
        dots, sums = projections(dy, x, mean.expand(shape).reshape(n, c), per_sample=True)
        d_bias = None if bias is None else sums.sum(0)
        d_weight, scale = None, rstd.expand(shape)
        dots, sums = dots.view(shape), sums.view(shape)
        if weight is not None:
            by_group = weight.view(groups, -1)
            d_weight = (dots * rstd).sum(0).view(c)
            dots, sums, scale = dots * by_group, sums * by_group, rstd * by_group
        share = rstd * (-1 / x[0, : c // groups].numel())
        slope = dots.sum(-1, keepdim=True).mul_(share).mul_(rstd).mul_(rstd)
        level = torch.addcmul(sums.sum(-1, keepdim=True).mul_(share), slope, mean, value=-1)
        scale, slope, level = (v.expand(shape).reshape(n, c) for v in (scale, slope, level))
        return combine(dy, scale, x, slope, level), None, d_weight, d_bias, None
