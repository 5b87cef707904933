"""Which parameter makes the loss bad: by the losses with each of them put back."""

from __future__ import annotations

import math

from normzoo.causes.view import View

BAD = 1.5  # times the loss with all parameters put back: a smaller loss has nothing to be put back for
STEPS = 10  # of the ring, by which a parameter can be seen to run away
GROWN, MOST, STRAIGHT = 3.0, 0.8, 0.9  # times its norm; of all squared updates; |sum of updates| over sum of |updates|
STILL_GROWN = 1.5  # times its norm, of a parameter that is oversized, as it has grown before
PART, VERY_STRAIGHT = 0.1, 0.97  # as MOST and STRAIGHT, of a parameter that grows far more than all others
LARGE = 10.0  # times the root mean square of others of its kind
NEAR = 0.2  # of the way, on a log scale, from the loss with all put back to that without: nearer is restored


def restoring(view: View) -> tuple[View | None, bool | None]:
    """The row of ``put_back`` that restores a quiet loss alone, and whether there is one.

    A module with several parameters counts if none of its parameters restores by itself.

    Returns:
        (row, True); (None, False) if none or several do; (None, None) if it was not asked, or the loss was not bad.
    """
    place = 0 if view.of("parameters", "loss_before", 0) is not None else 1
    before = view.number("parameters", "loss_before", place)
    back = view.number("parameters", "loss_all_back", place)
    rows = view.rows("parameters", "put_back")
    if before is None or back is None or not rows or not math.isfinite(back) or before <= back + (BAD - 1) * abs(back):
        return None, None
    restored = [row for row in rows if _is_near(row.number("loss", place), before, back)]
    single = [row for row in restored if row.of("parameters", 1) is None]
    found = single or restored
    return (found[0], True) if len(found) == 1 else (None, False)


def suspect(view: View) -> str | None:
    """The parameter that runs away, or restores the loss, else one that is oversized, else the one that moved most."""
    row = running_away(view) or restoring(view)[0]
    oversized = [row for row in view.rows("parameters", "largest") if is_oversized(row)]
    names = [row.of("name") for row in (*([row] if row else []), *oversized)]
    names += [view.of("trials", "frozen", "name"), view.of("parameters", "growth", 0, "name")]
    return next((name for name in names if isinstance(name, str)), None)


def running_away(view: View) -> View | None:
    """The row of ``growth`` of a parameter that all steps move in one direction, and further than all others.

    It has grown, and makes up most of all updates, or has grown several times as much as any other.
    """
    rows = view.rows("parameters", "growth") if len(view.series("loss")) >= STEPS else []
    oversized = {row.text("name") for row in view.rows("parameters", "largest") if is_oversized(row)}
    for row in rows:
        grown, name = growth_of(row), row.text("name")
        share, straightness = row.number("share") or 0.0, row.number("straightness") or 0.0
        leads = share > MOST and grown > (STILL_GROWN if name in oversized else GROWN)
        # Biases begin near 0
        others = [growth_of(other) for other in rows if other is not row and "bias" not in other.text("kind")]
        alone = grown > GROWN * max([1.0, *others]) and share > PART and straightness > VERY_STRAIGHT
        if (leads and straightness > STRAIGHT) or alone:
            return row
    return None


def growth_of(row: View) -> float:
    """How many times its first norm a row of ``growth`` has as its last; 0 if that is not known."""
    before, after = row.number("from"), row.number("to")
    return after / before if before and after is not None else 0.0


def is_oversized(row: View) -> bool:
    """Whether a row of ``largest`` is of a parameter far larger than others of its kind, or of a large scalar."""
    size, usual = row.number("rms"), row.number("kind_median")
    return size is not None and size > LARGE * (usual or 1.0)


def is_of(name: str, owner: str | None) -> bool:
    """Whether a parameter is the one of a name, or of the module of that name."""
    return owner is not None and f"{name}.".startswith(f"{owner}.")


def _is_near(loss: float | None, before: float, back: float) -> bool:
    if loss is None or not math.isfinite(loss):
        return False
    if not math.isfinite(before):
        return loss <= back + (BAD - 1) * abs(back)
    if min(loss, before, back) > 0:
        return math.log(loss / back) <= NEAR * math.log(before / back)
    return loss - back <= NEAR * (before - back)
