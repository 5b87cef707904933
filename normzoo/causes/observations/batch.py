"""What is observed of the suspicious batch: its losses at two states of the weights, its values, its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping

from normzoo.causes.blame import Blame
from normzoo.causes.view import View, is_broken, short

STEEP = 10.0  # times the gradient of a quiet batch
BEYOND = 10.0  # times the largest input of other batches
FEW = 1 / 4  # of the samples of a batch
MOST = 0.95  # of the loss: samples beyond those that carry it are not named
OUTLIER = 5.0  # times the loss of the median sample
CHANCE = 1.25  # times the loss of a uniform guess


def batch_alone(view: View) -> bool | None:
    """At the onset's weights the suspicious batch is out of line with quiet ones, by its loss or gradient."""
    return Blame(view).batch_alone()


def batch_bad_early(view: View) -> bool | None:
    """At the first weights, too, the suspicious batch is out of line with a quiet one."""
    return Blame(view).batch_early()


def bad_by_weights(view: View) -> bool | None:
    """The suspicious batch has a higher loss than a quiet one at the onset's weights, and not at the first weights."""
    return Blame(view).by_weights()


def batch_steep(view: View) -> bool | None:
    """The suspicious batch has ten times the gradient of a quiet batch at the same weights, and at the first ones."""
    pairs = [(view.norm_at(0, weights), view.norm_at(1, weights)) for weights in (0, 1)]
    steep = [not own <= STEEP * quiet for own, quiet in pairs if own is not None and quiet is not None]
    return all(steep) if steep else None


def others_bad(view: View) -> bool | None:
    """At the onset's weights, before its update, quiet batches are out of line with what they were at the first."""
    return Blame(view).weights_alone()


def update_harms(view: View) -> bool | None:
    """The update with the suspicious batch raises the loss of a quiet batch."""
    return view.is_high(view.number("data_or_state", "other_after"), view.loss_at(1, 0))


def inputs_odd(view: View) -> bool | None:
    """The batch has values that no other batch has: not finite, ten times the largest, or far beyond the labels."""
    rows = view.rows("inputs")
    return any(odd_input(row) for row in rows) if rows else None


def odd_input(row: View) -> str:
    """What is odd of a tensor of the batch, for people; empty if nothing is."""
    largest, usual, broken, far = (row.number(key) for key in ("max", "others_max", "nonfinite", "far"))
    if broken and not row.number("others_nonfinite"):
        return f"{short(broken)} values that are not finite"
    if far:
        between = " to ".join(map(short, row.numbers("range")))
        return f"{short(far)} values such as {_farthest(row)}, where other batches have {between}"
    if row.of("range") is None and largest is not None and usual and largest > BEYOND * usual:
        return f"values up to {short(largest)}, where those of other batches are at most {short(usual)}"
    return "the same value everywhere" if row.truth("constant") and row.truth("others_constant") is False else ""


def _farthest(row: View) -> str:
    """The whole number that is farthest from those of other batches."""
    between, own = row.numbers("range") or [0.0], [row.number(key) for key in ("lowest", "highest", "max")]
    known = [x for x in own if x is not None]
    return short(max(known, key=lambda x: max(between[0] - x, x - between[-1]), default=None))


def few_samples(view: View) -> bool | None:
    """At most a quarter of the samples carries more than half of the batch's loss."""
    if not view.truth("samples", "possible"):
        return None
    return bool(outliers(view))


def outliers(view: View) -> list[View]:
    """The few samples that carry the batch's loss; none if many do.

    Of layers that normalize over the batch those held at the statistics of a quiet batch tell first: a sample that
    moves the statistics of its own batch hides behind them. One whose own loss is small all the same is told by the
    loss of the batch without it.
    """
    if not view.truth("samples", "possible"):
        return []
    alone = view.of("samples", "alone")
    found = _outliers(View(alone), view.number("samples", "samples")) if isinstance(alone, Mapping) else []
    return found or _outliers(View(view.of("samples") or {}), view.number("samples", "samples")) or _without(view)


def _without(view: View) -> list[View]:
    """The samples without which the batch has less than half of its loss."""
    without, whole = view.number("samples", "without", "loss"), view.number("samples", "batch_loss")
    if without is None or not math.isfinite(without) or whole is None:
        return []
    return view.rows("samples", "without", "rows") if not math.isfinite(whole) or without < whole / 2 else []


def _outliers(view: View, count: float | None) -> list[View]:
    """The fewest samples, of those far above the median, that carry most of the loss, if they are few."""
    median, worst = view.number("median"), view.rows("worst")
    odd = [row for row in worst if _is_outlier(row.number("loss"), median)]
    broken = [row for row in odd if is_broken(row.number("loss"))]
    carrying, share = [], 0.0
    for row in sorted(odd, key=lambda row: row.number("share") or 0.0, reverse=True):
        if share < MOST:
            carrying.append(row)
            share += row.number("share") or 0.0
    found = broken or (carrying if share > 0.5 else [])
    few = len(found) <= max(FEW * count, 1) if count else len(found) < len(worst)
    return found if few else []


def raising(view: View) -> list[View]:
    """The samples that raise an error by themselves."""
    found = view.of("samples", "raising")
    rows = found if isinstance(found, list | tuple) else []
    return [View(row if isinstance(row, Mapping) else {"row": row}) for row in rows]


def whole_batch_wrong(view: View) -> bool | None:
    """Most samples have a higher loss than a guess among the classes, where quiet batches have a smaller one."""
    own, quiet = view.loss_at(0, 0), view.loss_at(1, 0)
    median = view.number("samples", "median") if view.truth("samples", "possible") else own
    chance = _chance(view)
    if chance is None or own is None or quiet is None or median is None:
        return None
    return min(own, median) > CHANCE * chance and quiet < chance


def few_samples_wrong(view: View) -> bool | None:
    """The few samples that carry the loss have twice the loss of a guess among the classes, as with wrong labels."""
    chance, losses = _chance(view), [row.number("loss") for row in outliers(view)]
    if chance is None or not losses:
        return None
    return all(loss is not None and not loss <= 2 * chance for loss in losses)


def _chance(view: View) -> float | None:
    """The loss of a guess among the classes; None if no tensor of the batch has classes."""
    ranges = [row.numbers("range") for row in view.rows("inputs")]
    classes = max((between[1] - between[0] + 1 for between in ranges if len(between) == 2), default=0.0)
    return math.log(classes) if 2 <= classes < math.inf else None


def rows_raise(view: View) -> bool | None:
    """Single samples of the batch raise the error, and others do not."""
    return bool(raising(view)) if view.of("samples", "error") else None


def _is_outlier(loss: float | None, median: float | None) -> bool:
    if loss is None or median is None:
        return False
    return not math.isfinite(loss) or (loss > 0 and loss > OUTLIER * median)


OBSERVATIONS = (
    batch_alone,
    batch_bad_early,
    bad_by_weights,
    batch_steep,
    others_bad,
    update_harms,
    inputs_odd,
    few_samples,
    few_samples_wrong,
    whole_batch_wrong,
    rows_raise,
)
