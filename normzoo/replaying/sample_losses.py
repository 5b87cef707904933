"""Losses of single samples as shares of the batch's, and the gradients of some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from normzoo.replaying.bisection import Bisection, Part, badness
from normzoo.replaying.held_statistics import Statistics
from normzoo.replaying.reductions import weighting
from normzoo.replaying.sample_facts import described

MOST_GRADIENTS = 3


def described_parts(
    bisection: Bisection, parts: list[Part], reduction: str, statistics: Mapping[int, Statistics]
) -> list[dict[str, Any]]:
    """The parts of all ranks, with their shares and the gradients of the worst, in the order of their places.

    Args:
        bisection: that has evaluated the parts.
        parts: of this rank; those that have no part in the batch's loss lose their own.
        reduction: how the batch's loss follows from those of its samples.
        statistics: by which layers normalized the parts.
    """
    weights = {micro.place: weighting(micro, reduction) for micro in bisection.micros}
    for part in parts:
        if not weights[part.micro.place][0](part):
            part.loss = None  # it has no part in the batch's loss, as a sequence of padding alone
    single = [part for part in parts if part.samples == 1 and part.loss is not None]
    worst = sorted(single, key=badness, reverse=True)[:MOST_GRADIENTS]
    gradients = bisection.gradients(worst, MOST_GRADIENTS, statistics)
    of_part = {id(part): gradient for part, gradient in zip(worst, gradients, strict=True)}
    own = []
    for part in parts:
        weight, divided = weights[part.micro.place]
        whole = sum(weight(p) for p in parts if p.micro is part.micro) if divided else 1.0
        own.append(
            {
                **described(part),
                "samples": part.samples,
                "loss": part.loss,
                "contribution": None if part.loss is None else weight(part) / (whole or 1.0) * part.loss,
                "gradient": of_part.get(id(part)),
            }
        )
    found = [row for of_rank in bisection.stage.gather(own) for row in of_rank]
    contributions = [row.pop("contribution") for row in found]
    known = [c for c in contributions if c is not None]
    total = sum(known)
    countable = math.isfinite(total) and total > 0 and all(c >= 0 for c in known)
    for row, contribution in zip(found, contributions, strict=True):
        row["share"] = contribution / total if countable and contribution is not None else None
    return sorted(found, key=lambda row: (row["rank"], row["micro_batch"], row["row"]))


def median_gradient(bisection: Bisection, parts: list[Part], statistics: Mapping[int, Statistics]) -> float | None:
    """The norm of the gradient of this rank's median sample; the median of the ranks."""
    finite = sorted((p for p in parts if p.loss is not None and math.isfinite(p.loss)), key=lambda p: p.loss or 0.0)
    middle = finite[len(finite) // 2 : len(finite) // 2 + 1]
    single = [Part(part.micro, part.start, part.start + 1) for part in middle]
    found = bisection.gradients(single, 1, statistics)
    known = sorted(g for of_rank in bisection.stage.gather(found) for g in of_rank if g is not None)
    return known[len(known) // 2] if known else None
