"""EvoNorm-B0 and EvoNorm-S0, normalization and activation in one (Liu et al. 2020, arXiv 2004.02967)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo._shapes import per_channel, positions, spread, statistics_dtype
from normzoo.functional._moments import (
    affine_backward,
    affine_sample,
    batch_variance,
    combine,
    moments,
    per_channel_sum,
    per_sample_sum,
    scale_shift_into,
    sigmoid_backward,
    small_beside,
    squared_difference,
)
from normzoo.functional._pieces import by_sample
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
    return by_sample(_B0(eps), x, weight, bias, v, var)


@dataclass(frozen=True)
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
            d_gate = sigmoid_backward(product, gate)
            product.mul_(gate)
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


@dataclass(frozen=True)
class _B0:
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None, var: Tensor) -> Tensor:
        wide = x.to(statistics_dtype(x))
        std = per_channel((var + self.eps).sqrt(), x)
        if v is not None:
            dims = tuple(range(2, x.ndim))
            instance = (wide - wide.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) if dims else 0 * wide
            # a tie belongs to the batch, as in the authors' code
            std = std + (wide * per_channel(v, x) + ((instance + self.eps).sqrt() - std)).relu()
        return affine_to(wide / std, weight, bias).to(x.dtype)

    def write(
        self, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None, var: Tensor
    ) -> Kept:
        """The output, by few passes."""
        wide, batch = x.to(statistics_dtype(x)), (var + self.eps).sqrt()
        if v is None:
            affine_into(y, wide * per_channel(1 / batch, x), weight, bias)
            return ()
        mean, instance = self._moments(wide)
        std = affine_sample(wide, v, instance).clamp_(min=per_channel(batch, x))
        affine_into(y, torch.div(wide, std, out=std), weight, bias)
        return (mean, instance) if small_beside(x) else ()

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        v: Tensor | None,
        var: Tensor,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """With ``y = x / max(batch, own)``, ``own = v * x + instance``, and ``excess`` where the latter is larger."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        batch = (var + self.eps).sqrt()
        if v is None:
            gain = 1 / batch if weight is None else weight / batch
            dx, product, d_bias = affine_backward(dy, wide, gain)
            d_var = -product * gain / (2 * batch.square())
            d_weight = None if weight is None else product / batch
            return dx.to(x.dtype), [d_weight, None if bias is None else d_bias, None, d_var]
        mean, instance = kept or self._moments(wide)
        own = affine_sample(wide, v, instance)
        inverse = own.clamp(min=per_channel(batch, x)).reciprocal_()
        y = wide * inverse
        gain = torch.ones_like(batch) if weight is None else weight
        dz, d_weight, d_bias = affine_backward(dy, y, gain)
        dz.mul_(inverse)
        d_std = y.mul_(dz)  # of -std
        d_excess = torch.ops.aten.threshold_backward(d_std, own.sub_(per_channel(batch, x)), 0)
        of_instance = per_sample_sum(d_excess)
        d_var = (of_instance.sum(0) - per_channel_sum(d_std)) / (2 * batch)
        d_v = -per_channel_sum(torch.mul(d_excess, wide, out=inverse))
        # y's own x, then x within the excess, then the instance's variance
        dx = dz.addcmul_(d_excess, per_channel(v, x), value=-1)
        if x.ndim > 2:
            slope = -of_instance / instance / positions(x)
            dx.addcmul_(wide, spread(slope, x))
            dx = torch.sub(dx, spread(slope * mean, x), out=dx if out is None else out)
        return dx.to(x.dtype), [None if weight is None else d_weight, None if bias is None else d_bias, d_v, d_var]

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample's means and standard deviations, (N, C)."""
        mean, var = moments(x, per_sample=True)
        return mean, (var + self.eps).sqrt()
