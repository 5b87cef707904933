"""No warm-up: a rate that the weights bear once they have been trained a little, and not from the first step on."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.learning_rate import recorded_rate, signs
from normzoo.causes.observations import Seen
from normzoo.causes.titles import TRIALS
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("warm_up_saves",),
    points={
        "warm_up_saves": (4, -3),
        "first_steps": (2, -6),
        "smaller_rate_saves": (1, -2),
        "others_bad": (2, -2),
        "rate_jumps": (-2, 0),
        "batch_bad_early": (-1, 1),
        "own_loss_rises": (1, 0),
        "accelerates": (1, 0),
        "updates_large": (1, -1),
        "batch_alone": (-2, 0),
        "without_batch_saves": (-2, 0),
        "float32_saves": (-3, 0),
        "quiet_again": (-3, 0),
        "parameter_alone": (-6, 0),
        "parameter_explains": (-6, 0),
        "parameter_runs_away": (-10, 0),
        "eps_saves": (-1, 0),
    },
    interventions=("warm_up_saves",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    rate, steps = recorded_rate(view), view.number("trials", "warm_up", "steps")
    over = f"over {short(steps)} steps" if steps else "over the same steps"
    return Finding(
        "warm_up",
        CRITERIA.confidence(seen),
        f"The learning rate of {short(rate)} was full too early in the run: {'; '.join(signs(view, seen))}. "
        f"A rate that rises to {short(rate)} {over} holds over the same batches; one that is full at once does not.",
        f"Refuted if a run that warms up to {short(rate)} diverges once the rate is full.",
        TRIALS,
        f"Warm the learning rate up to {short(rate)}, over ten times as many steps to begin with"
        f"{f' ({short(10 * steps)})' if steps else ''}.",
        score,
    )
