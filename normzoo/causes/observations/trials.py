"""What is observed in trials: what holds where the same steps, unchanged, do not."""

from __future__ import annotations

from normzoo.causes.view import View


def control_holds(view: View) -> bool | None:
    """The same steps, made again and gone on from with quiet batches, come back to quiet losses."""
    return view.truth("trials", "control", "holds")


def smaller_rate_saves(view: View) -> bool | None:
    """The steps hold at a smaller learning rate, and else they do not."""
    if control_holds(view) is not False or not view.rows("trials", "rates"):
        return None
    return any(row.truth("holds") is True for row in view.rows("trials", "rates"))


def without_batch_saves(view: View) -> bool | None:
    """The steps hold with quiet batches in the place of the onset's, or of all from there on, and else they do not."""
    made = [holds for trial in ("without_batch", "without_batches") if (holds := saves(view, trial)) is not None]
    return any(made) if made else None


def warm_up_saves(view: View) -> bool | None:
    """The steps hold if the learning rate rises from 0 over them, and else they do not."""
    return saves(view, "warm_up")


def float32_saves(view: View) -> bool | None:
    """The steps hold in float32, and else they do not."""
    return saves(view, "float32")


def eps_saves(view: View) -> bool | None:
    """The steps hold with a larger eps in one normalization layer, and else they do not."""
    return saves(view, "eps")


def saves(view: View, trial: str) -> bool | None:
    """Whether a trial holds where the same steps, unchanged, do not; None if that was not tried."""
    return view.truth("trials", trial, "holds") if control_holds(view) is False else None


OBSERVATIONS = (
    control_holds,
    smaller_rate_saves,
    without_batch_saves,
    warm_up_saves,
    float32_saves,
    eps_saves,
)
