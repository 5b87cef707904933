"""The cause "error": an exception or a signal ended the run, and its loss had not diverged."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.observations.batch import raising
from normzoo.causes.titles import SAME, SAMPLES
from normzoo.causes.view import View, counted

CRITERIA = Criteria(
    needs=("ended_by_error",),
    points={"ended_by_error": (4, 0), "raises_again": (2, 0), "inputs_odd": (-2, 0), "rows_raise": (-3, 0)},
    interventions=("raises_again",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    step = view.of("about", "step")
    text = view.of("same", "raises") or view.of("about", "error") or view.of("about", "sentence") or "an error"
    again = {
        True: f"Step {step}, made again, raises it as well.",
        False: f"Step {step}, made again, does not raise it: something beside the weights and the batch is in it.",
        None: "The step could not be made again.",
    }[seen["raises_again"]]
    rows = [row.text("row") for row in raising(view)[:8]]
    alone = f" {counted('Row', rows)} of its batch raise{'s' * (len(rows) == 1)} it alone." if rows else ""
    return Finding(
        "error",
        CRITERIA.confidence(seen),
        f"An error ended the run at step {step}: {text}. {again}{alone}",
        "Refuted if training_step does not raise the error with this batch and these weights.",
        SAMPLES if rows else SAME,
        f"Call training_step with the batch that raised, capsule.batches({step}), in a debugger."
        if seen["raises_again"] is not False
        else "Look for what differs from the run: callbacks, files, the machine, memory that ran out.",
        score,
    )
