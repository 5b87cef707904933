"""The loss along a step, relative to the loss where the step starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def relative_loss(
    evaluate: Callable[[], Tensor],
    params: Sequence[Tensor],
    step: Sequence[Tensor],
    multiples: Sequence[float],
    start: Sequence[Tensor] | None = None,
) -> Tensor:
    """``L(theta - s * step)`` for each multiple s, after ``L(theta)`` itself.

    The parameters are changed in place and restored bit for bit, also if ``evaluate`` raises. Losses, not their
    ratio, are returned, so that ranks can be summed first: see :func:`relative_curve`.

    Args:
        evaluate: the loss at the current parameters, a 0-d tensor; called once at theta, and once for each multiple
            that is not 0.
        params: the parameters, which may be DTensors.
        step: what one optimizer step subtracts, a tensor for each parameter.
        multiples: s; 0 is the starting point, and takes its loss from there.
        start: theta, where the step starts; by default the parameters' current values.

    Returns:
        (1 + len(multiples),) float32 tensor of losses.
    """
    now = [p.detach().clone() for p in params]
    start = now if start is None else start
    try:
        losses: list[Tensor] = []
        for s in (0.0, *multiples):
            if s == 0 and losses:
                losses.append(losses[0])
                continue
            for p, p0, u in zip(params, start, step, strict=True):
                p.copy_(p0 - s * u if s else p0)
            losses.append(evaluate())
    finally:
        for p, value in zip(params, now, strict=True):
            p.copy_(value)
    return torch.stack([loss.detach().float() for loss in losses])


def relative_curve(losses: Sequence[float]) -> list[float]:
    """``losses[1:] / losses[0]``, or NaN throughout if the first is 0 or not finite.

    Args:
        losses: as :func:`relative_loss` returns them, at the start of the step and then at each multiple.

    Returns:
        the relative loss at each multiple; exactly 1 at the multiple 0.

    Example:
        >>> relative_curve([2.0, 1.5, 2.0, 3.0])
        [0.75, 1.0, 1.5]
    """
    start, *along = losses
    defined = math.isfinite(start) and start != 0
    return [loss / start if defined else math.nan for loss in along]


class Headroom(NamedTuple):
    """The largest multiple of a step up to which the loss stays at or below where it started, as far as a grid tells.

    Attributes:
        value: the multiple; NaN if there is none to tell of.
        bound: ``"below"`` if the true one is less than ``value``, the smallest multiple of the grid, where the loss has
            risen already; ``"above"`` if it is at least ``value``, the largest, where the loss has not risen yet; None
            if it is ``value``, interpolated.
    """

    value: float
    bound: str | None = None


def bounded_headroom(multiples: Sequence[float], relative: Sequence[float], *, negative: bool = False) -> Headroom:
    """The headroom as :func:`learning_rate_headroom` finds it, with the bound where the grid does not reach it.

    Args:
        multiples: as for :func:`learning_rate_headroom`.
        relative: likewise.
        negative: likewise.

    Example:
        >>> bounded_headroom([0.5, 1.0], [1.1, 1.5])
        Headroom(value=0.5, bound='below')
        >>> bounded_headroom([0.5, 1.0], [0.9, 0.8])
        Headroom(value=1.0, bound='above')
        >>> headroom = bounded_headroom([0.5, 1.0], [0.9, 1.1])
        >>> round(headroom.value, 6), headroom.bound
        (0.75, None)
    """
    s0, v0 = 0.0, 1.0
    for s, v in sorted((s, 2 - v if negative else v) for s, v in zip(multiples, relative, strict=True) if s > 0):
        if not math.isfinite(v) or v > 1:
            if not s0:
                return Headroom(s, "below")
            return Headroom(s0 + (s - s0) * ((1 - v0) / (v - v0)) if math.isfinite(v) else s0)
        s0, v0 = s, v
    return Headroom(s0, "above")


def learning_rate_headroom(multiples: Sequence[float], relative: Sequence[float], *, negative: bool = False) -> float:
    """The largest multiple of the step up to which the relative loss stays at or below 1.

    Between the last point at or below 1 and the first above it, the crossing is interpolated linearly. Below the
    smallest positive multiple the curve starts at (0, 1), so a loss that rises at once has headroom 0.

    Args:
        multiples: step multiples; those not above 0 are ignored.
        relative: the relative loss at each; a non-finite value counts as above 1.
        negative: whether the loss at the start is below 0, so that a relative loss above 1 is a fall; it is then what
            must stay at or above 1, the loss itself in either case at or below where it started.

    Returns:
        from 0 to the largest multiple: 0 if the true headroom lies below the grid, the largest multiple if it may lie
        above; :func:`bounded_headroom` tells these cases apart.

    Example:
        >>> learning_rate_headroom([1.0, 2.0, 4.0], [0.9, 0.8, 1.2])
        3.0
    """
    headroom = bounded_headroom(multiples, relative, negative=negative)
    return 0.0 if headroom.bound == "below" else headroom.value
