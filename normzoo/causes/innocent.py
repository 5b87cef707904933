"""Nothing that is broken: a hard batch, after which training goes on as before."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.data import samples_of
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.titles import BATCH_AND_WEIGHTS, TRIALS
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("control_holds",),
    points={
        "control_holds": (3, 0),
        "others_bad": (-2, 1),
        "update_harms": (-1, 1),
        "batch_alone": (1, 0),
        "bad_by_weights": (-4, 0),
        "inputs_odd": (-3, 0),
        "whole_batch_wrong": (-3, 0),
        "channel_steers": (-3, 0),
        "losses_rise": (-3, 0),
        "accelerates": (-2, 0),
        "not_finite": (-3, 0),
        "quiet_again": (-4, 0),
        "damaged_first": (-4, 0),
    },
    interventions=("control_holds",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    step, loss = view.of("data_or_state", "batch"), view.number("data_or_state", "loss", 0, 0)
    before, after = view.number("data_or_state", "loss", 1, 0), view.number("data_or_state", "other_after")
    about = ["the same steps, gone on from with quiet batches, come back to quiet losses"]
    if before is not None and after is not None:
        about.insert(
            0, f"a quiet batch has the loss {short(before)} before the update with it and {short(after)} after"
        )
    hard = f"The batch of step {step} is a hard one" if seen["batch_alone"] else "Nothing is broken"
    at = f", with the loss {short(loss)}" if loss is not None and seen["batch_alone"] else ""
    return Finding(
        "innocent",
        CRITERIA.confidence(seen),
        f"{hard}{at}, and training goes on as before: {', and '.join(about)}.",
        "Refuted if the run, gone on with, does not come back to its losses.",
        TRIALS if before is None else BATCH_AND_WEIGHTS,
        f"{_labels(view)}Let the run go on; raise the threshold of the rule{_rule(view)} if such alarms come often.",
        score,
    )


def _labels(view: View) -> str:
    named = samples_of(view)
    return f"Look whether the labels of {named}, which carry its loss, are right. " if named else ""


def _rule(view: View) -> str:
    rule = view.of("about", "rule")
    return f" ({rule})" if rule else ""
