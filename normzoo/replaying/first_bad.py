"""Which module is the first whose values are not finite, or far larger than in a quiet step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo.functional.finite_moments import INFINITE, NAN, merge_finite_moments, root_mean_square
from normzoo.replaying.calls import SIDES, Call

RISEN = 10.0  # times the magnitude in a quiet step
_FLOOR = 1e-3  # of the median magnitude: below it a quiet magnitude is taken for this, as of branches that begin at 0

Key = tuple[str, int]  # a module's name, and the number of the call


@dataclass
class Merged:
    """Calls of one module with one number, of all micro-batches and ranks.

    Attributes:
        name: of the module.
        number: of the call among those of the module in a micro-batch.
        class_: name of the module's class.
        depth: place among the calls of a micro-batch, in the order in which they return.
        leaf: whether no other module is called inside.
        moments: packed moments as lists, by side.
    """

    name: str
    number: int
    class_: str
    depth: int
    leaf: bool
    moments: dict[str, list[float]]

    def magnitude(self, side: str) -> float:
        """Root mean square of the finite values; NaN without any."""
        found = self.moments.get(side)
        return math.nan if found is None else root_mean_square(torch.tensor(found, dtype=torch.float64)).item()

    def nonfinite(self, side: str) -> int:
        """How many values are not finite."""
        found = self.moments.get(side)
        return 0 if found is None else int(found[INFINITE] + found[NAN])


def merge_calls(calls: Iterable[Call]) -> list[Merged]:
    """The calls of a pass, those of all micro-batches together, in the order in which they return."""
    by_key: dict[Key, list[Call]] = {}
    for call in calls:
        by_key.setdefault((call.name, call.number), []).append(call)
    merged = []
    for (name, number), same in by_key.items():
        moments = {
            side: (parts[0] if len(parts) == 1 else merge_finite_moments(torch.stack(parts))).tolist()
            for side in SIDES
            if (parts := [c.moments[side] for c in same if side in c.moments])
        }
        first = same[0]
        merged.append(Merged(name, number, type(first.module).__name__, first.depth, first.leaf, moments))
    return sorted(merged, key=lambda m: m.depth)


def merge_ranks(ranks: Sequence[Sequence[Merged]]) -> list[Merged]:
    """The calls of all ranks."""
    by_key: dict[Key, list[Merged]] = {}
    for merged in (m for rank in ranks for m in rank):
        by_key.setdefault((merged.name, merged.number), []).append(merged)
    for (first, *_), same in ((same, same) for same in by_key.values()):
        for side in SIDES:
            parts = [torch.tensor(m.moments[side], dtype=torch.float64) for m in same if side in m.moments]
            if len(parts) > 1:
                first.moments[side] = merge_finite_moments(torch.stack(parts)).tolist()
    return sorted((same[0] for same in by_key.values()), key=lambda m: m.depth)


def first_nonfinite(
    calls: Sequence[Call], origins: Callable[[Call, str], frozenset[int]], wanted: frozenset[int]
) -> Call | None:
    """The first call, in the order in which they return, whose output is of the wanted origins and whose input is not.

    If inputs of all such calls are, as of a batch that is not finite, the first one.
    """
    bad = [call for call in calls if origins(call, "output") & wanted]
    return next((call for call in bad if not origins(call, "input") & wanted), bad[0] if bad else None)


def first_bad_output(calls: Sequence[Merged]) -> Merged | None:
    """As :func:`first_nonfinite`, where origins are not known, as of values that no operation of PyTorch has made."""
    bad = [m for m in calls if m.nonfinite("output")]
    return next((m for m in bad if not m.nonfinite("input")), bad[0] if bad else None)


def first_bad_gradient(calls: Sequence[Merged]) -> Merged | None:
    """The first call, in the order of the backward pass, whose gradient is finite at the output and not at the input.

    If there is none, the first whose gradient is not finite at the output: what uses the output has made it so.
    """
    backwards = [m for m in reversed(calls) if m.leaf]
    bad = [m for m in backwards if m.nonfinite("input gradient") and not m.nonfinite("gradient")]
    return next(iter([*bad, *(m for m in backwards if m.nonfinite("gradient"))]), None)


def first_jump(bad: Sequence[Merged], quiet: Sequence[Merged]) -> tuple[str, Merged, float, float] | None:
    """The first call whose magnitude is more than 10 times that of a quiet step though that of its input is not.

    Magnitudes are root mean squares of outputs, in forward order, or of gradients at the inputs of modules against
    those at their outputs, in backward order. Modules without others inside come first, as a module that holds them
    shows what they have done together; among these a call whose magnitude has risen by a factor of 10 more than that of
    its input, before calls where a growth over many modules passes a factor of 10.

    Returns:
        ``"forward"`` or ``"backward"``, the call, how many times the magnitude has risen, and that of its input (of a
        backward pass: the gradient at its output).
    """
    before = {(m.name, m.number): m for m in quiet}
    pairs = [(m, before[m.name, m.number]) for m in bad if (m.name, m.number) in before]
    floors = {side: _FLOOR * _median([m.magnitude(side) for m in quiet]) for side in SIDES}

    def rise(own: Merged, then: Merged, side: str) -> float:
        least = max(then.magnitude(side), floors[side])
        return own.magnitude(side) / least if least > 0 else math.nan

    risen = []
    for direction, result, given, order in (
        ("forward", "output", "input", pairs),
        ("backward", "input gradient", "gradient", pairs[::-1]),
    ):
        for own, then in order:
            times, of_input = rise(own, then, result), rise(own, then, given)
            if times > RISEN and not of_input > RISEN:
                risen.append((direction, own, times, of_input))
    return min(risen, key=lambda jump: (not jump[1].leaf, jump[2] < RISEN * jump[3]), default=None)


def _median(values: Iterable[float]) -> float:
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else 0.0


def earliest(ranks: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Of what ranks say of their first bad module, that which comes first in a step, with the bad weights of all."""
    told = [dict(rank) for rank in ranks if rank is not None]
    if not told:
        return None
    first = min(told, key=lambda t: (t["direction"] != "forward", math.inf if t["depth"] is None else t["depth"]))
    weights = dict.fromkeys(name for rank in told for name in rank["weight_nonfinite"])
    return first | {"weight_nonfinite": [*weights], "input_nonfinite": any(t["input_nonfinite"] for t in told)}


def limit_of(dtype: torch.dtype | None) -> float | None:
    """The largest finite value of a dtype; None of one of whole numbers."""
    return torch.finfo(dtype).max if dtype is not None and dtype.is_floating_point else None


def tensors_by_path(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in a batch, by the keys and numbers that lead there."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: t for key, inside in items for k, t in tensors_by_path(inside, f"{path}[{key!r}]").items()}
