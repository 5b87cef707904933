"""Means and variances of channels, and the passes over large tensors that layers with such statistics share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normzoo._shapes import channels_last, per_channel, positions, spread, statistics_dtype, values_per_channel
from normzoo.functional._distributed import all_gather_moments
from normzoo.functional._pieces import cut, pieces, summed


def refuse_one_value(x: Tensor, layer: str, number: int | Tensor | None = None) -> None:
    """Raise a ValueError if the batch has one value for each channel: it has no deviation, and its variance is 0.

    Args:
        x: (N, C, ...), the batch or this rank's part of it.
        layer: what needs more values, for the message.
        number: of values for each channel over all ranks, a 0-d tensor, where they make up one batch. It is read
            only if ``x`` has one value or none, so that other batches wait for no device.
    """
    own, everywhere = values_per_channel(x), ""
    if isinstance(number, Tensor):
        alone, everywhere = own <= 1 and bool(number == 1), ", over all ranks together"
    else:
        alone = own == 1
    if alone:
        raise ValueError(
            f"{layer} needs more than one value per channel when training{everywhere}; "
            f"the input has shape {tuple(x.shape)}"
        )


def moments(x: Tensor, per_sample: bool, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over space, each (N, C), or over batch and space, each (1, C); without gradient.

    The variance is taken around the mean, in a second pass: the mean of squares less the squared mean loses all digits
    where the mean is large.

    Args:
        x: (N, C, ...), not empty.
        per_sample: over space alone.
        scratch: like ``x``, overwritten by moments of samples, if given: memory that is used again stays in cache.
    """
    if not per_sample:
        mean, var = batch_statistics(x)
        return mean[None], var[None]
    x, dtype = x.detach(), statistics_dtype(x)
    dims = _dims(x, per_sample)
    if not dims:
        return x.to(dtype), torch.zeros((), dtype=dtype, device=x.device).expand(x.shape)
    scratch = None if scratch is None or scratch.dtype != dtype else scratch
    means, variances = [], []
    for rows in pieces(x):
        piece = cut(x, rows).to(dtype)
        mean = piece.mean(dims)
        means.append(mean)
        square = squared_difference(piece, spread(mean, x), None if scratch is None else cut(scratch, rows))
        variances.append(square.mean(dims))
    return joined(means), joined(variances)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over batch and space, each (C,), float32 or wider; without gradient.

    Args:
        x: (N, C, ...), not empty.
    """
    x, dtype = x.detach() if torch.is_grad_enabled() else x, statistics_dtype(x)
    if x.dtype == dtype and not x.is_meta and (channels_last(x) or x.device.type != "cpu"):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    dims = _dims(x, per_sample=False)
    mean = x.mean(dims, dtype=dtype)
    squares = summed(squared_difference(cut(x, rows).to(dtype), per_channel(mean, x)).sum(dims) for rows in pieces(x))
    return mean, squares * (mean.numel() / x.numel())


def projections(
    dy: Tensor, x: Tensor, mean: Tensor | None, per_sample: bool, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sums of ``dy * (x - mean)`` and of ``dy``, over space, (N, C), or over batch and space, (1, C).

    Args:
        dy: (N, C, ...).
        x: (N, C, ...).
        mean: (N, C) or (1, C); 0 if None.
        per_sample: sum over space alone.
        scratch: like ``x``, overwritten, if given.
    """
    dims, dtype = _dims(x, per_sample), statistics_dtype(x) if mean is None else mean.dtype
    if not dims:
        return (x.to(dtype) if mean is None else x - mean) * dy, dy.to(dtype)
    scratch = None if scratch is None or scratch.dtype != dtype else scratch
    products, sums = [], []
    for rows in pieces(x):
        piece, out = cut(dy, rows), None if scratch is None else cut(scratch, rows)
        if mean is None:
            product = torch.mul(cut(x, rows).to(dtype), piece, out=out)
        else:
            product = torch.sub(cut(x, rows), spread(cut(mean, rows) if per_sample else mean, x), out=out).mul_(piece)
        products.append(product.sum(dims))
        sums.append(piece.sum(dims, dtype=dtype))
    if per_sample:
        return joined(products), joined(sums)
    return summed(products)[None], summed(sums)[None]


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, into: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in one pass, in the dtype of ``scale``.

    Args:
        x: (N, C, ...).
        scale: (N, C) or (1, C).
        shift: (N, C) or (1, C).
        into: where the result is put, if given; of the memory format of ``x``.
    """
    dtype = torch.promote_types(scale.dtype, shift.dtype)
    x, scale, shift = x.to(dtype), scale.to(dtype), shift.to(dtype)
    if into is not None and into.dtype != dtype:
        return into.copy_(scale_shift(x, scale, shift))
    if x.device.type != "cpu" or x.ndim == 2 or not x.numel() or not x.is_contiguous() or channels_last(x):
        return torch.addcmul(spread(shift, x), x, spread(scale, x), out=into)
    # torch.addcmul is slow where neighbours share scale and shift; batch normalization's evaluation is not.
    rows = 1 if scale.shape[0] == shift.shape[0] == 1 else x.shape[0]
    scale, shift = (v.expand(rows, -1).reshape(-1) for v in (scale, shift))
    flat = x.reshape(x.shape[0] // rows, rows * x.shape[1], -1)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    y = torch.native_batch_norm(flat, scale, shift, zero, one, False, 0.0, 0.0)[0]
    # a view could not be overwritten by what follows the layer
    y = torch.ops.aten._unsafe_view(y, x.shape)
    return y if into is None else into.copy_(y)


def scale_shift_into(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """``y[...] = x * scale + shift`` for scale of shape (N, C) and shift of shape (C,), in few passes."""
    scale = spread(scale, x)
    if shift is None:
        torch.mul(x, scale, out=y) if y.dtype == x.dtype == scale.dtype else y.copy_(x * scale)
    elif y.dtype == x.dtype == scale.dtype == shift.dtype and channels_last(x):
        torch.addcmul(spread(shift[None], x), x, scale, out=y)
    else:
        y.copy_((x * scale).add_(spread(shift[None], x)))


def combine(dy: Tensor, scale: Tensor, x: Tensor, slope: Tensor, level: Tensor, into: Tensor | None = None) -> Tensor:
    """``dy * scale + x * slope + level``, of the dtype and memory format of ``x``.

    Args:
        dy: (N, C, ...).
        scale: (N, C) or (1, C), as are slope and level.
        x: (N, C, ...).
        slope: factor of ``x``.
        level: what is added.
        into: where the result is put, if given.
    """
    dx, parts = torch.empty_like(x) if into is None else into, pieces(x)
    for rows in parts:
        a, b, c = (spread(cut(v, rows) if v.shape[0] > 1 else v, x) for v in (scale, slope, level))
        wide, piece = cut(dy, rows).to(scale.dtype), cut(x, rows)
        out = cut(dx, rows) if dx.dtype == scale.dtype else torch.empty_like(piece, dtype=scale.dtype)
        if channels_last(x):
            torch.addcmul(c, wide, a, out=out)
        else:
            torch.mul(wide, a, out=out).add_(c)
        out.addcmul_(piece.to(scale.dtype), b)
        if dx.dtype != scale.dtype:
            dx[rows] = out
    return dx


def unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    """The variance over count - 1, from the biased one."""
    return var * (count / (count - 1).clamp(min=1) if isinstance(count, Tensor) else count / max(count - 1, 1))


def add_scaled_(dx: Tensor, x: Tensor, slope: Tensor, level: Tensor) -> None:
    """In place: ``dx <- dx + x * slope + level`` for slope and level of shape (N, C) or (1, C)."""
    for rows in pieces(x):
        a, b = (spread(cut(v, rows) if v.shape[0] > 1 else v, x) for v in (slope, level))
        cut(dx, rows).addcmul_(cut(x, rows), a).add_(b)


def batch_moments(x: Tensor, sync: bool) -> tuple[Tensor, Tensor, int | Tensor]:
    """(1, C) mean and biased variance over batch and space, of all ranks with ``sync``, and the count of values."""
    count = x.numel() // x.shape[1]
    if count:
        mean, var = moments(x, per_sample=False)
    else:
        mean, var = (torch.zeros(1, x.shape[1], dtype=statistics_dtype(x), device=x.device) for _ in range(2))
    return all_gather_moments(mean, var, count) if sync else (mean, var, count)


def per_channel_sum(x: Tensor) -> Tensor:
    """(C,) sums over batch and space."""
    return x.sum(_dims(x, per_sample=False))


def per_sample_sum(x: Tensor) -> Tensor:
    """(N, C) sums over space."""
    return x.sum(_dims(x, per_sample=True)) if x.ndim > 2 else x


def affine_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``(x - mean) * weight + bias``, all (C,): the gradients for x, weight and bias, in one pass.

    Batch normalization's backward by fixed statistics, with a variance of 1, is just that.
    """
    dtype = torch.promote_types(torch.promote_types(dy.dtype, x.dtype), weight.dtype)
    dy, x, weight = dy.to(dtype), x.to(dtype), weight.to(dtype)
    mean = torch.zeros_like(weight) if mean is None else mean.to(dtype)
    if not x.numel():  # the kernel crashes
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, torch.ones_like(weight), None, None, False, 0.0, [True, True, True]
    )


def affine_sample(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` for scale of shape (C,) and shift of shape (N, C), in few passes."""
    if channels_last(x):
        return torch.addcmul(spread(shift, x), x, spread(scale[None], x))
    return (x * spread(scale[None], x)).add_(spread(shift, x))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(1,) sum of ``x * y``; in one pass where both lie in memory alike and without gaps."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    dense = x.permute(order)
    if x.stride() == y.stride() and x.dtype == y.dtype and dense.is_contiguous():
        return torch.dot(dense.view(-1), y.permute(order).view(-1))[None]
    return (x * y).sum()[None]


def sigmoid_backward_(dy: Tensor, y: Tensor) -> Tensor:
    """In place: ``dy <- dy * y * (1 - y)`` in one pass."""
    return torch.ops.aten.sigmoid_backward.grad_input(dy, y, grad_input=dy)


def squared_difference(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """``(x - y) ** 2`` in one pass, where ``y`` broadcasts."""
    return torch.ops.aten.mse_loss(x, y, 0) if out is None else torch.ops.aten.mse_loss.out(x, y, 0, out=out)


def _dims(x: Tensor, per_sample: bool) -> list[int]:
    return [*range(2, x.ndim)] if per_sample else [0, *range(2, x.ndim)]


def small_beside(x: Tensor) -> bool:
    """Whether a few (N, C) tensors may be kept beside (N, C, ...) for backward."""
    return positions(x) >= 32


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a batch as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
