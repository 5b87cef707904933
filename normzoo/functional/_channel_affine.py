"""One engine for all layers that scale and shift each channel by a function of its mean and variance.

Such a layer is ``y = (x - mean) * scale + shift``, where scale and shift follow from the moments by a rule on small
tensors. A rule is written once, in differentiable PyTorch; the engine does the passes over the large tensors, merges
statistics over ranks, and keeps nothing for backward but the input and the moments.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from normzoo._shapes import positions, spread, statistics_dtype
from normzoo.functional._distributed import all_reduce_sum, several_ranks
from normzoo.functional._moments import batch_moments, combine, joined, moments, projections, scale_shift, unbiased
from normzoo.functional._pieces import by_formula, gradients, gradients_of_formula, pieces, summed, traced


class Rule(Protocol):
    """``(*moments, *tensors) -> (scale, shift)``, a pure function of small tensors.

    The moments are mean and biased variance of each sample's channels, both (N, C), or of the batch's, (1, C), or all
    four in this order. Scale and shift have the shape of the first mean, which is what is subtracted from the input.
    A rule may have a method ``vjp(inputs, d_scale, d_shift)`` that returns the gradient for each input faster than
    autograd does. A rule that is a frozen dataclass has ``eq=False``: torch.compile of torch 2.12 hashes a callable
    object before its fields are set, which only the hash by identity survives.
    """

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Scale and shift."""


class Pointwise(Protocol):
    """``(y, *tensors) -> z``, a function of each value, with tensors of one value for each channel.

    A method ``vjp(y, dz, *tensors)`` may return the gradient for y and a list of those for the tensors.
    """

    def __call__(self, y: Tensor, *tensors: Any) -> Tensor:
        """The function."""


class ChannelAffineOptions(NamedTuple):
    """What to do, in one argument."""

    rule: Rule
    sample: bool
    batch: bool
    sync: bool
    after: Pointwise | None
    after_tensors: int  # how many of the last tensors are those of ``after``


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
    x: Tensor,
    rule: Rule,
    *tensors: Tensor | None,
    sample: bool = False,
    batch: bool = False,
    sync: bool = False,
    after: Pointwise | None = None,
    after_tensors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, list[Statistics]]:
    """``z = after((x - mean) * scale + shift)`` with ``scale, shift = rule(*moments, *tensors)``.

    Args:
        x: (N, C, ...); not empty unless ``sync``.
        rule: see :class:`Rule`.
        *tensors: what else the rule takes and receives gradients for, or None.
        sample: take the moments of each sample's channels.
        batch: take those of the batch's channels.
        sync: over all ranks of the default process group; with it there is no second derivative.
        after: an activation, see :class:`Pointwise`; its input is computed again in backward.
        after_tensors: what ``after`` takes and receives gradients for.

    Returns:
        z, of the shape, dtype and memory format of ``x``, and the statistics asked for.
    """
    sync = sync and several_ranks()
    options = ChannelAffineOptions(rule, sample, batch, sync, after, len(after_tensors))
    run = plain_channel_affine if traced(x) and not sync else _apply
    y, *held = run(x, options, *tensors, *after_tensors)
    statistics = []
    if sample:
        statistics.append(Statistics(held[0], held[1], positions(x)))
    if batch:
        count = held[-1] if sync else x.numel() // x.shape[1]
        mean, var = held[2 * sample : 2 * sample + 2]
        statistics.append(Statistics(mean[0], var[0], count))
    return y, statistics


def plain_channel_affine(x: Tensor, options: ChannelAffineOptions, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The formula in differentiable operations."""
    wide = x.to(statistics_dtype(x))
    space = list(range(2, x.ndim))
    measured: list[Tensor] = []
    for dims in [space] * options.sample + [[0, *space]] * options.batch:
        mean = wide.mean(dims, keepdim=True) if dims else wide
        var = (wide - mean).square().mean(dims, keepdim=True) if dims else torch.zeros_like(wide)
        measured += [mean.flatten(1), var.flatten(1)]
    of_rule, of_after = _split(options, tensors)
    scale, shift = options.rule(*measured, *of_rule)
    y = (wide - spread(measured[0], x)) * spread(scale, x) + spread(shift, x)
    if options.after is not None:
        y = options.after(y, *of_after)
    return y.to(x.dtype), *(m.detach() for m in measured)


@torch.compiler.disable
def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    return _ChannelAffine.apply(*arguments)


class _ChannelAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: ChannelAffineOptions, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        y = torch.empty_like(x)
        measured = list(moments(x, per_sample=True, scratch=y)) if options.sample else []
        extra: list[Tensor] = []
        if options.batch and options.sample and not options.sync:
            mean = measured[0].mean(0, keepdim=True)
            measured += [mean, (measured[1] + (measured[0] - mean).square()).mean(0, keepdim=True)]
        elif options.batch:
            mean, var, count = batch_moments(x, options.sync)
            measured += [mean, var]
            extra = [count] if isinstance(count, Tensor) else []
        of_rule, of_after = _split(options, tensors)
        scale, shift = options.rule(*measured, *of_rule)
        ctx.save_for_backward(x, *measured, *extra, *tensors)
        ctx.options = options
        ctx.mark_non_differentiable(*measured, *extra)
        if options.after is None:
            scale_shift(x, scale, _level(measured[0], scale, shift), into=y)
        else:
            y = options.after(scale_shift(x, scale, _level(measured[0], scale, shift)), *of_after)
        return y.to(x.dtype), *measured, *extra

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        options: ChannelAffineOptions = ctx.options
        x, *rest = ctx.saved_tensors
        held = 2 * (options.sample + options.batch)
        measured, tensors = rest[:held], rest[held + options.sync :]
        needs = ctx.needs_input_grad
        if by_formula(dy, sync=options.sync):
            dx, *d_tensors = gradients_of_formula(
                lambda x, *tensors: plain_channel_affine(x, options, *tensors)[0],
                [x, *tensors],
                (needs[0], *needs[2:]),
                dy,
            )
            return dx, None, *d_tensors
        of_rule, of_after = _split(options, tensors)
        d_after: list[Tensor] = []
        if options.after is not None:
            scale, shift = options.rule(*measured, *of_rule)
            dy, d_after = _through(options.after, x, scale, _level(measured[0], scale, shift), dy, of_after)
        dx = torch.empty_like(x)
        d_scale, d_shift = projections(dy, x, measured[0], per_sample=options.sample, scratch=dx)
        wanted = (True,) * held + needs[2 : 2 + len(of_rule)]
        scale, found = _pull_back(options.rule, [*measured, *of_rule], wanted, d_scale, d_shift)
        d_tensors = [*found[held:], *d_after]
        if not needs[0] and not options.sync:
            return None, None, *d_tensors
        # y = (x - mean) * scale + shift, where the moments follow from x
        first, *others = found[:held]
        first = (-d_shift).mul_(scale) if first is None else torch.addcmul(first, scale, d_shift, value=-1)
        d_measured = [
            first,
            *(torch.zeros_like(m) if d is None else d for m, d in zip(measured[1:], others, strict=True)),
        ]
        slope = level = torch.zeros_like(measured[-1])
        if options.sample:
            slope, level = _of_moments(measured[0], d_measured[0], d_measured[1], positions(x))
        if options.batch:
            d_batch, count = d_measured[-2:], x.numel() // x.shape[1]
            if options.sync:
                d_batch, count = all_reduce_sum(d_batch), rest[held]
            more = _of_moments(measured[-2], d_batch[0], d_batch[1], count)
            slope, level = slope + more[0], level + more[1]
        return combine(dy, scale, x, slope, level, dx), None, *d_tensors


def _split(options: ChannelAffineOptions, tensors: tuple[Tensor | None, ...] | list[Tensor | None]) -> tuple[Any, Any]:
    """The tensors of the rule and those of what comes after."""
    cut = len(tensors) - options.after_tensors
    return tensors[:cut], tensors[cut:]


def _level(mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What is added to the scaled input."""
    return torch.addcmul(shift, mean, scale, value=-1)


def _through(
    after: Pointwise, x: Tensor, scale: Tensor, level: Tensor, dz: Tensor, tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients for the input of ``after``, which is computed again piece by piece, and for its tensors."""
    parts, found = pieces(x), []
    for rows in parts:
        a, b = (v[rows] if v.shape[0] > 1 else v for v in (scale, level))
        y = scale_shift(x[rows], a, b)
        if hasattr(after, "vjp"):
            found.append(after.vjp(y, dz[rows].to(y.dtype), *tensors))
        else:
            leaves = [t.detach().requires_grad_() for t in (y, *tensors)]
            with torch.enable_grad():
                z = after(*leaves)
            gave = zip(leaves, gradients(z, leaves, dz[rows].to(z.dtype)), strict=True)
            dy, *of_tensors = (torch.zeros_like(t) if g is None else g for t, g in gave)
            found.append((dy, of_tensors))
    pieces_of_dy, shares = zip(*found, strict=True)
    return joined(pieces_of_dy), [summed(share) for share in zip(*shares, strict=True)]


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
