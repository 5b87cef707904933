"""What is said when the evidence is too weak, or contradictory: why, and what would tell more."""

from __future__ import annotations

from collections.abc import Sequence

from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.titles import BATCH_AND_WEIGHTS, COURSE, SAME, TRIALS
from normzoo.causes.view import View, short


def judge(view: View, seen: Seen, considered: Sequence[Finding]) -> Finding:
    """The finding.

    Args:
        view: of the evidence.
        seen: what was observed.
        considered: findings of other causes, none of which has enough points.
    """
    why, suggestion, figure = _why(view, seen)
    weak = f" What speaks most is {considered[0].cause.replace('_', ' ')}, but not enough." if considered else ""
    refuted = "Refuted if one of the trials is seen to hold in a run of its own."
    return Finding("undetermined", "low", f"{why}{weak}", refuted, figure, suggestion, 0.0)


def _why(view: View, seen: Seen) -> tuple[str, str, str]:
    first = view.of("same", "from")
    if view.of("about", "kind") == "signal":
        return "A signal ended the run, which was not diverging.", "Look at the log of the job's scheduler.", COURSE
    if seen["differs_at_once"]:
        return (
            f"The cause cannot be told, as the first step made again, step {first}, is not that of the run already: "
            "the module, its arguments, its callbacks or the machine are others.",
            "Give the replay the module and the callbacks of the run.",
            SAME,
        )
    if seen["quiet_again"] and view.of("same", "first_difference") is not None:
        return (
            "The cause cannot be told, as the steps made again differ from the run's and do not diverge.",
            "Replay on the machine of the run, with as many ranks and threads.",
            SAME,
        )
    if seen["damaged_first"]:
        level = short(view.quiet_loss)
        return (
            f"The cause cannot be told, as it lies before the capsule: at step {first}, the first that is kept, losses "
            f"are high already ({level}).",
            "Keep more steps, such as Recorder(steps=64), or give Divergence a rule with a lower threshold.",
            COURSE,
        )
    if seen["control_holds"] is None:
        return (
            "The cause cannot be told, as no trials could be made.",
            "See the notes on what was not possible.",
            TRIALS,
        )
    if seen["batch_alone"] is None:
        return (
            "The cause cannot be told, as there is no quiet batch to compare with.",
            "Keep more steps, such as Recorder(steps=64).",
            BATCH_AND_WEIGHTS,
        )
    return (
        "The cause cannot be told, as what was observed does not agree on one.",
        "See the trials on the page for what holds, and keep more steps, such as Recorder(steps=64).",
        TRIALS,
    )
