"""Normalization by statistics of samples and batch together: switchable, batch-instance and batch group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import positions
from normzoo.functional._channel_affine import Statistics, channel_affine
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import refuse_one_value
from normzoo.functional._pieces import refuse_jit_trace
from normzoo.functional.batch import batch_norm, update_running


def switchable_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    unbiased_instance: bool = False,
    sync: bool = False,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, with learnt mixtures of three means and variances.

    ``mean = sum_k softmax(mean_weight)_k * mean_k`` and ``var = sum_k softmax(var_weight)_k * var_k`` over instance,
    layer and batch statistics, in this order; those of the batch are the running ones when not training.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training, towards the biased variance.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        mean_weight: (3,), logits of the mixture of means.
        var_weight: (3,), logits of the mixture of variances.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the variance.
        unbiased_instance: divide the instance variance by HW - 1, as the authors' code for maps does.
        sync: when training, take the batch's statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training on one value per channel, whose variance is undefined; with ``unbiased_instance``, on
            input of one position, and together with ``sync``.

    Source: Luo et al. 2019, arXiv 1806.10779, equations 3-5.
    """
    space = positions(x)
    if unbiased_instance and space == 1:
        raise ValueError(
            f"an unbiased instance variance needs more than one position; the input has shape {tuple(x.shape)}"
        )
    if unbiased_instance and sync:
        raise ValueError("an unbiased instance variance is for one rank's weights; it cannot go with sync=True")
    factor = space / (space - 1) if unbiased_instance else 1.0
    learnt = (mean_weight, var_weight, weight, bias)
    rule = _Switch(eps, factor, training)
    y, held = _with_batch_statistics(x, rule, running_mean, running_var, learnt, training, sync)
    if held:
        of_samples, of_batch = held
        refuse_one_value(x, "switchable normalization", of_batch.number)
        update_running(running_mean, of_batch.mean, momentum)
        inherited = (factor - 1) * of_samples.var.mean(0) if unbiased_instance else 0
        update_running(running_var, of_batch.var + inherited, momentum)
    return y


def batch_instance_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = (gate * x_batch + (1 - gate) * x_instance) * weight + bias``, of x normalized in two ways.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training, towards the unbiased variance.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        gate: (C,), share of batch normalization; values outside [0, 1] count as the nearer bound.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to both variances.
        sync: when training, take the batch's statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training on one value per channel, whose variance is undefined.

    Source: Nam & Kim 2018, arXiv 1805.07925, equations 1-4.
    """
    if training:
        refuse_jit_trace("batch-instance normalization")
    rule = _BatchInstance(eps)
    y, held = _with_batch_statistics(x, rule, running_mean, running_var, (gate, weight, bias), training, sync)
    if held:
        _, of_batch = held
        refuse_one_value(x, "batch-instance normalization", of_batch.number)
        update_running(running_mean, of_batch.mean, momentum)
        update_running(running_var, of_batch.unbiased_var, momentum)
    return y


def batch_group_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 32,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, statistics of groups of channels over batch and space.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,), each group's value repeated; updated in place when training.
        running_var: (C,), likewise; moved towards the unbiased variance.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        groups: number of groups of C / groups consecutive channels.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the variance.
        sync: when training, take the statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: if ``groups`` does not divide C; when training on one value per channel with as many groups.

    Source: Zhou et al. 2020, arXiv 2012.02782.
    """
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the channels: {groups} groups were asked of {channels} channels")
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    y, (held,) = channel_affine(x, GroupRule(groups, eps), weight, bias, batch=True, sync=sync)
    if groups == channels:  # else a group has several values in any case
        refuse_one_value(x, "batch group normalization with as many groups as channels", held.number)
    size = channels // groups
    mean, var = held.mean.view(groups, size), held.var.view(groups, size)
    whole = mean.mean(1, keepdim=True)
    of_group = Statistics(whole, (var + (mean - whole).square()).mean(1, keepdim=True), held.number * size)
    update_running(running_mean, of_group.mean.expand_as(mean).reshape(-1), momentum)
    update_running(running_var, of_group.unbiased_var.expand_as(mean).reshape(-1), momentum)
    return y


def bounded(gate: Tensor) -> Tensor:
    """``gate`` clipped to [0, 1], with the gradient of gradient descent that is projected onto these bounds.

    At and beyond a bound the gradient passes where a step along it leads back, and is 0 where it leads further out; the
    gradient of ``torch.clamp`` would hold a gate that once stepped over a bound there for good.

    Example:
        >>> gate = torch.tensor([0.5, 1.0, 1.0], requires_grad=True)
        >>> bounded(gate).backward(torch.tensor([1.0, 1.0, -1.0]))
        >>> gate.grad.tolist()
        [1.0, 1.0, 0.0]
    """
    return gate.clamp(0, 1) if torch._C._is_tracing() else _Bounded.apply(gate)


class _Bounded(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor) -> Tensor:
        return gate.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_gate: Tensor) -> Tensor:
        return _projected(d_gate, *ctx.saved_tensors)


def _projected(d_gate: Tensor, gate: Tensor) -> Tensor:
    """The gradient, 0 where it leads out of [0, 1]."""
    outward = ((gate >= 1) & (d_gate < 0)) | ((gate <= 0) & (d_gate > 0))
    return torch.where(outward, 0, d_gate)


def _with_batch_statistics(
    x: Tensor,
    rule: _Switch | _BatchInstance,
    running_mean: Tensor,
    running_var: Tensor,
    learnt: tuple[Tensor | None, ...],
    training: bool,
    sync: bool,
) -> tuple[Tensor, list[Statistics]]:
    """Apply a rule of sample and batch moments, with the running ones in place of the batch's when not training."""
    if not training:
        return channel_affine(x, rule, running_mean[None], running_var[None], *learnt, sample=True)[0], []
    return channel_affine(x, rule, *learnt, sample=True, batch=True, sync=sync)


@dataclass(frozen=True, eq=False)
class _Switch:
    """Mixtures of instance, layer and batch moments."""

    eps: float
    instance_factor: float
    of_this_batch: bool

    def __call__(
        self,
        mean: Tensor,
        var: Tensor,
        batch_mean: Tensor,
        batch_var: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        layer_mean = mean.mean(1, keepdim=True)
        if self.of_this_batch and self.instance_factor != 1:
            batch_var = batch_var + (self.instance_factor - 1) * var.mean(0, keepdim=True)
        var = var * self.instance_factor
        layer_var = (var + (mean - layer_mean).square()).mean(1, keepdim=True)
        of_mean, of_var = mean_weight.softmax(0).to(mean.dtype), var_weight.softmax(0).to(mean.dtype)
        # relative to the instance mean, so that large offsets cancel exactly
        offset = of_mean[1] * (mean - layer_mean) + of_mean[2] * (mean - batch_mean)
        rstd = (of_var[0] * var + of_var[1] * layer_var + of_var[2] * batch_var + self.eps).rsqrt()
        scale = rstd if weight is None else rstd * weight
        shift = offset * scale
        return scale, shift if bias is None else shift + bias

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As autograd's, by hand, in fewer calls."""
        mean, raw_var, batch_mean, raw_batch_var, mean_weight, var_weight, weight, bias = inputs
        samples, channels = mean.shape
        extra = self.instance_factor - 1 if self.of_this_batch else 0.0
        var = raw_var * self.instance_factor if self.instance_factor != 1 else raw_var
        batch_var = raw_batch_var + extra * raw_var.mean(0, keepdim=True) if extra else raw_batch_var
        of_layer, of_batch = mean - mean.mean(1, keepdim=True), mean - batch_mean
        layer_var = torch.addcmul(var, of_layer, of_layer).mean(1, keepdim=True)
        of_mean, of_var = mean_weight.softmax(0).to(mean.dtype), var_weight.softmax(0).to(mean.dtype)
        offset = torch.addcmul(of_mean[1] * of_layer, of_batch, of_mean[2])
        mixed = torch.addcmul(of_var[0] * var, of_var[1], layer_var).addcmul_(of_var[2], batch_var)
        rstd = mixed.add_(self.eps).rsqrt_()
        scale = rstd if weight is None else rstd * weight

        d_scale = torch.addcmul(d_scale, d_shift, offset)
        d_offset = d_shift * scale
        d_weight = None if weight is None else (d_scale * rstd).sum(0)
        d_mixed = (d_scale * scale).mul_(rstd).mul_(rstd).mul_(-0.5)
        by_sample, by_channel = d_mixed.sum(1, keepdim=True), d_mixed.sum(0, keepdim=True)
        d_batch_var = of_var[2] * by_channel
        through_layer = by_sample * (of_var[1] / channels)
        d_var = torch.addcmul(through_layer, d_mixed, of_var[0]) * self.instance_factor
        if extra:
            d_var = d_var + d_batch_var * (extra / samples)
        d_mean = torch.addcmul(2 * of_layer * through_layer, d_offset, of_mean[1] + of_mean[2])
        d_mean.sub_(d_offset.mean(1, keepdim=True).mul_(of_mean[1]))
        d_batch_mean = -of_mean[2] * d_offset.sum(0, keepdim=True)
        d_of_var = torch.stack([(d_mixed * var).sum(), (by_sample * layer_var).sum(), (by_channel * batch_var).sum()])
        of_offsets = (d_offset * of_layer).sum(), (d_offset * of_batch).sum()
        d_of_mean = torch.stack([torch.zeros_like(of_offsets[0]), *of_offsets])
        d_logits = [p * (d - (p * d).sum()) for p, d in ((of_mean, d_of_mean), (of_var, d_of_var))]
        d_bias = None if bias is None else d_shift.sum(0)
        return scale, [d_mean, d_var, d_batch_mean, d_batch_var, *d_logits, d_weight, d_bias]


@dataclass(frozen=True, eq=False)
class _BatchInstance:
    """Interpolation between batch and instance normalization."""

    eps: float

    def __call__(
        self,
        mean: Tensor,
        var: Tensor,
        batch_mean: Tensor,
        batch_var: Tensor,
        gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gate = bounded(gate)
        of_batch = gate * (batch_var + self.eps).rsqrt()
        scale = of_batch + (1 - gate) * (var + self.eps).rsqrt()
        shift = of_batch * (mean - batch_mean)
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        return scale, shift if bias is None else shift + bias

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As autograd's, by hand, in fewer calls."""
        mean, var, batch_mean, batch_var, raw_gate, weight, bias = inputs
        gate, batch_rstd, rstd = raw_gate.clamp(0, 1), (batch_var + self.eps).rsqrt_(), (var + self.eps).rsqrt_()
        offset, of_batch, rest = mean - batch_mean, gate * batch_rstd, 1 - gate
        scale = torch.addcmul(of_batch, rest, rstd)
        d_bias, d_weight = None if bias is None else d_shift.sum(0), None
        if weight is not None:
            d_weight = torch.addcmul(d_scale * scale, d_shift, of_batch * offset).sum(0)
            scale, d_scale, d_shift = scale * weight, d_scale * weight, d_shift * weight
        d_of_batch = torch.addcmul(d_scale, d_shift, offset).sum(0, keepdim=True)
        d_mean = d_shift * of_batch
        d_gate = (d_of_batch * batch_rstd - (d_scale * rstd).sum(0, keepdim=True))[0]
        d_var = (d_scale * rest).mul_(rstd.pow_(3)).mul_(-0.5)
        d_batch_var = d_of_batch * gate * batch_rstd.pow(3) * -0.5
        d_moments = [d_mean, d_var, -d_mean.sum(0, keepdim=True), d_batch_var]
        return scale, [*d_moments, _projected(d_gate, raw_gate), d_weight, d_bias]
