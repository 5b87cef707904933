"""Batch renormalization (Ioffe 2017, arXiv 1702.03275)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from normzoo._shapes import scalar_dtype, statistics_dtype
from normzoo.functional._channel_affine import ChannelAffineOptions, channel_affine, plain_channel_affine
from normzoo.functional._distributed import several_ranks
from normzoo.functional._moments import batch_statistics, refuse_one_value
from normzoo.functional._pieces import by_formula, gradients_of_formula, traced
from normzoo.functional._recomputation import FirstPass, Recomputation, in_backward, replay
from normzoo.functional.batch import batch_norm, update_running


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
        a number, or a 0-d float64 tensor on the device of ``step`` (float32 where the device has no float64).

    Example:
        >>> piecewise_linear([(5000, 1.0), (40000, 3.0)], torch.tensor(22500)).item()
        2.0
        >>> piecewise_linear([(5000, 1.0), (40000, 3.0)], 60000)
        3.0
    """
    first, segments = points[0][1], list(itertools.pairwise(points))
    if not isinstance(step, Tensor):
        return first + sum((v1 - v0) * min(max((step - s0) / (s1 - s0), 0.0), 1.0) for (s0, v0), (s1, v1) in segments)
    step = step.to(scalar_dtype(step.device))
    value = torch.full_like(step, first)
    for (s0, v0), (s1, v1) in segments:
        value = value + (v1 - v0) * ((step - s0) / (s1 - s0)).clamp(0.0, 1.0)
    return value


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

    Raises:
        ValueError: when training on one value per channel, whose variance is undefined.

    Source: Ioffe 2017, arXiv 1702.03275, algorithm 1.
    """
    if not training or (x.numel() == 0 and not (sync and several_ranks())):
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    options = _RenormOptions(eps, r_max, d_max, momentum, average, None if traced(x) else replay(running_mean))
    dtype = statistics_dtype(x)
    alike = running_mean.dtype == running_var.dtype == dtype
    alike = alike and (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype)
    if not alike or traced(x) or (sync and several_ranks()):
        return _plain(x, running_mean, running_var, weight, bias, options, sync)
    refuse_one_value(x, "batch renormalization")
    return _BatchRenorm.apply(x, weight, bias, running_mean, running_var, options)


class _RenormOptions(NamedTuple):
    eps: float
    r_max: Any
    d_max: Any
    momentum: Any
    average: str
    repeat: FirstPass | Recomputation | None

    def to(self, dtype: torch.dtype) -> _RenormOptions:
        """With tensors of that dtype."""
        r_max, d_max, momentum = (v.to(dtype) if isinstance(v, Tensor) else v for v in self[1:4])
        return self._replace(r_max=r_max, d_max=d_max, momentum=momentum)

    def corrections(self, std: Tensor, offset: Tensor, sigma: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """R and d of a batch's standard deviation, its mean less the running one, and the running deviation.

        In a recomputation they are those of the first pass, which is known by the batch's deviation and ``mean``.
        """
        r = torch.clamp(torch.div(std, sigma), 1 / self.r_max, self.r_max)
        d = torch.clamp(torch.div(offset, sigma), -self.d_max, self.d_max)
        if self.repeat is None:
            return r, d
        r, d = self.repeat(std.square() + mean.square(), r, d)
        return r, d

    def update(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        var: Tensor,
        std: Tensor,
        offset: Tensor,
        sigma: Tensor,
        eps: float | Tensor,
    ) -> None:
        """Move the running statistics towards the batch's, of which ``offset`` is the mean less the running one.

        Inside a backward pass they stay.
        """
        if in_backward():
            return
        if self.average == "std":
            moved = _towards(sigma, _less(std, sigma), self.momentum)
            # sigma^2 >= eps up to rounding, since both averaged terms are at least sqrt(eps)
            running_var.copy_(torch.clamp(_less(torch.mul(moved, moved), eps), 0.0, math.inf))
        else:
            update_running(running_var, var, self.momentum)
        running_mean.copy_(_towards(running_mean, offset, self.momentum))


# Calls on small tensors cost what it takes to bring their code into the processor's cache: a few kinds of call, each in
# one form, take half the time of the many that would read better. A number as an argument costs a tensor.


def _less(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.add(a, b, alpha=-1)


def _towards(start: Tensor, way: Tensor, share: float | Tensor) -> Tensor:
    """``start + share * way``."""
    if isinstance(share, Tensor):
        return torch.add(start, torch.mul(way, share))
    return torch.add(start, way, alpha=share)


def _plain(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: _RenormOptions,
    sync: bool,
) -> Tensor:
    """The formula in differentiable operations, or by the engine that merges statistics over ranks."""
    options = options.to(statistics_dtype(x))
    mu = running_mean.to(statistics_dtype(x), copy=True)  # autograd keeps it, and the running mean moves
    sigma = (running_var.to(mu.dtype) + options.eps).sqrt()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        mu, sigma, r_max, d_max = (
            _kept(t) if isinstance(t, Tensor) else t for t in (mu, sigma, options.r_max, options.d_max)
        )
        options = options._replace(r_max=r_max, d_max=d_max)
    y, (found,) = channel_affine(x, _Renorm(options), weight, bias, mu, sigma, batch=True, sync=sync)
    refuse_one_value(x, "batch renormalization", found.number)
    with torch.no_grad():
        std = (found.var + options.eps).sqrt()
        options.update(running_mean, running_var, found.var, std, found.mean - mu, sigma, options.eps)
    return y


@torch.library.custom_op("normzoo::kept", mutates_args=())
def _kept(value: Tensor) -> Tensor:
    """A copy that a compiled backward pass does not compute again.

    Out of buffers it would, and find them moved on: https://github.com/pytorch/pytorch/pull/197039. An operator with an
    effect is not computed again in compiled activation checkpoints either.

    Raises:
        RuntimeError: where a checkpoint that is not compiled recomputes what is.
    """
    if in_backward():
        raise RuntimeError(
            "compiled batch renormalization cannot be recomputed by an activation checkpoint outside of torch.compile: "
            "compile the model with its checkpoints, or not the layers in them"
        )
    return value.clone()


_kept.register_effect(torch.library.EffectType.ORDERED)  # type: ignore[attr-defined,unused-ignore]


@_kept.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


@dataclass
class _Renorm:
    """The rule of batch renormalization, whose corrections stay those that it was first called with."""

    options: _RenormOptions
    corrections: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mu: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.corrections is None:
            with torch.no_grad():
                self.corrections = self.options.corrections((var + self.options.eps).sqrt(), mean - mu, sigma, mean)
        return _Corrected(self.options.eps, *self.corrections)(mean, var, weight, bias)


@dataclass(frozen=True, eq=False)
class _Corrected:
    """The rule for given corrections."""

    eps: float
    r: Tensor
    d: Tensor

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, shift = self.r / (var + self.eps).sqrt(), self.d
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        return scale, shift if bias is None else shift + bias


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


class _BatchRenorm(torch.autograd.Function):
    """Batch normalization's kernels, with weight * r for its weight and weight * d + bias for its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        options: _RenormOptions,
    ) -> Tensor:
        mean, var = batch_statistics(x)
        eps = torch.scalar_tensor(options.eps, dtype=var.dtype)  # counts as a number: no device waits for it
        std, sigma = torch.sqrt(torch.add(var, eps)), torch.sqrt(torch.add(running_var, eps))
        offset = _less(mean, running_mean)
        r, d = options.corrections(std, offset, sigma, mean)
        options.update(running_mean, running_var, var, std, offset, sigma, eps)
        scale, shift = (r, d) if weight is None else (torch.mul(weight, r), torch.mul(weight, d))
        shift = shift if bias is None else torch.add(shift, bias)
        rstd = torch.div(torch.scalar_tensor(1.0, dtype=var.dtype), std)
        y = torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, options.eps)[0]
        ctx.save_for_backward(x, mean, rstd, r, d, scale, weight, bias)
        ctx.eps, ctx.repeat = options.eps, options.repeat
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, r, d, scale, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if by_formula(dy):
            options = ChannelAffineOptions(
                _Corrected(ctx.eps, r, d), sample=False, batch=True, sync=False, after=None, after_tensors=0
            )
            dx, d_weight, d_bias = gradients_of_formula(
                lambda x, *affine: plain_channel_affine(x, options, *affine)[0],
                [x, weight, bias],
                needs[:3],
                dy,
            )
            return dx, d_weight, d_bias, None, None, None
        dx, d_scale, d_shift = _batch_norm_backward(
            dy, x, scale, None, None, mean, rstd, True, ctx.eps, [needs[0], True, True]
        )
        d_weight = None if weight is None else torch.add(torch.mul(d_scale, r), torch.mul(d_shift, d))
        return dx if needs[0] else None, d_weight, None if bias is None else d_shift, None, None, None
