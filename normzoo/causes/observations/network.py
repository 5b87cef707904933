"""What is observed of modules and parameters: overflows, channels without variance, parameters put back."""

from __future__ import annotations

import math
from typing import Any

from normzoo.causes.suspects import restoring
from normzoo.causes.view import View


def overflow(view: View) -> bool | None:
    """An operation in half precision gives values that are not finite from inputs that are."""
    if view.of("first_bad") is None:
        return None
    made = view.of("first_bad", "kind") == "nonfinite" and not view.truth("first_bad", "input_nonfinite")
    return made and is_half(view.of("first_bad", "dtype")) and not view.of("first_bad", "weight_nonfinite")


def float32_finite(view: View) -> bool | None:
    """The same pass is finite in float32."""
    return view.truth("first_bad", "float32_finite")


def half_precision(view: View) -> bool | None:
    """The run has parameters or passes in half precision."""
    precision = view.of("about", "precision")
    return None if precision is None else "16" in str(precision) or is_half(view.of("first_bad", "dtype"))


def is_half(dtype: Any) -> bool:
    """Whether a dtype, by its name, is of 16 bits or fewer."""
    return any(name in str(dtype) for name in ("float16", "half", "float8"))


def channel_dies(view: View) -> bool | None:
    """A channel of a normalization layer has less variance than eps, which it had not at the quiet step."""
    rows = view.rows("norm_layers")
    return bool(dead_layers(view)) if rows else None


def dead_layers(view: View) -> list[View]:
    """Layers with a channel whose variance has fallen below eps."""
    return [row for row in view.rows("norm_layers") if row.number("dead") and _fell(row)]


def _fell(row: View) -> bool:
    eps, quiet = row.number("eps"), row.number("variance_quiet")
    return eps is not None and (quiet is None or quiet >= eps)


def channel_steers(view: View) -> bool | None:
    """More than half of the gradient that a normalization layer passes on is that of a channel without variance."""
    shares = [row.number("gradient") for row in view.rows("norm_layers") if row.number("dead")]
    known = [share for share in shares if share is not None]
    return max(known) > 0.5 if known else None


def parameter_restores(view: View) -> bool | None:
    """One parameter or module, put back to its first value, makes quiet losses quiet again, and no other does."""
    return restoring(view)[1]


def parameter_suffices(view: View) -> bool | None:
    """That parameter alone makes quiet losses high at the first weights."""
    row, _ = restoring(view)
    return None if row is None else view.is_high(row.number("only", 0), view.number("parameters", "loss_first", 0))


def parameter_grows(view: View) -> bool | None:
    """One parameter has grown steadily to more than three times its norm, and no other to more than twice."""
    rows = view.rows("parameters", "growth")
    grown = sorted(((_growth(row), row.number("straightness") or 0.0) for row in rows), reverse=True)
    if not grown:
        return None
    return grown[0][0] > 3 and grown[0][1] > 0.7 and (len(grown) == 1 or grown[1][0] < 2)


def _growth(row: View) -> float:
    before, after = row.number("from"), row.number("to")
    return after / before if before and after is not None and math.isfinite(after) else 0.0 if before else math.inf


OBSERVATIONS = (
    overflow,
    float32_finite,
    half_precision,
    channel_dies,
    channel_steers,
    parameter_restores,
    parameter_suffices,
    parameter_grows,
)
