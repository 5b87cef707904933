"""Samples that stand out of a batch, by losses or by what they do to its statistics, and the batch without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from normzoo.replaying.bisection import Bisection, MicroBatch, Part
from normzoo.replaying.held_statistics import Statistics
from normzoo.replaying.sample_facts import MOST_WORST, described

FEW = 1 / 4  # of the samples of a batch may stand out
FAR = 5.0  # times the median loss: a sample of a higher one may carry the batch's loss
MOVING = 10.0  # times its fair share of the variance: a sample of a larger share moves the statistics


def moved(bisection: Bisection, statistics: Mapping[int, Statistics]) -> list[dict[str, Any]]:
    """Up to 8 samples of all ranks that move the statistics of a layer, the one of the largest ``share`` first."""
    own = []
    for micro in bisection.micros:
        found = statistics[micro.place].moving()
        limit = min(MOVING / micro.samples, 0.5)
        for row, (share, layer) in found.items():
            if micro.samples > 1 and math.isfinite(share) and share > limit:
                own.append({**described(Part(micro, row, row + 1)), "layer": layer, "share": share})
    rows = [row for of_rank in bisection.stage.gather(own) for row in of_rank]
    return sorted(rows, key=lambda row: row["share"], reverse=True)[:MOST_WORST]


def carrying(facts: Mapping[str, Any], samples: int) -> list[Mapping[str, Any]]:
    """The few samples that carry a batch's loss; none if many do, or none does.

    Args:
        facts: ``worst``, the worst first, with a ``loss`` and its ``share``, and ``median``.
        samples: how many there are.

    Returns:
        those whose losses are not finite, or else the fewest that have more than half of the batch's loss, each more
        than five times the median.
    """
    rows, median = facts.get("worst", []), facts.get("median")
    found = [row for row in rows if not math.isfinite(row["loss"])]
    if not found:
        total = 0.0
        for row in rows:
            if total <= 0.5 and median is not None and row["loss"] > FAR * median:
                found.append(row)
                total += row["share"] or 0.0
        found = found if total > 0.5 else []
    return found if len(found) <= max(FEW * samples, 1) else []


def loss_without(bisection: Bisection, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The loss of a step's batches without some samples, by the statistics of the rest; None if it cannot be had.

    Args:
        bisection: of these batches.
        rows: ``rank``, ``micro_batch`` and ``row`` of each sample.
    """
    batches = [_without(micro, rows) for micro in bisection.micros]
    passed = bisection.capture(bisection.step, batches)
    own = [loss for _, loss, _ in passed]
    everything = [loss for of_rank in bisection.stage.gather(own) for loss in of_rank]
    known = [loss for loss in everything if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(everything) else None


def _without(micro: MicroBatch, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, int]:
    """A micro-batch without some of its samples, and how many are left; all of them if none would be."""
    left_out = {row["row"] for row in rows if (row["rank"], row["micro_batch"]) == (micro.rank, micro.number)}
    if not left_out or len(left_out) == micro.samples:
        return micro.batch, micro.samples
    return micro.division.without(micro.batch, left_out), micro.samples - len(left_out)
