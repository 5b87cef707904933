"""Whitening of channels by Newton's iterations (Huang, Zhou, Zhu, Liu & Shao 2019, arXiv 1904.03441)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import channels_last, memory_format, per_channel, positions, spread, statistics_dtype
from normzoo.functional._distributed import all_reduce_sum, several_ranks
from normzoo.functional._moments import batch_moments, per_channel_sum, refuse_one_value
from normzoo.functional._pieces import by_formula, by_sample, gradients_of_formula, traced, without_autocast
from normzoo.functional.batch import update_running

_IterNormOptions = tuple[int, int, float, bool]  # groups, iterations, eps, sync


def iter_norm(
    x: Tensor,
    running_mean: Tensor,
    running_whitening: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    iterations: int = 5,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = W (x - mean) * weight + bias``, where W whitens each group of D consecutive channels.

    Training, with the covariance over batch and space of a group (biased), ``S = cov + eps * I``::

        P <- I;  repeat: P <- 1.5 P - 0.5 P^3 S / trace(S);  W = P / sqrt(trace(S))

    and the running mean and whitening matrix move by ``momentum`` towards mean and W; not training, they stand in.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,); updated in place when training.
        running_whitening: (G, D, D) with G * D = C; updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        iterations: of Newton's method.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the diagonal of the covariance.
        sync: when training, take the statistics over all ranks.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training on one value per channel, whose covariance is undefined.

    Source: Huang et al. 2019, arXiv 1904.03441, algorithm 1.
    """
    if not training:
        matrix = _with_weight(running_whitening.to(statistics_dtype(x)), weight)
        return by_sample(_mix, x, matrix, running_mean, bias)
    sync = sync and several_ranks()
    if not sync:
        refuse_one_value(x, "whitening")
    options = (running_whitening.shape[0], iterations, eps, sync)
    whiten = _plain if traced(x) and not sync else _apply
    y, mean, whitening = whiten(x, weight, bias, options)
    update_running(running_mean, mean, momentum)
    update_running(running_whitening, whitening, momentum)
    return y


def newton_whitening(covariance: Tensor, iterations: int, eps: float) -> Tensor:
    """The inverse square root of ``covariance + eps * I``, (G, D, D), by Newton's iterations."""
    last, trace, _ = _newton(covariance, iterations, eps)
    return last * trace.rsqrt()


def _newton(covariance: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Newton's iterations from the identity on.

    Returns:
        the last iterate, (G, D, D), the trace that it is the inverse root over, (G, 1, 1), and for each iteration but
        the first the iterate it starts from, that iterate's square and its cube.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    shifted = torch.add(covariance, identity, alpha=eps)
    trace = shifted.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    scaled = shifted / trace
    p, kept = identity.expand_as(scaled), []
    if iterations:
        p = torch.add(1.5 * identity, scaled, alpha=-0.5)
    with without_autocast(scaled):
        for _ in range(iterations - 1):
            square = torch.bmm(p, p)
            cube = torch.bmm(square, p)
            kept += [p, square, cube]
            p = torch.baddbmm(p, cube, scaled, beta=1.5, alpha=-0.5)
    return p, trace, kept


def _newton_backward(
    d_whitening: Tensor,
    covariance: Tensor,
    iterations: int,
    eps: float,
    last: Tensor,
    trace: Tensor,
    kept: Sequence[Tensor],
) -> Tensor:
    """The gradient for the covariance, which is symmetric, as all iterates are: so may be all their gradients."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    scaled = torch.add(covariance, identity, alpha=eps).div_(trace)
    d_p = _symmetric(d_whitening) * trace.rsqrt()
    d_trace = (d_p * last).sum((1, 2), keepdim=True).mul_(-0.5)  # times the trace
    d_scaled = torch.zeros_like(covariance)
    with without_autocast(covariance):
        for i in reversed(range(0, len(kept), 3)):  # the next iterate is 1.5 p - 0.5 p^3 scaled
            p, square, cube = kept[i : i + 3]
            d_scaled.baddbmm_(cube, d_p, alpha=-0.5)
            d_cube = torch.bmm(d_p, scaled)
            d_cube = (d_cube + d_cube.mT).mul_(-0.25)
            half = torch.bmm(d_cube, square)
            d_p = torch.baddbmm(d_p, torch.bmm(p, d_cube), p, beta=1.5).add_(half).add_(half.mT)
    if iterations:
        d_scaled.sub_(d_p, alpha=0.5)
    d_trace -= (d_scaled * scaled).sum((1, 2), keepdim=True)
    return torch.addcmul(_symmetric(d_scaled), d_trace, identity).div_(trace)


def _symmetric(m: Tensor) -> Tensor:
    return (m + m.mT).mul_(0.5)


def _with_weight(whitening: Tensor, weight: Tensor | None) -> Tensor:
    return whitening if weight is None else whitening * weight.view(*whitening.shape[:2], 1)


class _Mix:
    """``matrix (x - mean) + bias`` for the (G, D, D) matrices of groups of consecutive channels."""

    def __call__(self, x: Tensor, matrix: Tensor, mean: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(matrix.dtype)
        if mean is not None:
            wide = wide - per_channel(mean, x)
        with without_autocast(x):
            if _in_rows(x, matrix):
                mixed = _rows(wide, len(matrix)) @ matrix.mT
                y = mixed.transpose(0, 1).reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
            else:
                y = (matrix @ wide.flatten(2).unflatten(1, matrix.shape[:2])).reshape(x.shape)
        y = y if bias is None else y + per_channel(bias.to(y.dtype), x)
        y = y.to(x.dtype)
        return y.contiguous(memory_format=memory_format(x)) if x.ndim > 2 else y

    def write(self, y: Tensor, x: Tensor, matrix: Tensor, mean: Tensor | None, bias: Tensor | None) -> None:
        """Put the result into ``y``."""
        _mix_into(y, x.to(matrix.dtype) if mean is None else x - per_channel(mean, x), matrix, bias)


_mix = _Mix()


def _mix_into(y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None, add: bool = False) -> None:
    """``y[...] = matrix x + bias``, or ``y += matrix x`` with ``add``."""
    in_rows = _in_rows(x, matrix)
    as_x = y.movedim(1, -1).is_contiguous() if in_rows else y.is_contiguous()
    if not (as_x and x.dtype == y.dtype == matrix.dtype):
        mixed = _mix(x, matrix, None, bias)
        y.add_(mixed) if add else y.copy_(mixed)
        return
    groups, size, _ = matrix.shape
    if in_rows:
        out, left, right = _rows(y, groups), _rows(x, groups), matrix.mT
        level = None if bias is None else bias.view(groups, 1, size)
    else:
        out, right = (t.flatten(2).unflatten(1, (groups, size)).flatten(0, 1) for t in (y, x))
        left = matrix.expand(x.shape[0], -1, -1, -1).reshape(-1, size, size)
        level = None if bias is None else bias.view(1, groups, size).expand(x.shape[0], -1, -1).reshape(-1, size, 1)
    with without_autocast(x):
        if add:
            out.baddbmm_(left, right)
        elif level is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(level.to(x.dtype), left, right, out=out)


def _in_rows(x: Tensor, matrix: Tensor) -> bool:
    """Whether channels are mixed as rows of positions, not as columns of each sample.

    They are where they lie so, or where a sample has fewer positions than a group has channels.
    """
    return channels_last(x) or positions(x) < matrix.shape[1]


def _rows(x: Tensor, groups: int) -> Tensor:
    """(G, positions, D), a view of what lies so in memory."""
    return x.movedim(1, -1).reshape(-1, groups, x.shape[1] // groups).transpose(0, 1)


def _cross(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """(G, D, D) sums over batch and space of the products of channels of ``a`` and ``b``."""
    with without_autocast(a):
        if a.ndim == 2 or channels_last(a):
            return torch.bmm(_rows(a, groups).mT, _rows(b, groups))
        a, b = (v.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1) for v in (a, b))
        return torch.bmm(a, b.mT).unflatten(0, (-1, groups)).sum(0)


def _plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _IterNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in differentiable operations."""
    groups, iterations, eps, _ = options
    wide = x.to(statistics_dtype(x))
    mean = wide.mean([0, *range(2, x.ndim)])
    centred = wide - per_channel(mean, x)
    covariance = _cross(centred, centred, groups) / (x.numel() // x.shape[1])
    whitening = newton_whitening(covariance, iterations, eps)
    y = _mix(centred, _with_weight(whitening, weight), None, bias)
    return y.to(x.dtype), mean.detach(), whitening.detach()


@torch.compiler.disable
def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _IterNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return _IterNorm.apply(x, weight, bias, options)


class _IterNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: _IterNormOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, iterations, eps, sync = options
        mean, _, count = batch_moments(x, sync)
        refuse_one_value(x, "whitening", count)
        centred = x.to(mean.dtype) - spread(mean, x)
        cross = _cross(centred, centred, groups)
        if sync:
            (cross,) = all_reduce_sum([cross])
        covariance = cross / count
        last, trace, kept = _newton(covariance, iterations, eps)
        whitening = last * trace.rsqrt()
        y = torch.empty_like(x)
        _mix_into(y, centred, _with_weight(whitening, weight), bias)
        ctx.save_for_backward(x, mean, covariance, weight, bias, count if sync else None, last, trace, *kept)
        ctx.options = options
        ctx.mark_non_differentiable(mean, whitening)
        return y, mean[0], whitening

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, covariance, weight, bias, synced, last, trace, *kept = ctx.saved_tensors
        groups, iterations, eps, sync = ctx.options
        if by_formula(dy, sync=sync):
            found = gradients_of_formula(
                lambda x, w, b: _plain(x, w, b, ctx.options)[0], [x, weight, bias], ctx.needs_input_grad[:3], dy
            )
            return *found, None
        count = synced if sync else x.numel() // x.shape[1]
        dy, centred = dy.to(mean.dtype), x.to(mean.dtype) - spread(mean, x)
        d_matrix, d_bias = _cross(dy, centred, groups), per_channel_sum(dy)
        whitening = last * trace.rsqrt()
        matrix, d_weight = _with_weight(whitening, weight), None
        if weight is not None:
            d_weight = (d_matrix * whitening).sum(-1).flatten()
            d_matrix = _with_weight(d_matrix, weight).to(covariance.dtype)
        d_covariance = _newton_backward(d_matrix, covariance, iterations, eps, last, trace, kept)
        matrix = matrix.mT
        with without_autocast(x):
            level = -(matrix @ d_bias.to(matrix.dtype).view(groups, -1, 1)).flatten()
        if sync:
            d_covariance, level = all_reduce_sum([d_covariance, level])
        slope = d_covariance * (2 / count)
        dx = torch.empty_like(x, dtype=mean.dtype)
        _mix_into(dx, dy, matrix, level / count)
        _mix_into(dx, centred, slope, None, add=True)
        return dx.to(x.dtype), d_weight, None if bias is None else d_bias, None
