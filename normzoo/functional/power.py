"""Power normalization (Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv 2003.07845)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._distributed import all_reduce_mean, several_ranks
from normzoo.functional._group_scaling import GroupScaling
from normzoo.functional._moments import affine_backward, joined, scale_shift
from normzoo.functional._pieces import by_sample, cut, pieces, refuse_batched, refuse_jit_trace, summed, traced
from normzoo.functional._recomputation import FirstPass, Recomputation, in_backward, replay
from normzoo.functional.elementwise import channel_scale_shift


def power_norm(
    x: Tensor,
    running_phi: Tensor,
    ema_gz: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batches: int | Tensor = 0,
    warmup: int = 0,
    groups: int | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    momentum_backward: float = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = x / sqrt(phi + eps) * weight + bias``, phi the running quadratic mean of each channel.

    With ``groups``, x stands for :func:`group_scaling` of the input.

    Training, with q the quadratic mean of this batch and ``z = x / sqrt(phi + eps)`` by phi before this batch, the
    backward is the authors' approximation, not the gradient of the output::

        h  = dy * weight - momentum_backward * ema_gz * z
        dx = h / sqrt(q + eps)
        ema_gz <- ema_gz + mean(h * z)          in the backward pass
        phi    <- phi + momentum * (q - phi)

    Args:
        x: (N, C, ...), not empty.
        running_phi: (C,), phi; updated in place when training.
        ema_gz: (C,); updated in place by the backward pass.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        batches: number of batches before this one, a number or a 0-d tensor.
        warmup: number of batches that are divided by their own quadratic mean; until then phi also moves, first, to
            the average of all batches, as in the authors' code.
        groups: of the group scaling before, which must divide C; None for no scaling.
        training: normalize as in training.
        momentum: update rate of phi, a number, or a 0-d tensor for a cumulative average.
        momentum_backward: update rate of the backward's state.
        eps: added to the quadratic mean.
        sync: take q and the backward's means over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Shen et al. 2020, arXiv 2003.07845, algorithm 2, in the form of the authors' code.
    """
    scaling = None if groups is None else GroupScaling(groups, eps)
    if not training:
        scale, scaled = (running_phi + eps).rsqrt(), x if groups is None else group_scaling(x, groups, eps=eps)
        return channel_scale_shift(scaled, scale if weight is None else scale * weight, bias).to(x.dtype)
    refuse_jit_trace("power normalization")
    settings = _Settings(momentum_backward, eps, sync, scaling, None)
    return _train(x, running_phi, ema_gz, weight, bias, batches, warmup, momentum, settings)


def group_scaling(x: Tensor, groups: int, *, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in float32 or wider, the mean of each position over groups of consecutive channels.

    Args:
        x: (N, C, ...), not empty.
        groups: number of groups of C / groups channels.
        eps: added to the mean square.

    Source: Shen et al. 2020, arXiv 2003.07845, appendix, and the authors' code, which applies it before the layer.
    """
    return by_sample(GroupScaling(groups, eps), x.to(statistics_dtype(x)))


def quadratic_mean(
    x: Tensor, sync: bool = False, scaling: GroupScaling | None = None, factor: Tensor | None = None
) -> Tensor:
    """Mean of x^2 of each channel over batch and space, (C,), without gradient.

    Args:
        x: (N, C, ...).
        sync: over all ranks.
        scaling: of x by ``factor``, before; None for none.
        factor: see :class:`GroupScaling`.
    """
    dims = [0, *range(2, x.ndim)]
    total = summed(_scaled(x, rows, scaling, factor).square().sum(dims) for rows in pieces(x))
    count = x.numel() // x.shape[1]
    return all_reduce_mean(total, count)[0] if sync and several_ranks() else total / count


class _Settings(NamedTuple):
    momentum: float
    eps: float
    sync: bool
    scaling: GroupScaling | None
    repeat: FirstPass | Recomputation | None


@torch.compiler.disable  # also for the statistics: compiled code cannot tell a recomputation
def _train(
    x: Tensor,
    running_phi: Tensor,
    ema_gz: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batches: int | Tensor,
    warmup: int,
    momentum: float | Tensor,
    settings: _Settings,
) -> Tensor:
    """Normalize by phi or, in warm-up, by this batch's quadratic mean, and move phi."""
    factor = None if settings.scaling is None else _factor(x, settings.scaling)
    q = quadratic_mean(x, settings.sync, settings.scaling, factor)
    step = (batches.to(x.device) if isinstance(batches, Tensor) else torch.full((), batches, device=x.device)) + 1
    phi = torch.where(step <= warmup, q, running_phi.to(q.dtype))
    repeat = None if traced(x) else replay(running_phi)
    if repeat is not None:
        (phi,) = repeat(q, phi)
    y = _PowerNorm.apply(x, phi, q, ema_gz, weight, bias, factor, settings._replace(repeat=repeat))
    if in_backward():
        return y
    if isinstance(momentum, float):  # a cumulative average needs no start of its own
        running_phi.add_(torch.where(step < warmup, (q - running_phi) / step, 0))
    running_phi.add_(momentum * (q - running_phi))
    return y


class _PowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        phi: Tensor,
        q: Tensor,
        ema_gz: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        factor: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        rstd, scaling = (phi + settings.eps).rsqrt(), settings.scaling
        ctx.save_for_backward(x, rstd, q, weight, factor if scaling is not None and scaling.keeps(x) else None)
        ctx.ema_gz, ctx.settings, ctx.has_bias = ema_gz, settings, bias is not None
        scale = rstd if weight is None else rstd * weight
        shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
        if scaling is None:
            return scale_shift(x, scale[None], shift[None]).to(x.dtype)
        y = torch.empty_like(x)
        for rows in pieces(x):
            scale_shift(_scaled(x, rows, scaling, factor), scale[None], shift[None], into=cut(y, rows))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(dy, "power normalization")
        x, rstd, q, weight, factor = ctx.saved_tensors
        momentum, eps, sync, scaling, _ = ctx.settings
        gain = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
        drift, scale = momentum * ctx.ema_gz.to(rstd.dtype), (q + eps).rsqrt()
        if scaling is not None and factor is None:
            factor = _factor(x, scaling)
        dx, sums = torch.empty_like(x), []
        for rows in pieces(x):
            u, out = _scaled(x, rows, scaling, factor), cut(dx, rows) if x.dtype == rstd.dtype else None
            du, *of_affine = affine_backward(cut(dy, rows), u, gain * scale)
            sums.append(of_affine)
            slope = per_channel(drift * rstd * scale, x)
            if scaling is None or factor is None:
                part = torch.addcmul(du, u, slope, value=-1, out=out)
            else:
                part = scaling.pulled_back(du.addcmul_(u, slope, value=-1), u, cut(factor, rows), out)
            if out is None:
                cut(dx, rows).copy_(part)
        dot, total = (summed(part) for part in zip(*sums, strict=True))
        d_weight = dot * rstd
        count = x.numel() // x.shape[1]
        of_dz = gain * d_weight
        of_dz = all_reduce_mean(of_dz, count)[0] if sync and several_ranks() else of_dz / count
        ctx.ema_gz.add_(of_dz - drift * rstd.square() * q)  # the mean of h * z
        of_weight, of_bias = d_weight if weight is not None else None, total if ctx.has_bias else None
        return dx, None, None, None, of_weight, of_bias, None, None


def _factor(x: Tensor, scaling: GroupScaling) -> Tensor:
    """The factors of the group scaling, without gradient."""
    return joined([scaling.factor(cut(x.detach(), rows).to(statistics_dtype(x))) for rows in pieces(x)])


def _scaled(x: Tensor, rows: slice, scaling: GroupScaling | None, factor: Tensor | None) -> Tensor:
    """``x[rows]`` in float32 or wider, scaled by groups or as it is, without gradient."""
    wide = cut(x.detach(), rows).to(statistics_dtype(x))
    return wide if scaling is None or factor is None else scaling.scaled(wide, cut(factor, rows))
