"""How the loss of a batch follows from the losses of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from normzoo.replaying.batch_rows import tensor_leaves
from normzoo.replaying.bisection import MicroBatch, Part
from normzoo.replaying.stage import Stage

LIMIT, LIMIT_WITH_DROPOUT = 0.05, 0.25  # of the relative difference between the batch's loss and its samples'
MEAN = "the mean over samples"


def check(
    stage: Stage,
    micros: Sequence[MicroBatch],
    parts: Sequence[Part],
    losses: Sequence[float | None],
    *,
    own_statistics: bool,
    dropout: bool,
) -> dict[str, Any]:
    """The facts ``reduction``, ``check`` and ``why_not`` of a step, the same on all ranks.

    Args:
        stage: whose ranks ask together.
        micros: micro-batches of this process.
        parts: all of their samples.
        losses: of the whole micro-batches.
        own_statistics: whether the parts were normalized by the statistics of their own batch.
        dropout: whether dropout masks differ between the batch and its parts.
    """
    differences: dict[str, float] = {}
    for micro, whole in zip(micros, losses, strict=True):
        own = [part for part in parts if part.micro is micro]
        if whole is None or _is_broken(whole) or not own_statistics:
            continue
        for name, weight, divided in weightings(micro):
            difference = relative_difference(combined(own, weight, divided), whole)
            differences[name] = max(difference, differences.get(name, 0.0))
    broken = [any(_is_broken(loss) for loss in of) for of in (losses, [part.loss for part in parts])]
    tables = stage.gather((differences, *broken))
    whole_broken, parts_broken = (any(table[i] for table in tables) for i in (1, 2))
    merged: dict[str, float] = {}
    for table, _, _ in tables:
        for name, difference in table.items():
            merged[name] = max(difference, merged.get(name, 0.0))
    if whole_broken and not parts_broken and own_statistics:
        return {"why_not": "the loss of the batch is not finite, and the loss of each of its samples is"}
    if not merged:
        return {"why_not": "", "reduction": MEAN, "check": None}
    name = min(merged, key=lambda n: merged[n])
    if merged[name] <= (LIMIT_WITH_DROPOUT if dropout else LIMIT):
        return {"why_not": "", "reduction": name, "check": merged[name]}
    if not math.isfinite(merged[name]):
        return {"why_not": "the loss of the batch is finite, and the losses of some of its samples are not"}
    return {
        "check": merged[name],
        "why_not": (
            f"the loss of the batch is {100 * merged[name]:.0f} % away from what the losses of its samples make, as "
            "where the loss compares samples, a layer mixes them, or means are taken over lengths that differ"
        ),
    }


def weighting(micro: MicroBatch, name: str) -> tuple[Callable[[Part], float], bool]:
    """The weight of a part by the name of a reduction, and whether the sum of the weights divides."""
    return next((weight, divided) for known, weight, divided in weightings(micro) if known == name)


def weightings(micro: MicroBatch) -> Iterator[tuple[str, Callable[[Part], float], bool]]:
    """How the loss of a batch may be made from those of its parts.

    Yields:
        a name, the weight of a part, and whether the sum of the weighted losses is divided by the sum of the weights.
    """
    yield MEAN, lambda part: float(part.samples), True
    yield "the sum over samples", lambda part: 1.0, False
    for path, x in tensor_leaves(micro.batch):
        if x.dim() != 2 or len(x) != micro.samples or x.is_floating_point() or x.is_complex():
            continue
        for what, counted in (("not -100", x != -100), ("not 0", x != 0)):
            for after, counts in (("", counted.sum(1)), (" after the first", counted[:, 1:].sum(1))):
                name = f"the mean over the values{after} of {path} that are {what}"
                yield name, partial(_count, counts), True


def combined(parts: list[Part], weight: Callable[[Part], float], divided: bool) -> float:
    """The loss of a micro-batch by those of its parts; parts of weight 0 do not count."""
    weights: list[float] = [weight(part) for part in parts]
    total = sum(w * part.loss for w, part in zip(weights, parts, strict=True) if w and part.loss is not None)
    whole = sum(weights) if divided else 1.0
    return total / whole if whole else total


def relative_difference(made: float, whole: float) -> float:
    """How far a loss made of those of samples is from the batch's, relative to that; infinite if it is not finite."""
    return abs(made - whole) / max(abs(whole), 1e-12) if math.isfinite(made) else math.inf


def _count(counts: Tensor, part: Part) -> float:
    return float(counts[part.start : part.stop].sum())


def _is_broken(loss: float | None) -> bool:
    return loss is not None and not math.isfinite(loss)
