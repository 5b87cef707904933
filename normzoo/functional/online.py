"""Online normalization (Chiley et al. 2019, arXiv 1905.05894)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normzoo._shapes import per_channel, positions, statistics_dtype
from normzoo.functional._moments import combine, moments, projections, scale_shift
from normzoo.functional._pieces import by_sample, pieces, refuse_batched, refuse_jit_trace, traced, without_autocast
from normzoo.functional._recomputation import FirstPass, Recomputation, in_backward, replay


def online_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    drift_mean: Tensor,
    drift_scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 1e-3,
    momentum_backward: float = 1e-2,
    eps: float = 1e-5,
    compensation: str | None = None,
    clamp_value: float = 5.0,
) -> Tensor:
    """Normalization of each sample by running statistics of the samples before it.

    Training, for each sample n in order, with mu_n and var_n (biased) over space, and r, s the update rates::

        z_n = (x_n - m) / sqrt(v + eps);  y_n = z_n * weight + bias
        v <- (1 - r) * v + r * var_n + r * (1 - r) * (mu_n - m)^2
        m <- m + r * (mu_n - m)

    The backward is the authors' control process, not the gradient of the output; with g_n the gradient for z_n::

        t_n = g_n - s * b * z_n;                          b <- b + mean(t_n * z_n)
        dx_n = t_n / sqrt(v + eps) - s * a;               a <- a + mean(dx_n)

    Not training, it is batch normalization by m and v. Last comes the compensation: y is clamped to
    [-clamp_value, clamp_value] (``"clamp"``), or each sample divided by the root of its mean square (``"layer"``).

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,), m; updated in place when training.
        running_var: (C,), v; updated in place when training.
        drift_mean: (C,), a; updated in place by the backward pass.
        drift_scale: (C,), b; updated in place by the backward pass.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        training: normalize as in training.
        momentum: r, the update rate for each sample.
        momentum_backward: s.
        eps: added to the variance, and to the mean square of ``"layer"``.
        compensation: ``"clamp"``, ``"layer"`` or None.
        clamp_value: bound of ``"clamp"``.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Chiley et al. 2019, arXiv 1905.05894, equations 8-12, in the form of the authors' code.
    """
    compensate = {"clamp": _Clamp(clamp_value), "layer": _LayerScale(eps), None: None}[compensation]
    if training:
        refuse_jit_trace("online normalization")
        settings = _Settings(momentum, momentum_backward, eps, compensate, None)
        return _apply(x, running_mean, running_var, drift_mean, drift_scale, weight, bias, settings)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return by_sample(_Fixed(compensate), x, scale, shift if bias is None else shift + bias)


def scan(start: Tensor, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each step of ``state <- kept * state + new``, (N, C), and the last, (C,).

    Steps are joined pairwise, log2(N) times over, in place of one after the other.

    Args:
        start: (C,).
        kept: (N, C), the factor of each step.
        new: (N, C), what each step adds.

    Source: Hillis & Steele 1986, Communications of the ACM 29(12).
    """
    reach = 1
    while reach < len(kept):
        new = torch.cat([new[:reach], torch.addcmul(new[reach:], kept[reach:], new[:-reach])])
        kept = torch.cat([kept[:reach], kept[reach:] * kept[:-reach]])
        reach *= 2
    after = torch.addcmul(new, kept, start)
    return torch.cat([start[None], after[:-1]]), after[-1]


def recurrence(start: Tensor, values: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The states of ``state <- decay * state + value``, before each value and after the last.

    Args:
        start: (C,).
        values: (N, C).
        decay: from 0 to 1.

    Returns:
        (N, C) and (C,).

    Example:
        >>> before, after = recurrence(torch.tensor([1.0]), torch.tensor([[4.0], [0.0]]), 0.5)
        >>> before.tolist(), after.tolist()
        ([[1.0], [4.5]], [2.25])
    """
    before = []
    with without_autocast(values):
        for block in values.split(256):
            index = torch.arange(block.shape[0] + 1, device=block.device)
            lag = index[:, None] - index
            weights = torch.where(lag >= 0, decay ** lag.clamp(min=0).to(block.dtype), 0.0)
            states = weights @ torch.cat([start[None], block])
            before.append(states[:-1])
            start = states[-1]
    return torch.cat(before), start


class _Settings(NamedTuple):
    momentum: float
    momentum_backward: float
    eps: float
    compensate: _Clamp | _LayerScale | None
    repeat: FirstPass | Recomputation | None


@torch.compiler.disable
def _apply(x: Tensor, running_mean: Tensor, *others: Any) -> Tensor:
    *tensors, settings = others
    repeat = None if traced(x) else replay(running_mean)
    return _OnlineNorm.apply(x, running_mean, *tensors, settings._replace(repeat=repeat))


class _OnlineNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        drift_mean: Tensor,
        drift_scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        rate, dtype = settings.momentum, statistics_dtype(x)
        of_sample, var_of_sample = moments(x, per_sample=True)
        start_mean, start_var = running_mean.to(dtype), running_var.to(dtype)
        if settings.repeat is not None:
            square = (var_of_sample + of_sample.square()).mean(0)
            start_mean, start_var = settings.repeat(square, start_mean, start_var)
        mean, last_mean = recurrence(start_mean, rate * of_sample, 1 - rate)
        news = rate * var_of_sample + rate * (1 - rate) * (of_sample - mean).square()
        var, last_var = recurrence(start_var, news, 1 - rate)
        if not in_backward():
            running_mean.copy_(last_mean)
            running_var.copy_(last_var)
        rstd = (var + settings.eps).rsqrt()
        ctx.drift_mean, ctx.drift_scale, ctx.settings = drift_mean, drift_scale, settings
        ctx.has_bias = bias is not None
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale
        shift = shift if bias is None else shift + bias
        compensated = settings.compensate is not None
        ctx.save_for_backward(x, of_sample, var_of_sample, mean, rstd, weight, shift if compensated else None)
        y = scale_shift(x, scale, shift)
        if settings.compensate is not None:
            settings.compensate.overwrite(y)
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(dy, "online normalization")
        x, of_sample, var_of_sample, mean, rstd, weight, shift = ctx.saved_tensors
        rate, count = ctx.settings.momentum_backward, positions(x)
        if shift is not None:
            scale, dz = rstd if weight is None else rstd * weight, dy
            dy = torch.empty_like(x, dtype=rstd.dtype)
            for rows in pieces(x):
                y = scale_shift(x[rows], scale[rows], shift[rows])
                dy[rows] = ctx.settings.compensate.vjp(y, dz[rows].to(y.dtype))
        dot, total = projections(dy, x, of_sample, per_sample=True)
        z = (of_sample - mean) * rstd  # the mean of the normalized sample, and of its square
        z_squared = var_of_sample * rstd.square() + z.square()
        dot = dot * rstd + total * z
        gain = torch.ones_like(rstd[0]) if weight is None else weight.to(rstd.dtype)
        # b <- b + mean(g * z) - rate * b * mean(z^2), whose factor differs from sample to sample
        before, after = scan(ctx.drift_scale.to(rstd.dtype), 1 - rate * z_squared, gain * dot / count)
        ctx.drift_scale.copy_(after)
        along = rate * before
        level = (gain * total / count - along * z) * rstd
        before, after = recurrence(ctx.drift_mean.to(rstd.dtype), level, 1 - rate)
        ctx.drift_mean.copy_(after)
        slope = -along * rstd.square()
        dx = combine(dy, gain * rstd, x, slope, -slope * mean - rate * before)
        d_weight = None if weight is None else dot.sum(0)
        return dx, None, None, None, None, d_weight, total.sum(0) if ctx.has_bias else None, None


@dataclass(frozen=True, eq=False)
class _Clamp:
    bound: float

    def __call__(self, y: Tensor) -> Tensor:
        return y.clamp(-self.bound, self.bound)

    def overwrite(self, y: Tensor) -> None:
        """Apply to ``y`` in place."""
        y.clamp_(-self.bound, self.bound)

    def vjp(self, y: Tensor, dz: Tensor) -> Tensor:
        """The gradient where nothing was cut off."""
        bound, infinity = torch.tensor([self.bound, math.inf], dtype=y.dtype)
        beyond = torch.nextafter(bound, infinity).item()  # the kernel cuts off at its bounds too
        return torch.ops.aten.hardtanh_backward(dz, y, -beyond, beyond)


@dataclass(frozen=True, eq=False)
class _LayerScale:
    eps: float

    def __call__(self, y: Tensor) -> Tensor:
        return y * self._scale(y)

    def overwrite(self, y: Tensor) -> None:
        """Apply to ``y`` in place."""
        y.mul_(self._scale(y))

    def _scale(self, y: Tensor) -> Tensor:
        return (y.square().mean(tuple(range(1, y.ndim)), keepdim=True) + self.eps).rsqrt()

    def vjp(self, y: Tensor, dz: Tensor) -> Tensor:
        """Less the part along the output."""
        scale = self._scale(y)
        along = (y * dz).mean(tuple(range(1, y.ndim)), keepdim=True)
        return (dz - y * (along * scale.square())) * scale


@dataclass(frozen=True, eq=False)
class _Fixed:
    """Evaluation: a scale and shift of each channel, then the compensation."""

    compensate: _Clamp | _LayerScale | None

    def __call__(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = x.to(scale.dtype) * per_channel(scale, x) + per_channel(shift, x)
        return (y if self.compensate is None else self.compensate(y)).to(x.dtype)
