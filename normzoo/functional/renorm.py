"""Batch renormalization (Ioffe 2017, arXiv 1702.03275)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from normzoo._shapes import statistics_dtype
from normzoo.functional._channel_affine import Plan, channel_affine, plain_channel_affine
from normzoo.functional._distributed import several_ranks
from normzoo.functional._pieces import differentiable_gradients, traced
from normzoo.functional.batch import batch_norm, batch_statistics, update_running


@overload
def piecewise_linear(points: Sequence[tuple[float, float]], step: Tensor) -> Tensor: ...
@overload
def piecewise_linear(points: Sequence[tuple[float, float]], step: float) -> float: ...
def piecewise_linear(points: Sequence[tuple[float, float]], step: Tensor | float) -> Tensor | float:
    """The value at ``step`` of the line through ``points``, constant before the first and after the last.

    Args:
        points: (step, value) pairs with increasing steps.
        step: a number, or a 0-d tensor on any device, of which nothing is read back to the host.

    Returns:
        a number, or a 0-d float32 tensor on the device of ``step``.

    Example:
        >>> piecewise_linear([(5000, 1.0), (40000, 3.0)], torch.tensor(22500)).item()
        2.0
        >>> piecewise_linear([(5000, 1.0), (40000, 3.0)], 60000)
        3.0
    """
    first, segments = points[0][1], list(itertools.pairwise(points))
    if not isinstance(step, Tensor):
        return first + sum((v1 - v0) * min(max((step - s0) / (s1 - s0), 0.0), 1.0) for (s0, v0), (s1, v1) in segments)
    value = torch.full((), first, dtype=torch.float64, device=step.device)
    for (s0, v0), (s1, v1) in segments:
        value = value + (v1 - v0) * ((step.double() - s0) / (s1 - s0)).clamp(0.0, 1.0)
    return value.float()


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    average: str = "std",
    sync: bool = False,
) -> Tensor:
    """Batch normalization corrected towards the running statistics.

    Training, with mu_B and var_B (biased) of the batch, sigma_B = sqrt(var_B + eps), and mu and
    sigma = sqrt(running_var + eps) as they were before this batch::

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * weight + bias

    No gradient flows through r, d, mu or sigma. Then mu <- mu + momentum * (mu_B - mu), and likewise sigma
    (``average="std"``, the paper and Keras) or running_var towards var_B (``average="variance"``).
    Not training, ``y = (x - mu) / sigma * weight + bias``, as in batch normalization.

    Args:
        x: (N, C, ...).
        running_mean: (C,), mu; updated in place when training.
        running_var: (C,), sigma^2 - eps, so that it is what BatchNorm2d means by it; updated in place.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        r_max: bound of r, at least 1; a number or a 0-d tensor.
        d_max: bound of d, at least 0; a number or a 0-d tensor.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to variances.
        average: ``"std"`` or ``"variance"``, what the running average is taken of.
        sync: when training, take the statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Ioffe 2017, arXiv 1702.03275, algorithm 1.
    """
    if not training or (x.numel() == 0 and not (sync and several_ranks())):
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    dtype = statistics_dtype(x)
    mu, sigma = running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).sqrt()
    bounds: list[Any] = [m.to(dtype) if isinstance(m, Tensor) else m for m in (r_max, d_max)]
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        mu, sigma, *bounds = (_kept(t) if isinstance(t, Tensor) else t for t in (mu, sigma, *bounds))
    rule = _Renorm(eps, *bounds)
    if traced(x) or (sync and several_ranks()):
        y, (found,) = channel_affine(x, rule, weight, bias, mu, sigma, batch=True, sync=sync)
        mean, var, std = found.mean, found.var, (found.var + eps).sqrt()
    else:
        y, mean, var, std = _renormalize(x, rule, weight, bias, mu, sigma)
    if average == "std":
        std = sigma.lerp(std, momentum.to(dtype) if isinstance(momentum, Tensor) else momentum)
        # sigma^2 >= eps up to rounding, since both averaged terms are at least sqrt(eps)
        running_var.copy_(std.square_().sub_(eps).clamp_(min=0.0))
    else:
        update_running(running_var, var, momentum)
    update_running(running_mean, mean, momentum)
    return y


@torch.library.custom_op("normzoo::kept", mutates_args=())
def _kept(value: Tensor) -> Tensor:
    """A copy that a compiled backward pass does not compute again.

    Out of buffers it would, and find them moved on: https://github.com/pytorch/pytorch/pull/197039.
    """
    return value.clone()


@_kept.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@dataclass(frozen=True)
class _Renorm:
    """The rule of batch renormalization."""

    eps: float
    r_max: float | Tensor
    d_max: float | Tensor

    def __call__(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mu: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        std = (var + self.eps).sqrt()
        r, d = self.corrections(mean, std, mu, sigma)
        scale, shift = r / std, d
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        return scale, shift if bias is None else shift + bias

    def corrections(self, mean: Tensor, std: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """R and d, without gradient, of a batch's mean and standard deviation and the running ones."""
        r_max: Any = self.r_max
        d_max: Any = self.d_max
        with torch.no_grad():
            return (std / sigma).clamp_(1 / r_max, r_max), (mean - mu).div_(sigma).clamp_(-d_max, d_max)


@torch.compiler.disable
def _renormalize(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _BatchRenorm.apply(*arguments)


class _BatchRenorm(torch.autograd.Function):
    """Batch normalization's kernels, with weight * r for its weight and weight * d + bias for its bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rule: _Renorm, weight: Tensor | None, bias: Tensor | None, *held: Tensor
    ) -> tuple[Tensor, ...]:
        mean, var = batch_statistics(x)
        std = (var + rule.eps).sqrt_()
        r, d = rule.corrections(mean, std, *held)
        scale, shift = (r, d) if weight is None else (weight * r, weight * d)
        shift = shift if bias is None else shift + bias
        scale, shift = scale.to(mean.dtype), shift.to(mean.dtype)
        y = torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, rule.eps)
        ctx.save_for_backward(x, mean, std.reciprocal(), r, d, scale, weight, bias, *held)
        ctx.rule = rule
        ctx.mark_non_differentiable(mean, var, std)
        return y[0], mean, var, std

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, r, d, scale, weight, bias, *held = ctx.saved_tensors
        needs = ctx.needs_input_grad
        constant = (None,) * len(held)
        if torch.is_grad_enabled():
            plan = Plan(ctx.rule, sample=False, batch=True, sync=False, after=None, after_tensors=0)
            dx, d_weight, d_bias = differentiable_gradients(
                lambda x, *affine: plain_channel_affine(x, plan, *affine, *held)[0],
                [x, weight, bias],
                (needs[0], *needs[2:4]),
                dy,
            )
            return dx, None, d_weight, d_bias, *constant
        dx, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, None, None, mean, rstd, True, ctx.rule.eps, [needs[0], True, True]
        )
        d_weight = None if weight is None else torch.addcmul(d_scale * r, d_shift, d)
        return dx if needs[0] else None, None, d_weight, None if bias is None else d_shift, *constant
