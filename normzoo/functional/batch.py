"""Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167)."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo._shapes import affine, statistics_dtype
from normzoo.functional._channel_affine import channel_affine
from normzoo.functional._distributed import several_ranks
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import refuse_one_value
from normzoo.functional._recomputation import in_backward


def update_running(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """In place: ``running <- running + momentum * (value - running)``, without gradient; not inside a backward pass."""
    if in_backward():
        return
    rate = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
    value = value.detach() if value.requires_grad else value
    running.lerp_(value if value.dtype == running.dtype else value.to(running.dtype), rate)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` with statistics of each channel over batch and space.

    With ``training`` the statistics are the batch's (biased variance) and the running ones, if given, move by
    ``momentum`` towards them (unbiased variance), but not inside a backward pass, where activation checkpointing
    recomputes what has moved them; otherwise they are the running ones.

    Args:
        x: (N, C, ...).
        running_mean: (C,); updated in place when training.
        running_var: (C,); updated in place when training.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        training: use the batch's statistics.
        momentum: update rate in torch's sense, a number or a 0-d tensor.
        eps: added to the variance.
        sync: when training, take the statistics over all ranks of the default process group.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: when training on exactly one value per channel, whose variance is undefined; when not
            training and without running statistics.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1.
    """
    if training and sync and several_ranks():
        rule = GroupRule(x.shape[1], eps)
        y, (held,) = channel_affine(x, rule, weight, bias, batch=True, sync=True)
        refuse_one_value(x, "batch normalization", held.number)
        _update(running_mean, held.mean, momentum)
        _update(running_var, held.unbiased_var, momentum)
        return y
    if training:
        refuse_one_value(x, "batch normalization")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch normalization needs running_mean and running_var when not training")
    if x.numel() == 0:
        return affine(x, weight, bias)
    dtype = statistics_dtype(x)
    weight, bias = _cast(weight, dtype), _cast(bias, dtype)
    native = isinstance(momentum, float) and (running_mean is None or running_mean.dtype == dtype)
    if training and in_backward():  # the kernel moves copies, and keeps as many tensors for backward as it did before
        running_mean, running_var = (None if v is None else v.clone() for v in (running_mean, running_var))
    if native or not training:
        y = torch.batch_norm(
            x,
            weight,
            bias,
            _cast(running_mean, dtype),
            _cast(running_var, dtype),
            training,
            momentum if isinstance(momentum, float) else 0.0,
            eps,
            torch.backends.cudnn.enabled,
        )
    else:
        # A momentum of 1 leaves the batch's own mean and unbiased variance in the scratch buffers.
        mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
        y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
        _update(running_mean, mean, momentum)
        _update(running_var, var, momentum)
    return y


def _update(running: Tensor | None, value: Tensor, momentum: float | Tensor) -> None:
    if running is not None:
        update_running(running, value, momentum)


def _cast(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else v.to(dtype)
