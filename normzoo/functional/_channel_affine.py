"""One engine for all layers that scale and shift each channel by a function of its mean and variance.

Such a layer is ``y = (x - mean) * scale + shift``, where scale and shift follow from the moments by a rule on small
tensors. A rule is written once, in differentiable PyTorch; the engine does the passes over the large tensors, merges
statistics over ranks, and keeps nothing for backward but the input and the moments.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from normzoo._shapes import spread, statistics_dtype
from normzoo.functional._distributed import all_reduce_sum, several_ranks
from normzoo.functional._moments import batch_moments, combine, moments, projections, scale_shift, unbiased
from normzoo.functional._pieces import differentiable_gradients, gradients, traced


class Rule(Protocol):
    """``(*moments, *tensors) -> (scale, shift)``, a pure function of small tensors.

    The moments are mean and biased variance of each sample's channels, both (N, C), or of the batch's, (1, C), or all
    four in this order. Scale and shift have the shape of the first mean, which is what is subtracted from the input.
    A rule may have a method ``vjp(inputs, d_scale, d_shift)`` that returns the gradient for each input faster than
    autograd does.
    """

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Scale and shift."""


class Statistics(NamedTuple):
    """What a layer measured: of samples (N, C) or of the batch (C,), without gradient; each of ``number`` values."""

    mean: Tensor
    var: Tensor
    number: int | Tensor

    @property
    def unbiased_var(self) -> Tensor:
        """The variance over count - 1."""
        return unbiased(self.var, self.number)


def channel_affine(
    x: Tensor, rule: Rule, *tensors: Tensor | None, sample: bool = False, batch: bool = False, sync: bool = False
) -> tuple[Tensor, list[Statistics]]:
    """``y = (x - mean) * scale + shift`` with ``scale, shift = rule(*moments, *tensors)``.

    Args:
        x: (N, C, ...); not empty unless ``sync``.
        rule: see :class:`Rule`.
        *tensors: what else the rule takes and receives gradients for, or None.
        sample: take the moments of each sample's channels.
        batch: take those of the batch's channels.
        sync: over all ranks of the default process group; with it there is no second derivative.

    Returns:
        y, of the shape, dtype and memory format of ``x``, and the statistics asked for.
    """
    sync = sync and several_ranks()
    plan = (sample, batch, sync)
    if not sync and traced(x):
        y, *held = _plain(x, rule, plan, tensors)
    else:
        y, *held = _apply(x, rule, plan, *tensors)
    statistics = []
    if sample:
        statistics.append(Statistics(held[0], held[1], x[0, 0].numel()))
    if batch:
        count = held[-1] if sync else x.numel() // x.shape[1]
        mean, var = held[2 * sample : 2 * sample + 2]
        statistics.append(Statistics(mean[0], var[0], count))
    return y, statistics


def _plain(
    x: Tensor, rule: Rule, plan: tuple[bool, bool, bool], tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """The formula in differentiable operations."""
    sample, batch, _ = plan
    wide = x.to(statistics_dtype(x))
    space = list(range(2, x.ndim))
    measured: list[Tensor] = []
    for dims in [space] * sample + [[0, *space]] * batch:
        mean = wide.mean(dims, keepdim=True) if dims else wide
        var = (wide - mean).square().mean(dims, keepdim=True) if dims else torch.zeros_like(wide)
        measured += [mean.flatten(1), var.flatten(1)]
    scale, shift = rule(*measured, *tensors)
    y = (wide - spread(measured[0], x)) * spread(scale, x) + spread(shift, x)
    return y.to(x.dtype), *(m.detach() for m in measured)


class _ChannelAffine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rule: Rule, plan: tuple[bool, bool, bool], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        sample, batch, sync = plan
        measured = list(moments(x, per_sample=True)) if sample else []
        extra: list[Tensor] = []
        if batch and sample and not sync:
            mean = measured[0].mean(0, keepdim=True)
            measured += [mean, (measured[1] + (measured[0] - mean).square()).mean(0, keepdim=True)]
        elif batch:
            mean, var, count = batch_moments(x, sync)
            measured += [mean, var]
            extra = [count] if isinstance(count, Tensor) else []
        scale, shift = rule(*measured, *tensors)
        ctx.save_for_backward(x, *measured, *extra, *tensors)
        ctx.rule, ctx.plan = rule, plan
        ctx.mark_non_differentiable(*measured, *extra)
        y = scale_shift(x, scale, torch.addcmul(shift, measured[0], scale, value=-1)).to(x.dtype)
        return y, *measured, *extra

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        sample, batch, sync = ctx.plan
        x, *rest = ctx.saved_tensors
        held = 2 * (sample + batch)
        measured, tensors = rest[:held], rest[held + sync :]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            if sync:
                raise RuntimeError("a layer with sync=True has no second derivative; use sync=False with create_graph")
            dx, *d_tensors = differentiable_gradients(
                lambda x, *tensors: _plain(x, ctx.rule, ctx.plan, tensors)[0], [x, *tensors], (needs[0], *needs[3:]), dy
            )
            return dx, None, None, *d_tensors
        d_scale, d_shift = projections(dy, x, measured[0], per_sample=sample)
        scale, found = _pull_back(ctx.rule, [*measured, *tensors], (True,) * held + needs[3:], d_scale, d_shift)
        d_measured = [torch.zeros_like(m) if d is None else d for m, d in zip(measured, found, strict=False)]
        if not needs[0] and not sync:
            return None, None, None, *found[held:]
        # y = (x - mean) * scale + shift, where the moments follow from x
        d_measured[0] = torch.addcmul(d_measured[0], scale, d_shift, value=-1)
        slope = level = torch.zeros_like(measured[-1])
        if sample:
            slope, level = _of_moments(measured[0], d_measured[0], d_measured[1], x[0, 0].numel())
        if batch:
            d_batch, count = d_measured[-2:], x.numel() // x.shape[1]
            if sync:
                d_batch, count = all_reduce_sum(d_batch), rest[held]
            more = _of_moments(measured[-2], d_batch[0], d_batch[1], count)
            slope, level = slope + more[0], level + more[1]
        return combine(dy, scale, x, slope, level), None, None, *found[held:]


@torch.compiler.disable
def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    return _ChannelAffine.apply(*arguments)


def _pull_back(
    rule: Rule, inputs: list[Tensor | None], needed: tuple[bool, ...], d_scale: Tensor, d_shift: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The scale, and the gradient for each of the rule's inputs."""
    if hasattr(rule, "vjp"):
        return rule.vjp(inputs, d_scale, d_shift)
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        scale, shift = rule(*leaves)
    found = gradients((scale, shift), leaves, (d_scale, d_shift))
    return scale.detach(), list(found)


def _of_moments(mean: Tensor, d_mean: Tensor, d_var: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Of the input's gradient ``slope * x + level`` through a mean and a variance of ``count`` values."""
    slope = d_var * (2 / count)
    return slope, torch.addcmul(d_mean / count, slope, mean, value=-1)
