"""The tensors of a suspicious batch beside those of the other steps' batches: question 3 of a replay, its data.

``inputs(stage, step)`` returns a list with a dict for each tensor of the batches of a step, the most unusual first:

- ``path``, ``dtype``: where the tensor is, such as ``batch[0]["image"]``; ``batch[0][i]`` is each tensor of a list that
  has one for each sample;
- ``max``, ``others_max``: largest finite magnitude in the step's batches; in those of the other steps;
- ``nonfinite``, ``others_nonfinite``: number of values that are infinite or NaN, in the tensor that has most of them;
- ``constant``, ``others_constant``: whether all values of a tensor, more than one, are equal;
- ``range``: of whole numbers [lowest, highest] of the other steps; else None;
- ``lowest``, ``highest``: of whole numbers of the step; else None;
- ``distinct``: of whole numbers how many different values a tensor of the other steps has at most;
- ``outside``: how many whole numbers of the step are outside of ``range``;
- ``far``: how many of these are negative where no other is, or beyond the range by more than ``distinct``; but not
  -100, which PyTorch's losses ignore;
- ``rows``: up to 5 places along the first dimension, or in the list, the worst first, of one micro-batch: those with
  values that are not finite, or else far outside, or else more than twice as large as all others;
- ``rank``, ``micro_batch``: of the micro-batch that ``rows`` are of.

Few classes and few steps leave labels unseen: ``outside`` alone is no evidence, ``far`` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo.replaying.batch_rows import Leaf, division, leaves
from normzoo.replaying.stage import Stage

MOST_ROWS = 5
MOST_TENSORS = 24
LARGER = 2.0  # times the largest magnitude of others: rows of larger values stand out
IGNORED = -100  # the label that PyTorch's losses ignore
_MOST_COUNTED = 1_000_000  # values of a tensor among which different ones are counted


@dataclass
class Range:
    """What the values of a tensor, or of several, are within.

    Attributes:
        max: largest finite magnitude; None without a finite value.
        nonfinite: number of infinite and NaN values, of several tensors the largest.
        constant: whether all values of a tensor, more than one, are equal.
        lowest: of whole numbers, else None.
        highest: of whole numbers, else None.
        distinct: number of different whole numbers, of several tensors' ranges at least this.
    """

    max: float | None = None
    nonfinite: int = 0
    constant: bool = False
    lowest: int | None = None
    highest: int | None = None
    distinct: int = 0

    @classmethod
    def of(cls, x: Tensor) -> Range:
        """That of one tensor."""
        if not x.numel():
            return cls()
        x = torch.view_as_real(x) if x.is_complex() else x
        whole = _is_whole(x)
        values = x.long().flatten() if whole else x.double().flatten()  # fewer operations take other dtypes
        finite = values if whole else values[values.isfinite()]
        low, high = (v.item() for v in finite.aminmax()) if finite.numel() else (math.nan, math.nan)
        counted = whole and x.numel() <= _MOST_COUNTED
        return cls(
            max=float(max(abs(low), abs(high))) if finite.numel() else None,
            nonfinite=x.numel() - finite.numel(),
            constant=x.numel() > 1 and finite.numel() == x.numel() and low == high,
            lowest=int(low) if whole else None,
            highest=int(high) if whole else None,
            distinct=(values.unique().numel() if counted else int(high - low) + 1) if whole else 0,
        )

    def joined(self, other: Range) -> Range:
        """That of the values of both."""
        maxima = [m for m in (self.max, other.max) if m is not None]
        lowest = [v for v in (self.lowest, other.lowest) if v is not None]
        highest = [v for v in (self.highest, other.highest) if v is not None]
        return Range(
            max=max(maxima, default=None),
            nonfinite=max(self.nonfinite, other.nonfinite),
            constant=self.constant or other.constant,
            lowest=min(lowest, default=None),
            highest=max(highest, default=None),
            distinct=max(self.distinct, other.distinct),
        )

    def outside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which whole numbers are outside of this range, and which of these are far outside; of the shape of ``x``."""
        if self.lowest is None or self.highest is None or not _is_whole(x):
            none = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
            return none, none
        x = x.double()  # in which the difference of two int64 does not overflow
        beyond = torch.maximum(self.lowest - x, x - self.highest)
        negative = (x < 0) & (self.lowest >= 0)
        return beyond > 0, (beyond > 0) & (negative | (beyond > self.distinct)) & (x != IGNORED)


def inputs(stage: Stage, step: int) -> list[dict[str, Any]]:
    """The facts above, of the batches of a step on all ranks; the same on all ranks.

    Args:
        stage: what is asked.
        step: whose batches are judged by those of the steps before it, or of all others if there are fewer than three.
    """
    earlier = [s for s in stage.steps if s < step]
    others = earlier if len(earlier) >= 3 else [s for s in stage.steps if s != step]
    usual = _merged(stage.gather(_ranges(leaf for s in others for _, leaf in _leaves_of(stage, s))))
    own: dict[str, dict[str, Any]] = {}
    for place, leaf in _leaves_of(stage, step):
        fact = _fact(leaf, usual.get(leaf.path, Range()), place)
        own[leaf.path] = fact if leaf.path not in own else _joined(own[leaf.path], fact)
    facts: dict[str, dict[str, Any]] = {}
    for of_rank in stage.gather(own):
        for path, fact in of_rank.items():
            facts[path] = fact if path not in facts else _joined(facts[path], fact)
    return sorted(facts.values(), key=_strangeness, reverse=True)[:MOST_TENSORS]


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _leaves_of(stage: Stage, step: int) -> Iterator[tuple[tuple[int, int], Leaf]]:
    """(rank, micro-batch) and the tensors of all batches that this process has of a step."""
    frame = stage.frame(step)
    seen: dict[int, int] = {}
    for rank, micro in zip(frame.rank_of, frame.micro_batches, strict=True):
        number = seen[rank] = seen.get(rank, -1) + 1
        for leaf in leaves(micro["batch"], division(micro["batch"])):
            yield (rank, number), leaf


def _ranges(of: Iterable[Leaf]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for leaf in of:
        found[leaf.path] = Range.of(leaf.tensor).joined(found.get(leaf.path, Range()))
    return found


def _merged(of_ranks: Iterable[dict[str, Range]]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for ranges in of_ranks:
        for path, values in ranges.items():
            found[path] = values.joined(found.get(path, Range()))
    return found


def _fact(leaf: Leaf, usual: Range, place: tuple[int, int]) -> dict[str, Any]:
    x, own = leaf.tensor, Range.of(leaf.tensor)
    outside, far = usual.outside(x)
    of_sample = leaf.row is not None
    rows = _rows(x[None] if of_sample else x, far[None] if of_sample else far, usual) if x.ndim or of_sample else []
    return {
        "path": leaf.path,
        "dtype": str(x.dtype).removeprefix("torch."),
        "max": own.max,
        "others_max": usual.max,
        "nonfinite": own.nonfinite,
        "others_nonfinite": usual.nonfinite,
        "constant": own.constant,
        "others_constant": usual.constant,
        "range": None if usual.lowest is None else [usual.lowest, usual.highest],
        "lowest": own.lowest,
        "highest": own.highest,
        "distinct": usual.distinct,
        "outside": int(outside.sum()),
        "far": int(far.sum()),
        "rows": [leaf.row for _ in rows] if of_sample else rows,
        "rank": place[0],
        "micro_batch": place[1],
    }


def _rows(x: Tensor, far: Tensor, usual: Range) -> list[int]:
    """The places along the first dimension that stand out: not finite, else far outside, else larger than others."""
    if not x.numel():
        return []
    x = torch.view_as_real(x) if x.is_complex() else x
    by_row = x.reshape(len(x), -1)
    magnitude = by_row.double().abs()
    not_finite = (~magnitude.isfinite()).sum(1)
    largest = magnitude.nan_to_num(0.0, 0.0).amax(1)
    if not_finite.sum() > usual.nonfinite:
        standing_out, order = not_finite > 0, not_finite
    elif far.any():
        standing_out = far.reshape(len(x), -1).any(1)
        order = largest
    elif usual.max is not None:
        standing_out, order = largest > LARGER * usual.max, largest
    else:
        return []
    order = torch.where(standing_out, order.double(), -1.0).argsort(descending=True, stable=True)
    return order[: min(MOST_ROWS, int(standing_out.sum()))].tolist()


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The facts of two micro-batches of a step; ``rows`` are those of the one that is stranger."""
    stranger = max(a, b, key=_strangeness)
    found = dict(stranger)
    for name, join in (("max", max), ("highest", max), ("lowest", min), ("nonfinite", max)):
        known = [fact[name] for fact in (a, b) if fact[name] is not None]
        found[name] = join(known) if known else None
    for name in ("outside", "far"):
        found[name] = a[name] + b[name]
    if (a["rank"], a["micro_batch"]) == (b["rank"], b["micro_batch"]):  # of two samples
        found["rows"] = (stranger["rows"] + (b if stranger is a else a)["rows"])[:MOST_ROWS]
    found["constant"] = a["constant"] or b["constant"]
    return found


def _strangeness(fact: dict[str, Any]) -> tuple[float, ...]:
    """What tensors are sorted by: values that are not finite, then far outside, then how much larger than others."""
    usual = fact["others_max"]
    ratio = (fact["max"] or 0.0) / usual if usual else float(bool(fact["max"] and usual is not None))
    return max(0, fact["nonfinite"] - fact["others_nonfinite"]), fact["far"], ratio, fact["outside"]
