"""What is observed of modules and parameters: overflows, channels without variance, parameters put back."""

from __future__ import annotations

import math
from typing import Any

from normzoo.causes.observations.steps import updates_large
from normzoo.causes.observations.trials import saves
from normzoo.causes.suspects import is_of, is_oversized, restoring, running_away, suspect
from normzoo.causes.view import View

LEAST_MOVE = 0.2  # of its norm: a parameter that has moved less has not gone away
DOMINANT = 0.9  # of the squares of all updates
TENFOLD = 10.0
MOVES = 3.0  # times the move of any other parameter


def overflow(view: View) -> bool | None:
    """An operation in half precision gives values that are not finite from inputs that are."""
    if view.of("first_bad") is None:
        return None
    if _begins_broken(view):
        return None
    return view.of("first_bad", "kind") == "nonfinite" and is_half(view.of("first_bad", "dtype"))


def _begins_broken(view: View) -> bool:
    """Whether the pass begins with values that are not finite, so that it shows nothing of what made them so."""
    return bool(view.of("first_bad", "weight_nonfinite")) or view.truth("first_bad", "input_nonfinite") is True


def float32_finite(view: View) -> bool | None:
    """The same pass is finite in float32."""
    return None if _begins_broken(view) else view.truth("first_bad", "float32_finite")


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
    """More than half of the gradient that a normalization layer passes on is that of channels without variance."""
    keys = ("gradient", "gradient_of_dead")
    shares = [row.number(key) for row in view.rows("norm_layers") if row.number("dead") for key in keys]
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
    """The parameter in question has moved by three times as much of its norm as any other, biases aside."""
    name = suspect(view)
    rows = view.rows("parameters", "growth")
    own = [row for row in rows if is_of(row.text("name"), name)]
    if name is None or not rows:
        return None
    is_bias = bool(own) and all("bias" in row.text("kind") for row in own)
    others = [row for row in rows if row not in own and ("bias" in row.text("kind")) is is_bias]
    moved, other = (max(map(_move, some), default=0.0) for some in (own, others))
    return moved > MOVES * other and (moved > LEAST_MOVE or parameter_large(view) is True)


def parameter_large(view: View) -> bool | None:
    """The parameter in question is ten times as large as others of its kind, or a scalar above 10."""
    rows = view.rows("parameters", "largest")
    name = suspect(view)
    return any(is_of(row.text("name"), name) and is_oversized(row) for row in rows) if rows else None


def parameter_dominates(view: View) -> bool | None:
    """The parameter in question, and no matrix, makes up more than nine tenths of the squares of all updates."""
    name = suspect(view)
    rows = [row for row in view.rows("parameters", "growth") if is_of(row.text("name"), name)]
    shares = [row.number("share") for row in rows if row.of("kind") != "matrix"]
    return any(share is not None and share > DOMINANT for share in shares) if rows else None


def parameter_alone(view: View) -> bool | None:
    """The steps hold if that parameter stays as it was, and it made up most updates, or was large while few moved."""
    holds = frozen_saves(view)
    is_large = parameter_large(view) and not updates_large(view)  # of the median matrix: one of many that were moved
    return holds if not holds else bool(parameter_dominates(view) or is_large)


def frozen_saves(view: View) -> bool | None:
    """The steps hold if the parameter in question stays as it was first, and else they do not.

    Not counted is a trial that only diverges later than the run did, as others may follow the parameter.
    """
    holds = saves(view, "frozen") if view.of("trials", "frozen", "name") == suspect(view) else None
    return None if holds is False and _is_delayed(view) else holds


def _is_delayed(view: View) -> bool:
    """Whether the trial with a frozen parameter has a quiet loss at the onset, where the run has not."""
    losses, run, onset = view.numbers("trials", "frozen", "losses"), view.series("loss"), view.onset
    place = [*run].index(onset) if onset in run else len(losses)
    if onset is None or place >= len(losses):
        return False
    return view.is_high(run[onset], view.quiet_loss) is True and view.is_high(losses[place], view.quiet_loss) is False


def parameter_explains(view: View) -> bool | None:
    """The parameter in question has grown by ten times as much as any other, and put back it makes losses quiet."""
    # Biases begin near 0
    rows = [row for row in view.rows("parameters", "growth") if "bias" not in f"{row.text('kind')} {row.text('name')}"]
    grown = [(row.text("name"), _growth(row)) for row in rows]
    own = max((by for name, by in grown if is_of(name, suspect(view))), default=0.0)
    other = max((by for name, by in grown if not is_of(name, suspect(view))), default=0.0)
    restores = parameter_restores(view)
    return None if restores is None or not grown else restores and own > TENFOLD * max(other, 1.0)


def _growth(row: View) -> float:
    """The norm of a parameter at the onset over that at first; 1 where it is not known."""
    before, after = row.number("from"), row.number("to")
    return after / before if before and after is not None else 1.0


def parameter_runs_away(view: View) -> bool | None:
    """One parameter makes up more than 0.8 of the squares of all updates, in one direction, and has grown threefold."""
    return running_away(view) is not None if view.rows("parameters", "growth") else None


def _move(row: View) -> float:
    """How far a parameter has moved, relative to its norm before."""
    before, after, moved = row.number("from"), row.number("to"), row.number("moved")
    if before is None or after is None:
        return 0.0
    moved = abs(after - before) if moved is None else moved
    return moved / before if before and math.isfinite(moved) else math.inf


OBSERVATIONS = (
    overflow,
    float32_finite,
    half_precision,
    channel_dies,
    channel_steers,
    parameter_restores,
    parameter_suffices,
    parameter_grows,
    parameter_large,
    parameter_dominates,
    frozen_saves,
    parameter_explains,
    parameter_runs_away,
    parameter_alone,
)
