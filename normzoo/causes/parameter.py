"""One parameter that has grown or exploded, while the others are as they were."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.suspects import restoring, suspect
from normzoo.causes.titles import PARAMETERS, TRIALS
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("parameter_restores", "frozen_saves", "parameter_grows", "parameter_large", "parameter_runs_away"),
    points={
        "parameter_grows": (3, -4),
        "parameter_restores": (2, -2),
        "parameter_explains": (4, 0),
        "parameter_runs_away": (14, 0),
        "frozen_saves": (2, -6),
        "parameter_suffices": (1, -1),
        "parameter_dominates": (5, 0),
        "parameter_large": (2, 0),
        "others_bad": (1, -1),
        "updates_large": (-4, 1),
        "batch_alone": (-2, 0),
        "float32_saves": (-2, 0),
        "quiet_again": (-20, 0),
        "control_holds": (-5, 0),
    },
    interventions=("frozen_saves", "parameter_restores"),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    name, growth = suspect(view), _growth(view)
    about = []
    if growth is not None:
        before, after = (growth.number(key) for key in ("from", "to"))
        first, last = view.of("parameters", "steps", 0), view.of("parameters", "steps", 1)
        over = f" from step {first} to {last}" if last is not None else ""
        about.append(f"its norm went from {short(before)} to {short(after)}{over}")
    if seen["parameter_restores"]:
        row, _ = restoring(view)
        bad, restored = view.number("parameters", "loss_before", 0), row.number("loss", 0) if row else None
        about.append(
            f"put back to its first value it takes the loss of a quiet batch from {short(bad)} to {short(restored)}, "
            "and no other does"
        )
    elif seen["parameter_restores"] is False:
        about.append("put back to their first values, several parameters or none make the loss quiet again")
    if seen["frozen_saves"] is not None:
        about.append(f"the same steps {'hold' if seen['frozen_saves'] else 'do not hold'} if it stays as it was")
    return Finding(
        "parameter",
        CRITERIA.confidence(seen),
        f"The parameter {name} went away on its own: {'; '.join(about)}.",
        f"Refuted if the run diverges at these steps with {name} frozen as well.",
        PARAMETERS if seen["parameter_restores"] else TRIALS,
        f"Bound {name} (clamp it, or give it weight decay), or give it a parameter group with a smaller learning rate.",
        score,
    )


def _growth(view: View) -> View | None:
    return next((row for row in view.rows("parameters", "growth") if row.of("name") == suspect(view)), None)
