"""Group normalization of channels-last maps, where the native kernel's forward loses precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import positions
from normzoo.functional._channel_affine import Plan, plain_channel_affine
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import moments, scale_shift
from normzoo.functional._pieces import differentiable_gradients


@torch.compiler.disable
def channels_last_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
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
        wide, mask = x.to(rstd.dtype), [needs[0], weight is not None, bias is not None]
        dx, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            dy.to(rstd.dtype),
            wide,
            mean.view(n, groups),
            rstd.view(n, groups),
            weight,
            n,
            c,
            positions(x),
            groups,
            mask,
        )
        return dx.to(x.dtype) if needs[0] else None, None, d_weight, d_bias, None
