"""Whether steps made again are those of the run: losses bit for bit, and which element of which tensor differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FEW = 8  # deviations, of which no median tells how large the others are
_LOST = 0.01  # of a tensor's elements: if more are not finite, none of them stands out

Losses = Sequence[Sequence[float | None]]  # of micro-batches, of ranks


def differs(recorded: float, replayed: float, tolerance: float = 0.0) -> bool:
    """Whether two losses differ: in a bit of their float32 values, or relatively by more than a tolerance.

    All NaN are alike, since their bits depend on the dtypes that they went through.
    """
    if math.isnan(recorded) or math.isnan(replayed):
        return math.isnan(recorded) != math.isnan(replayed)
    if tolerance:
        return relative_difference(recorded, replayed) > tolerance
    return bool(np.float32(recorded).tobytes() != np.float32(replayed).tobytes())


def relative_difference(a: float, b: float) -> float:
    """``|a - b|`` over the larger magnitude; infinite if one of them alone is finite.

    Example:
        >>> relative_difference(2.0, 1.0), relative_difference(0.0, 0.0), relative_difference(1.0, math.nan)
        (0.5, 0.0, inf)
    """
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def difference_of_losses(recorded: Losses, replayed: Losses, tolerance: float = 0.0) -> float | None:
    """The largest relative difference of a step's losses, if one of them differs; else None.

    Args:
        recorded: for each micro-batch the losses of all ranks; None where not known, which is not compared.
        replayed: likewise.
        tolerance: as of :func:`differs`.
    """
    pairs = [
        (a, b)
        for of_ranks, again in zip(recorded, replayed, strict=False)
        for a, b in zip(of_ranks, again, strict=False)
        if a is not None and b is not None
    ]
    found = [relative_difference(a, b) for a, b in pairs if differs(a, b, tolerance)]
    return max(found, default=None)


def standing_out(recorded: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The element that deviates most from what it is after the same steps made again, among elements of its tensor.

    A flipped bit changes one element by orders of magnitude more than the others of its tensor, even after later
    updates, which move all of them a little. The deviation is told in multiples of the median one of the tensor's
    elements that deviate. Where fewer than eight do, the median over all tensors stands in for it, relative to the
    size of the tensors' values, and at least the rounding of the dtype.

    Args:
        recorded: tensors of the run, by name; whole numbers and tensors without a counterpart are passed over.
        replayed: those after the same steps made again.

    Returns:
        ``name``, ``element`` (its index), ``recorded`` and ``replayed`` (values), ``times`` (infinite for a value
        that is not finite among finite ones); None if nothing deviates, or nothing is left to compare with.
    """
    shared = [name for name in recorded if name in replayed and _comparable(recorded[name], replayed[name])]
    deviations = {name: _deviation(recorded[name], replayed[name]) for name in shared}
    sizes = {name: _size(replayed[name]) for name in shared}
    usual = torch.tensor([float(deviations[name].median()) / sizes[name] for name in shared if sizes[name]])
    usual = usual[usual.isfinite()]
    typical = float(usual.median()) if len(usual) else 0.0
    lost = {name: int(deviations[name].isinf().sum()) for name in shared}
    hit = sum(map(bool, lost.values()))
    best: dict[str, Any] | None = None
    for name in shared:
        deviation = deviations[name]
        infinite = deviation.isinf()
        if lost[name] > max(1, _LOST * deviation.numel()) or (hit > 1 and lost[name] == deviation.numel()):
            continue
        largest = int(deviation.argmax())
        moved = deviation[(deviation > 0) & ~infinite]
        least = torch.finfo(replayed[name].dtype).eps * (sizes[name] or 1.0)
        unit = max(float(moved.median()) if len(moved) >= _FEW else typical * sizes[name], least)
        times = float(deviation[largest]) / unit
        if times > (best["times"] if best is not None else 0.0):
            index = np.unravel_index(largest, tuple(recorded[name].shape))
            values = {"recorded": recorded[name], "replayed": replayed[name]}
            best = {"name": name, "element": [int(i) for i in index], "times": times}
            best |= {key: float(t.detach().flatten()[largest]) for key, t in values.items()}
    return best


def _comparable(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.numel() > 0 and a.is_floating_point() and b.is_floating_point()


def _deviation(a: Tensor, b: Tensor) -> Tensor:
    """``|a - b|`` of each element, (elements,) float64 on the CPU; infinite where one of them alone is finite."""
    a, b = (x.detach().flatten().to("cpu", torch.float64) for x in (a, b))
    difference = (a - b).abs()
    lost = a.isfinite() != b.isfinite()
    return torch.where(lost, math.inf, torch.where(a.isfinite() & b.isfinite(), difference, 0.0))


def _size(x: Tensor) -> float:
    """The root mean square of the finite values; 0 without any."""
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
