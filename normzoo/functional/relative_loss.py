"""The loss along a step, relative to the loss where the step starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def relative_loss(
    evaluate: Callable[[], Tensor],
    params: Sequence[Tensor],
    step: Sequence[Tensor],
    multiples: Sequence[float],
) -> Tensor:
    """``L(theta - s * step)`` for each multiple s, after ``L(theta)`` itself.

    The parameters are changed in place and restored bit for bit, also if ``evaluate`` raises. Losses, not their
    ratio, are returned, so that ranks can be summed first: the relative loss is ``losses[1:] / losses[0]``.

    Args:
        evaluate: the loss at the current parameters, a 0-d tensor; called ``1 + len(multiples)`` times.
        params: theta.
        step: what one optimizer step subtracts, a tensor for each parameter.
        multiples: s; 0 repeats the starting point.

    Returns:
        (1 + len(multiples),) float32 tensor of losses.
    """
    start = [p.detach().clone() for p in params]
    try:
        losses = [evaluate()]
        for s in multiples:
            for p, p0, u in zip(params, start, step, strict=True):
                p.copy_(p0 - s * u if s else p0)
            losses.append(evaluate())
    finally:
        for p, p0 in zip(params, start, strict=True):
            p.copy_(p0)
    return torch.stack([loss.detach().float() for loss in losses])


def learning_rate_headroom(multiples: Sequence[float], relative: Sequence[float]) -> float:
    """The largest multiple of the step up to which the relative loss stays at or below 1.

    Between the last point at or below 1 and the first above it, the crossing is interpolated linearly. Below the
    smallest positive multiple the curve starts at (0, 1), so a loss that rises at once has headroom 0.

    Args:
        multiples: step multiples; those not above 0 are ignored.
        relative: the relative loss at each; a non-finite value counts as above 1.

    Returns:
        from 0 to the largest multiple (the grid ends there: the true headroom may be larger).

    Example:
        >>> learning_rate_headroom([1.0, 2.0, 4.0], [0.9, 0.8, 1.2])
        3.0
    """
    s0, v0 = 0.0, 1.0
    for s, v in sorted((s, v) for s, v in zip(multiples, relative, strict=True) if s > 0):
        if not math.isfinite(v):
            return s0
        if v > 1:
            return s0 + (s - s0) * ((1 - v0) / (v - v0))
        s0, v0 = s, v
    return s0
