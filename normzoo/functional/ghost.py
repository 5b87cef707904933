"""Ghost batch normalization (Hoffer, Hubara & Soudry 2017, arXiv 1705.08741)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import HALF, channels_last, memory_format, positions
from normzoo.functional._channel_affine import ChannelAffineOptions, channel_affine, plain_channel_affine
from normzoo.functional._group_function import standardized, standardized_gradients
from normzoo.functional._moments import joined, unbiased
from normzoo.functional._pieces import by_formula, gradients_of_formula, summed, traced
from normzoo.functional.batch import batch_norm, update_running


def ghost_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ghost_size: int = 32,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalization of virtual batches of ``ghost_size`` consecutive samples; the last one may be smaller.

    The running statistics move by ``momentum`` towards the average of the virtual batches' means and unbiased
    variances, once for each batch.

    Args:
        x: (N, C, ...), not empty.
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        ghost_size: samples of a virtual batch.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training, if a virtual batch has one value per channel.

    Source: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, algorithm 1.
    """
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    n, space = x.shape[0], positions(x)
    smallest = n % ghost_size or min(n, ghost_size)
    if smallest * space == 1:
        raise ValueError(
            f"with ghost_size={ghost_size} a virtual batch has one value per channel of the input of shape "
            f"{tuple(x.shape)}, whose variance is undefined; choose another ghost_size or batch size"
        )
    if _few_large_ghosts(x, ghost_size):
        y, mean, var = _EachGhost.apply(x, weight, bias, ghost_size, eps)
    elif _in_blocks(x, ghost_size):
        y, mean, var = _GhostBlocks.apply(x, weight, bias, ghost_size, eps)
    else:
        y, (held,) = channel_affine(x, _Ghosts(ghost_size, eps), weight, bias, sample=True)
        means, variances = zip(*_ghost_moments(held.mean, held.var, ghost_size, space), strict=True)
        mean, var = torch.cat(means).mean(0), torch.cat(variances).mean(0)
    if running_mean is not None:
        update_running(running_mean, mean, momentum)
    if running_var is not None:
        update_running(running_var, var, momentum)
    return y


# Elements of a virtual batch from which on batch normalization's kernel, called for each, is the fastest way.
LARGE = 2**17


def _few_large_ghosts(x: Tensor, ghost_size: int) -> bool:
    large = x[:ghost_size].numel() >= LARGE
    return large and channels_last(x) and x.device.type == "cpu" and x.dtype not in HALF and not traced(x)


def _in_blocks(x: Tensor, ghost_size: int) -> bool:
    dense = channels_last(x) and x.movedim(1, -1).is_contiguous()
    return dense and x.ndim > 2 and x.shape[0] % min(ghost_size, x.shape[0]) == 0 and not traced(x)


class _GhostBlocks(torch.autograd.Function):
    """Where the channel is last in memory, a virtual batch is one sample with the positions of all of its samples."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, ghost_size: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, count = torch.empty_like(x), x.shape[0] // min(ghost_size, x.shape[0])
        blocks = _blocks(x, count)
        _, mean, var, rstd = standardized(blocks, x.shape[1], weight, bias, eps, into=_blocks(y, count))
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.options = ChannelAffineOptions(
            _Ghosts(ghost_size, eps), sample=True, batch=False, sync=False, after=None, after_tensors=0
        )
        running = mean.mean(0).flatten(), unbiased(var, blocks.shape[2]).mean(0).flatten()
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return y, *running

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        if by_formula(dy):
            return *_of_formula(ctx, x, weight, bias, dy), None, None
        dx, count = torch.empty_like(x), len(mean)
        d_weight, d_bias = standardized_gradients(
            _blocks(x, count), _blocks(dy, count), mean, rstd, weight, into=_blocks(dx, count)
        )[1:]
        return dx, None if weight is None else d_weight, None if bias is None else d_bias, None, None


def _blocks(x: Tensor, count: int) -> Tensor:
    """(N, C, ...) as (count, C, N / count * positions), a view where the channel is last in memory."""
    if memory_format(x) != torch.contiguous_format:  # one call for the three below
        channels = x.shape[1]
        size = x.numel() // (count * channels)
        return x.as_strided((count, channels, size), (channels * size, 1, channels))
    return x.movedim(1, -1).reshape(count, -1, x.shape[1]).movedim(-1, 1)


def _of_formula(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> list[Tensor | None]:
    def formula(x: Tensor, *affine: Tensor | None) -> Tensor:
        return plain_channel_affine(x, ctx.options, *affine)[0]

    return gradients_of_formula(formula, [x, weight, bias], ctx.needs_input_grad[:3], dy)


class _EachGhost(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, ghost_size: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ghost_size = ghost_size
        ctx.options = ChannelAffineOptions(
            _Ghosts(ghost_size, eps), sample=True, batch=False, sync=False, after=None, after_tensors=0
        )
        scale, shift = (None if v is None else v.to(x.dtype) for v in (weight, bias))
        y, ghosts = torch.empty_like(x), x.split(ghost_size)
        means = x.new_empty(len(ghosts), x.shape[1])
        rstds = torch.empty_like(means)
        for ghost, *out in zip(ghosts, y.split(ghost_size), means, rstds, strict=True):
            torch.native_batch_norm(ghost, scale, shift, None, None, True, 0.0, eps, out=out)
        ctx.save_for_backward(x, means, rstds, weight, bias)
        counts = [ghost.numel() // x.shape[1] for ghost in ghosts]
        factors = x.new_tensor([count / (count - 1) for count in counts])[:, None]
        running = means.mean(0), (rstds.pow(-2).sub_(eps).clamp_(min=0) * factors).mean(0)
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return y, *running

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, means, rstds, weight, bias = ctx.saved_tensors
        if by_formula(dy):
            return *_of_formula(ctx, x, weight, bias, dy), None, None
        scale = torch.ones_like(means[0]) if weight is None else weight.to(x.dtype)
        kernel, dx, of_affine = torch.ops.aten.native_batch_norm_backward.default, torch.empty_like(x), []
        ghosts = [t.split(ctx.ghost_size) for t in (dx, dy, x)]
        for d_ghost, d_out, ghost, mean, rstd in zip(*ghosts, means, rstds, strict=True):
            found = kernel(d_out, ghost, scale, None, None, mean, rstd, True, ctx.options.rule.eps, [True, True, True])
            d_ghost.copy_(found[0])
            of_affine.append(found[1:])
        d_weight, d_bias = (torch.stack(found).sum(0) for found in zip(*of_affine, strict=True))
        return dx, None if weight is None else d_weight, None if bias is None else d_bias, None, None


def _ghosts(v: Tensor, ghost_size: int) -> Iterator[Tensor]:
    """(N, C) as one (ghosts, ghost_size, C) of the full virtual batches and one (1, rest, C)."""
    full = v.shape[0] // ghost_size * ghost_size
    if full == v.shape[0]:
        yield v.reshape(-1, ghost_size, v.shape[1])
        return
    if full:
        yield v[:full].reshape(-1, ghost_size, v.shape[1])
    yield v[None, full:]


def _ghost_moments(mean: Tensor, var: Tensor, ghost_size: int, space: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Means and unbiased variances, each (ghosts, C), of the full virtual batches and of the rest."""
    for m, v in zip(_ghosts(mean, ghost_size), _ghosts(var, ghost_size), strict=True):
        count = m.shape[1] * space
        whole = m.mean(1, keepdim=True)
        yield whole.squeeze(1), (v + (m - whole).square()).mean(1) * (count / (count - 1))


@dataclass(frozen=True, eq=False)
class _Ghosts:
    """Each virtual batch by its mean and biased variance."""

    ghost_size: int
    eps: float

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        scales, shifts = [], []
        for of_ghost in self._parts(mean, var):
            offset, rstd = self._standardize(*of_ghost)
            scale = rstd.expand_as(offset) if weight is None else (rstd * weight).expand_as(offset)
            scales.append(scale)
            shifts.append(offset * scale if bias is None else offset * scale + bias)
        return _rejoined(scales), _rejoined(shifts)

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(_ghosts(v, self.ghost_size) for v in tensors), strict=True)

    def _standardize(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The samples' means less their virtual batch's, (ghosts, size, C), and 1 / std of that, (ghosts, 1, C)."""
        offset = mean - mean.mean(1, keepdim=True)
        return offset, (torch.addcmul(var, offset, offset).mean(1, keepdim=True) + self.eps).rsqrt()

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As autograd's, by hand; d_scale is of x less its sample's mean."""
        mean, var, weight, bias = inputs
        scales, d_means, d_variances, d_weights = [], [], [], []
        for part_mean, part_var, part_scale, part_shift in self._parts(mean, var, d_scale, d_shift):
            offset, rstd = self._standardize(part_mean, part_var)
            d_rstd = torch.addcmul(part_scale, offset, part_shift).sum(1, keepdim=True)
            d_weights.append((d_rstd * rstd).sum(0))
            scale = rstd if weight is None else rstd * weight
            d_var = (d_rstd * scale).mul_(rstd).mul_(rstd).mul_(-0.5 / offset.shape[1])
            d_offset = (part_shift * scale).addcmul_(offset, d_var, value=2)
            d_means.append(d_offset.sub_(d_offset.mean(1, keepdim=True)))
            d_variances.append(d_var.expand_as(offset))
            scales.append(scale.expand_as(offset))
        d_weight = None if weight is None else summed(d_weights)[0]
        moments = [_rejoined(d_means), _rejoined(d_variances)]
        return _rejoined(scales), [*moments, d_weight, None if bias is None else d_shift.sum(0)]


def _rejoined(parts: list[Tensor]) -> Tensor:
    """(N, C) of what :func:`_ghosts` took apart."""
    return joined([part.flatten(0, 1) for part in parts])
