"""EvoNorm-B0 and EvoNorm-S0, normalization and activation in one (Liu et al. 2020, arXiv 2004.02967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normzoo._shapes import per_channel, positions, spread, statistics_dtype
from normzoo.functional._distributed import all_gather_moments, all_reduce_sum, several_ranks
from normzoo.functional._moments import (
    add_scaled_,
    affine_backward,
    affine_sample,
    combine,
    joined,
    moments,
    per_channel_sum,
    per_sample_sum,
    refuse_one_value,
    scale_shift_into,
    sigmoid_backward_,
    small_beside,
    squared_difference,
    unbiased,
)
from normzoo.functional._pieces import by_formula, by_sample, gradients_of_formula, pieces, summed, traced
from normzoo.functional.batch import update_running
from normzoo.functional.elementwise import Gradients, Kept, affine_into, affine_to


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
    return by_sample(_S0(groups, eps), x, weight, bias, v)


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
        ValueError: when training on one value per channel, whose variance is undefined; when not training and without
            a running variance.

    Source: Liu et al. 2020, arXiv 2004.02967, table 2 and appendix A.
    """
    if not training and running_var is None:
        raise ValueError("EvoNorm-B0 needs running_var when not training")
    sync = sync and training and several_ranks()
    var = None if training or running_var is None else running_var.to(statistics_dtype(x))
    run = _plain_b0 if traced(x) and not sync else _apply_b0
    y, batch_var, count = run(x, weight, bias, v, var, _EvoNormB0Options(eps, sync))
    if training:
        refuse_one_value(x, "EvoNorm-B0", count)
    if training and running_var is not None:
        update_running(running_var, unbiased(batch_var, count), momentum)
    return y


@dataclass(frozen=True, eq=False)
class _S0:
    groups: int
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        grouped = wide.unflatten(1, (self.groups, -1))
        dims = tuple(range(2, grouped.ndim))
        var = (grouped - grouped.mean(dims, keepdim=True)).square().mean(dims)
        scale = (var + self.eps).rsqrt().repeat_interleave(x.shape[1] // self.groups, dim=1)
        y = wide if v is None else wide * (wide * per_channel(v, x)).sigmoid()
        y = y * spread(scale if weight is None else scale * weight, x)
        return (y if bias is None else y + per_channel(bias, x)).to(x.dtype)

    def write(self, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None) -> Kept:
        """The output, by few passes."""
        wide = x.to(statistics_dtype(x))
        mean, rstd = self._moments(wide)
        scale = self._of_channels(rstd, x)
        gated = wide if v is None else (wide * per_channel(v, x)).sigmoid_().mul_(wide)
        scale_shift_into(y, gated, scale if weight is None else scale * weight, bias)
        return (mean, rstd) if small_beside(x) else ()

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        v: Tensor | None,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """With ``y = gated * scale + bias`` and ``gated = x * gate``."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        mean, rstd = kept or self._moments(wide)
        product = wide * dy
        passed, d_gate = dy, None
        if v is not None:
            gate = (wide * per_channel(v, x)).sigmoid_()
            gated = product * gate
            d_gate, product = sigmoid_backward_(product, gate), gated
            passed = torch.mul(gate, dy, out=gate).addcmul_(d_gate, per_channel(v, x))
        d_scale = per_sample_sum(product)
        scale = self._of_channels(rstd, x)
        d_weight = None if weight is None else (d_scale * scale).sum(0)
        if weight is not None:
            scale, d_scale = scale * weight, d_scale * weight
        d_v = None if d_gate is None else (per_sample_sum(torch.mul(d_gate, wide, out=d_gate)) * scale).sum(0)
        of_group = d_scale.view(*rstd.shape[:2], -1).sum(-1, keepdim=True)
        slope = of_group.mul_(rstd.pow(3)).mul_(-self.groups / x[0].numel())
        level = self._of_channels(-slope * mean, x)
        dx = combine(passed, scale, x, self._of_channels(slope, x), level, into=out)
        return dx, [d_weight, None if bias is None else per_channel_sum(dy), d_v]

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The groups' means and 1 / sqrt(variance + eps), each (N, groups, 1)."""
        of_channels, var = (v.view(x.shape[0], self.groups, -1) for v in moments(x, per_sample=True))
        mean = of_channels.mean(-1, keepdim=True)
        return mean, (squared_difference(of_channels, mean).add_(var).mean(-1, keepdim=True) + self.eps).rsqrt_()

    def _of_channels(self, v: Tensor, x: Tensor) -> Tensor:
        """(N, groups, 1) as (N, C)."""
        return v.expand(-1, -1, x.shape[1] // self.groups).reshape(x.shape[:2])


class _EvoNormB0Options(NamedTuple):
    eps: float
    sync: bool


def _plain_b0(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    var: Tensor | None,
    options: _EvoNormB0Options,
) -> tuple[Tensor, Tensor, int | Tensor]:
    """The formula in differentiable operations, the batch's variance (or ``var``) and the count of its values."""
    wide = x.to(statistics_dtype(x))
    if var is None:
        var = (wide - wide.mean([0, *range(2, x.ndim)], keepdim=True)).square().mean([0, *range(2, x.ndim)])
    std = per_channel((var + options.eps).sqrt(), x)
    if v is not None:
        dims = tuple(range(2, x.ndim))
        instance = (wide - wide.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) if dims else 0 * wide
        # a tie belongs to the batch, as in the authors' code
        std = std + (wide * per_channel(v, x) + ((instance + options.eps).sqrt() - std)).relu()
    return affine_to(wide / std, weight, bias).to(x.dtype), var.detach(), x.numel() // x.shape[1]


@torch.compiler.disable
def _apply_b0(*arguments: Any) -> tuple[Tensor, Tensor, int | Tensor]:
    return _EvoNormB0.apply(*arguments)


class _EvoNormB0(torch.autograd.Function):
    """``y = x / max(batch, own) * weight + bias`` with ``own = v * x + instance``: one set of moments for both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        v: Tensor | None,
        var: Tensor | None,
        options: _EvoNormB0Options,
    ) -> tuple[Tensor, Tensor, int | Tensor]:
        ctx.options, ctx.of_batch = options, var is None
        count: int | Tensor = x.numel() // x.shape[1]
        y = torch.empty_like(x)
        mean, instance_var = _sample_moments(x, scratch=y)
        batch_mean = torch.zeros_like(mean[:1])
        if var is None:
            if count:
                batch_mean = mean.mean(0, keepdim=True)
                of_batch = torch.addcmul(instance_var, mean - batch_mean, mean - batch_mean).mean(0, keepdim=True)
            else:
                batch_mean, of_batch = (mean.new_zeros(1, x.shape[1]) for _ in range(2))
            if options.sync:
                batch_mean, of_batch, count = all_gather_moments(batch_mean, of_batch, int(count))
            var = of_batch[0]
        batch, instance = (var + options.eps).sqrt(), (instance_var + options.eps).sqrt()
        for rows in pieces(x):
            wide = x[rows].to(statistics_dtype(x))
            if v is None:
                affine_into(y[rows], wide * per_channel(1 / batch, x), weight, bias)
            else:
                std = affine_sample(wide, v, instance[rows]).clamp_(min=per_channel(batch, x))
                affine_into(y[rows], torch.div(wide, std, out=std), weight, bias)
        kept = (mean, instance) if small_beside(x) else (None, None)
        synced = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(x, weight, bias, v, var, batch_mean, synced, *kept)
        ctx.mark_non_differentiable(var, *([] if synced is None else [synced]))
        return y, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, v, var, batch_mean, synced, mean, instance = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad
        if by_formula(dy, sync=options.sync):
            plain = gradients_of_formula(
                lambda x, w, b, v: _plain_b0(x, w, b, v, None if ctx.of_batch else var, options)[0],
                [x, weight, bias, v],
                needs[:4],
                dy,
            )
            return *plain, None, None
        if mean is None and v is not None:
            mean, instance_var = _sample_moments(x)
            instance = (instance_var + options.eps).sqrt()
        batch = (var + options.eps).sqrt()
        gain = torch.ones_like(batch) if weight is None else weight.to(batch.dtype)
        slope_of_x = None if v is None else v.to(batch.dtype)
        dx = torch.empty_like(x, dtype=batch.dtype)
        sums: list[list[Tensor]] = []
        slopes: list[Tensor] = []
        for rows in pieces(x):
            wide, dz = x[rows].to(batch.dtype), dy[rows].to(batch.dtype)
            if slope_of_x is None:
                of_piece, *of_affine = affine_backward(dz, wide, gain / batch)
                sums.append([of_affine[0] / batch, of_affine[1], of_affine[0] * gain / batch.square(), batch])
                dx[rows] = of_piece
            else:
                slope, *found = _b0_backward(wide, dz, gain, slope_of_x, batch, instance[rows], into=dx[rows])
                slopes.append(slope)
                sums.append(found)
        d_weight, d_bias, d_std, d_v = (summed(parts) for parts in zip(*sums, strict=True))
        slope, level = (torch.zeros_like(batch_mean) for _ in range(2))
        if slopes and x.ndim > 2:
            slope = joined(slopes).div_(instance).div_(-positions(x))
            level = -slope * mean
        if ctx.of_batch:
            d_var, count = d_std / (-2 * batch), x.numel() // x.shape[1]
            if synced is not None:
                (d_var,), count = all_reduce_sum([d_var]), synced
            of_var = d_var * (2 / count)
            slope, level = slope + of_var, torch.addcmul(level, of_var, batch_mean, value=-1)
        add_scaled_(dx, x, slope, level)
        return (
            dx.to(x.dtype),
            None if weight is None else d_weight,
            None if bias is None else d_bias,
            None if v is None else d_v,
            None,
            None,
        )


def _b0_backward(
    x: Tensor, dy: Tensor, weight: Tensor, v: Tensor, batch: Tensor, instance: Tensor, into: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of ``y = x / std * weight + bias``, ``std = max(batch, own)``, ``own = v * x + instance``.

    That for x, but for its share through instance and batch, is put ``into`` a tensor.

    Returns:
        (N, C) that for -instance; (C,) those for weight, bias, -batch and v.
    """
    own = affine_sample(x, v, instance)
    std = own.clamp(min=per_channel(batch, x))
    y = x / std
    gain = torch.div(per_channel(weight, x), std, out=into)
    product = y.mul_(dy)
    d_weight, d_bias = per_channel_sum(product), per_channel_sum(dy)
    d_std = product.mul_(gain)  # of -std
    excess = own.sub_(per_channel(batch, x))
    d_own = torch.ops.aten.threshold_backward.grad_input(d_std, excess, 0, grad_input=excess)
    d_instance = per_sample_sum(d_own)
    d_batch = per_channel_sum(d_std) - d_instance.sum(0)
    d_v = -per_channel_sum(torch.mul(d_own, x, out=d_std))
    gain.mul_(dy).addcmul_(d_own, per_channel(v, x), value=-1)
    return d_instance, d_weight, d_bias, d_batch, d_v


def _sample_moments(x: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each sample's means and biased variances, (N, C); zeros where there is nothing."""
    if x.numel():
        return moments(x, per_sample=True, scratch=scratch)
    mean, var = (torch.zeros(x.shape[:2], dtype=statistics_dtype(x), device=x.device) for _ in range(2))
    return mean, var
