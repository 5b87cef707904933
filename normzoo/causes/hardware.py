"""A value that the steps do not give: memory, a race, a kernel that does not repeat, or code beside the step.

What has changed the value cannot be seen in a replay, so that the sentence names the possibilities.
"""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.titles import SAME
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("differs", "unrepeatable", "element_stands_out"),
    points={
        "differs": (2, 0),
        "quiet_again": (3, -3),
        "element_stands_out": (3, 0),
        "unrepeatable": (3, 0),
        "differs_at_once": (-1, 0),
    },
    interventions=("quiet_again",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    return Finding(
        "hardware",
        CRITERIA.confidence(seen),
        _sentence(view, seen),
        "Refuted if the steps made again on another machine, or with all callbacks of the run, diverge like the run.",
        SAME,
        _suggestion(view, seen),
        score,
    )


def _sentence(view: View, seen: Seen) -> str:
    step, of = view.of("same", "first_difference"), view.of("same", "first_difference_of")
    noise = short(view.number("same", "noise"), 2)
    if step is None or (seen["unrepeatable"] and not seen["differs"]):
        again = {True: "and repeats with deterministic algorithms", False: "also with deterministic algorithms"}
        return (
            f"A step does not come out the same when it is made again from the same state: its loss varies by {noise} "
            f"of itself{', ' + again[known] if (known := view.truth('same', 'deterministic')) is not None else ''}. "
            "A kernel that does not repeat, or random numbers that the capsule does not have, are in it."
        )
    sentence = (
        f"The {of or 'loss'} of step {step} is not what the steps give: those before it are the run's when made again, "
    )
    sentence += "and "
    difference = view.number("same", "relative_difference")
    sentence += (
        f"step {step} differs by {short(difference, 2)} of the {of or 'loss'}" if difference else "it is another"
    )
    sentence += ", and the run does not diverge. " if seen["quiet_again"] else ". "
    if seen["element_stands_out"]:
        element = ", ".join(map(short, view.numbers("same", "tensor", "element")))
        recorded, replayed, times = (
            short(view.number("same", "tensor", key)) for key in ("recorded", "replayed", "times")
        )
        sentence += (
            f"One element stands out: {view.text('same', 'tensor', 'name')}[{element}] was {recorded} in the run and "
            f"is {replayed} in the replay, {times} times what other elements deviate. "
        )
    repeats = view.truth("same", "repeatable")
    cause = "a race or a kernel that does not repeat" if repeats is False else "a flipped bit, a race"
    return f"{sentence}Something beside the recorded steps wrote to it: {cause}, or code outside of the step."


def _suggestion(view: View, seen: Seen) -> str:
    if seen["unrepeatable"] and view.truth("same", "deterministic"):
        return "Run with Trainer(deterministic=True) to see whether the divergence stays."
    return (
        "Look first for code of yours that writes to weights or gradients beside the step (callbacks, hooks); then "
        "test the device of that rank and its memory, and go on from a checkpoint before that step."
    )
