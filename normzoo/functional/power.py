"""Power normalization (Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv 2003.07845)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normzoo._shapes import statistics_dtype
from normzoo.functional._distributed import all_reduce_mean, several_ranks
from normzoo.functional._moments import combine, projections, scale_shift
from normzoo.functional._pieces import by_sample, pieces, refuse_batched, refuse_jit_trace, summed, traced
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
    training: bool = False,
    momentum: float | Tensor = 0.1,
    momentum_backward: float = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = x / sqrt(phi + eps) * weight + bias``, phi the running quadratic mean of each channel.

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
        training: normalize as in training.
        momentum: update rate of phi, a number, or a 0-d tensor for a cumulative average.
        momentum_backward: update rate of the backward's state.
        eps: added to the quadratic mean.
        sync: take q and the backward's means over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Shen et al. 2020, arXiv 2003.07845, algorithm 2, in the form of the authors' code.
    """
    if not training:
        scale = (running_phi + eps).rsqrt()
        return channel_scale_shift(x, scale if weight is None else scale * weight, bias)
    refuse_jit_trace("power normalization")
    q = quadratic_mean(x, sync)
    step = torch.as_tensor(batches, device=x.device) + 1
    phi = torch.where(step <= warmup, q, running_phi.to(q.dtype))
    repeat = None if traced(x) else replay(running_phi)
    if repeat is not None:
        (phi,) = repeat(q, phi)
    y = _apply(x, phi, q, ema_gz, weight, bias, _Settings(momentum_backward, eps, sync, repeat))
    if in_backward():
        return y
    if isinstance(momentum, float):  # a cumulative average needs no start of its own
        running_phi.add_(torch.where(step < warmup, (q - running_phi) / step, 0))
    running_phi.add_(momentum * (q - running_phi))
    return y


def group_scaling(x: Tensor, groups: int, *, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in float32 or wider, the mean of each position over groups of consecutive channels.

    Args:
        x: (N, C, ...), not empty.
        groups: number of groups of C / groups channels.
        eps: added to the mean square.

    Source: Shen et al. 2020, arXiv 2003.07845, appendix, and the authors' code, which applies it before the layer.
    """
    return by_sample(lambda x: _scaled_by_group(x, groups, eps), x.to(statistics_dtype(x)))


def quadratic_mean(x: Tensor, sync: bool = False) -> Tensor:
    """Mean of x^2 of each channel over batch and space, (C,), without gradient; of all ranks with ``sync``."""
    dims = [0, *range(2, x.ndim)]
    dtype = statistics_dtype(x)
    total = summed(x.detach()[rows].to(dtype).square().sum(dims) for rows in pieces(x))
    count = x.numel() // x.shape[1]
    return all_reduce_mean(total, count)[0] if sync and several_ranks() else total / count


class _Settings(NamedTuple):
    momentum: float
    eps: float
    sync: bool
    repeat: FirstPass | Recomputation | None


@torch.compiler.disable
def _apply(*arguments: Any) -> Tensor:
    return _PowerNorm.apply(*arguments)


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
        settings: _Settings,
    ) -> Tensor:
        rstd = (phi + settings.eps).rsqrt()
        ctx.save_for_backward(x, rstd, q, weight)
        ctx.ema_gz, ctx.settings, ctx.has_bias = ema_gz, settings, bias is not None
        scale = rstd if weight is None else rstd * weight
        shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
        return scale_shift(x, scale[None], shift[None]).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(dy, "power normalization")
        x, rstd, q, weight = ctx.saved_tensors
        momentum, eps, sync, _ = ctx.settings
        dot, total = (v[0] for v in projections(dy, x, None, per_sample=False))
        d_weight = dot * rstd
        gain = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
        drift = momentum * ctx.ema_gz.to(rstd.dtype)
        count = x.numel() // x.shape[1]
        of_dz = gain * d_weight
        of_dz = all_reduce_mean(of_dz, count)[0] if sync and several_ranks() else of_dz / count
        ctx.ema_gz.add_(of_dz - drift * rstd.square() * q)  # the mean of h * z
        scale = (q + eps).rsqrt()
        slope = -drift * rstd * scale
        dx = combine(dy, (gain * scale)[None], x, slope[None], torch.zeros_like(slope)[None])
        return dx, None, None, None, None if weight is None else d_weight, total if ctx.has_bias else None, None


def _scaled_by_group(x: Tensor, groups: int, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    squares = wide.square().reshape(x.shape[0], groups, -1, *x.shape[2:]).mean(2)
    scale = (squares + eps).rsqrt().repeat_interleave(x.shape[1] // groups, dim=1)
    return wide * scale
