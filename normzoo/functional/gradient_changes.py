"""How the gradient of the loss changes along a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normzoo.functional.relative_loss import relative_loss

_PIECE = 2**18  # values whose float64 copies stay in a processor's cache


def as_real(tensor: Tensor) -> Tensor:
    """The values as real numbers, detached, in float32 or wider; of complex ones the real and imaginary parts."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradient_changes(
    evaluate: Callable[[], tuple[Tensor, Sequence[Tensor]]],
    params: Sequence[Tensor],
    step: Sequence[Tensor],
    multiples: Sequence[float],
    start: Sequence[Tensor] | None = None,
) -> Tensor:
    """Loss and gradient at ``theta``, and at ``theta - s * step`` for each multiple s.

    The parameters are changed in place and restored bit for bit, also if ``evaluate`` raises. The norm of a difference
    of gradients is taken from the difference itself, and all sums run in float64. The distance is that of the points as
    the parameters' dtype rounds them. Nothing is read on the host.

    Args:
        evaluate: the loss at the current parameters, of one value, and its gradient, tensors of the same shapes at each
            call; called once at theta, and once for each multiple that is not 0.
        params: the parameters.
        step: what one optimizer step subtracts, a tensor for each parameter.
        multiples: s; 0 is the starting point.
        start: theta, where the step starts; by default the parameters' current values.

    Returns:
        (1 + len(multiples), 5) float64 tensor, a row for theta and then one for each multiple: the loss, the distance
        from theta, the norm of the gradient g' there, the norm of g' - g, and the inner product of g' and g, where g is
        the gradient at theta.
    """
    start = [p.detach().clone() for p in params] if start is None else start
    first: list[Tensor] = []
    points: list[Tensor] = []

    def evaluate_and_compare() -> Tensor:
        loss, gradient = evaluate()
        gradient = [as_real(g) for g in gradient]
        if not points:
            first.extend(g.clone() for g in gradient)  # what evaluate returns may be overwritten by its next call
        compared = (
            loss.detach().double().reshape(()),
            _norm(as_real(p) - as_real(p0) for p, p0 in zip(params, start, strict=True)),
            _norm(gradient),
            _norm(g - g0 for g, g0 in zip(gradient, first, strict=True)),
            _inner_product(gradient, first),
        )
        points.append(torch.stack(compared))
        return loss

    relative_loss(evaluate_and_compare, params, step, [s for s in multiples if s], start)
    moved = iter(points[1:])
    return torch.stack([points[0], *(next(moved) if s else points[0] for s in multiples)])


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all values together, as a 0-d float64 tensor."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The sum of the products of all values, as a 0-d float64 tensor."""
    pieces = (
        torch.dot(a.double(), b.double())
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x.flatten().split(_PIECE), y.flatten().split(_PIECE), strict=True)
    )
    return torch.stack(list(pieces)).sum()


class Predictiveness(NamedTuple):
    """What the changes of the gradient along a step amount to; NaN for what is undefined.

    Attributes:
        cosine: of the angle between g' and g, for each multiple; NaN where one of them is 0 or not finite.
        smoothness: largest |g' - g| over the distance at which it arose: the effective beta-smoothness.
        worst_cosine: smallest of ``cosine``.
        largest_change: largest |g' - g| over |g|; NaN if g is 0.
        loss_range: largest loss less smallest loss, that of the starting point included.
    """

    cosine: list[float]
    smoothness: float
    worst_cosine: float
    largest_change: float
    loss_range: float


def gradient_predictiveness(changes: Sequence[Sequence[float]]) -> Predictiveness:
    """Sum up what :func:`gradient_changes` measured.

    A loss or gradient that is not finite at a multiple counts as an infinite change. Points that lie at a distance of 0
    say nothing of the smoothness. All is undefined if loss or gradient at the start are not finite.

    Args:
        changes: rows of loss, distance, norm of g', norm of g' - g, inner product of g' and g; the first is that of the
            starting point.

    Source: Santurkar et al. 2018, arXiv 1805.11604, figure 4.

    Example:
        >>> start, half, whole = (1.0, 0.0, 2.0, 0.0, 4.0), (0.5, 1.0, 1.0, 1.0, 2.0), (0.8, 2.0, 1.0, 3.0, -2.0)
        >>> found = gradient_predictiveness([start, half, whole])
        >>> found.cosine, found.smoothness, found.largest_change, found.loss_range
        ([1.0, -1.0], 1.5, 1.5, 0.5)
    """
    (loss, _, norm, _, _), *moved = changes
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Predictiveness([math.nan] * len(moved), math.nan, math.nan, math.nan, math.nan)
    cosine = [_cosine(product, norm, other) for _, _, other, _, product in moved]
    losses = [loss, *(value for value, *_ in moved)]
    changed = [_or_infinite(change) for _, _, _, change, _ in moved]
    slopes = [c / d for c, (_, d, _, _, _) in zip(changed, moved, strict=True) if d]
    return Predictiveness(
        cosine,
        smoothness=max((_or_infinite(slope) for slope in slopes), default=math.nan),
        worst_cosine=min((c for c in cosine if not math.isnan(c)), default=math.nan),
        largest_change=max(changed) / norm if norm else math.nan,
        loss_range=max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.inf,
    )


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _cosine(product: float, norm: float, other: float) -> float:
    if not (norm and other and math.isfinite(other)):
        return math.nan
    return min(1.0, max(-1.0, product / norm / other))
