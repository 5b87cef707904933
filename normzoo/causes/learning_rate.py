"""A learning rate too large: weights, not the batch, are bad, and a smaller rate holds over the same batches."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.observations.steps import jump_of_rate
from normzoo.causes.titles import COURSE, TRIALS
from normzoo.causes.view import View, part, short

MARGIN = 0.5  # times the largest rate that holds in a trial of some tens of steps: rates that hold for longer
COMMON = "0.001 to 0.01 is common"
CRITERIA = Criteria(
    needs=("others_bad", "smaller_rate_saves", "rate_jumps"),
    points={
        "smaller_rate_saves": (3, -3),
        "others_bad": (2, -2),
        "rate_jumps": (2, 0),
        "batch_bad_early": (-1, 1),
        "own_loss_rises": (1, 0),
        "accelerates": (1, 0),
        "updates_large": (1, -1),
        "batch_alone": (-2, 0),
        "without_batch_saves": (-2, 0),
        "control_holds": (-2, 0),
        "float32_saves": (-3, 0),
        "quiet_again": (-3, 0),
        "parameter_alone": (-6, 0),
        "parameter_explains": (-4, 0),
        "parameter_runs_away": (-8, 0),
        "eps_saves": (-1, 0),
        "damaged_first": (-1, 0),
    },
    interventions=("smaller_rate_saves",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    rate = recorded_rate(view)
    held = view.number("trials", "lr")
    sentences = [f"The learning rate was too large: {'; '.join(signs(view, seen))}."]
    if seen["smaller_rate_saves"] and held is not None:
        sentences.append(held_rate(view, held, rate))
    elif seen["smaller_rate_saves"] is False:
        sentences.append("No smaller rate that was tried holds over the same batches.")
    if (clip := clipping(view)) and seen["control_holds"] is False:
        sentences.append(clip)
    return Finding(
        "learning_rate",
        CRITERIA.confidence(seen),
        " ".join(sentences),
        f"Refuted if a run at {short(held) if held else 'a tenth of the rate'} diverges at these steps as well.",
        TRIALS if seen["smaller_rate_saves"] else COURSE,
        _suggestion(view, seen, held),
        score,
    )


def signs(view: View, seen: Seen) -> list[str]:
    """What the steps show of updates that are too long, as parts of a sentence."""
    jump = jump_of_rate(view)
    found = []
    if seen["rate_jumps"] and jump is not None:
        rates = view.series("lr")
        before = max(step for step in rates if step < jump)
        found.append(f"it rose from {short(rates[before])} to {short(rates[jump])} at step {jump}")
    largest = max(
        ((x, step) for step, x in view.series("relative_update").items() if view.onset is None or step < view.onset),
        default=None,
    )
    if largest is not None and seen["updates_large"]:
        found.append(
            f"at step {largest[1]} the update moved the median weight matrix by {short(largest[0], 2)} times its norm "
            f"({COMMON})"
        )
    fatal = view.step("course", "fatal")
    own, after = (view.series(name).get(-1 if fatal is None else fatal) for name in ("loss", "after"))
    if own is not None and after is not None and after > own and seen["own_loss_rises"]:
        found.append(f"the update of step {fatal} took the loss of its own batch from {short(own)} to {short(after)}")
    if seen["others_bad"]:
        quiet, bad = (view.number("data_or_state", "loss", 1, place) for place in (1, 0))
        found.append(
            f"at the weights of step {view.onset} the loss of a quiet batch is {short(bad)}, and it was {short(quiet)}"
        )
    return found or ["the steps do not hold at it"]


def recorded_rate(view: View) -> float | None:
    """The learning rate that was recorded: the largest up to the alarm."""
    alarm = view.number("about", "step")
    rates = [x for step, x in view.series("lr").items() if alarm is None or step <= alarm]
    return max(rates, default=None)


def held_rate(view: View, held: float, rate: float | None) -> str:
    """The largest rate tried that holds, beside the one of the run."""
    rates = view.series("lr")
    at = max((step for step, x in rates.items() if x == rate), default=0)
    before = [x for step, x in rates.items() if step < at]
    rising = bool(before) and rate is not None and before[-1] < rate
    of = view.number("trials", "largest_rate")
    fraction = f", {part(of)} of it," if of and of < 1 and "times" not in part(of) else f" ({short(of, 2)} times it)"
    where = f" The rate was {short(rate)} at step {at}, and still rising." if rising else ""
    return f"{short(held)}{fraction if of else ''} holds over the same batches, and {short(rate)} does not.{where}"


def clipping(view: View) -> str:
    """Whether clipping holds, in a sentence; empty if it was not tried."""
    holds, at = view.truth("trials", "clip", "holds"), view.number("trials", "clip", "at")
    if holds is None or at is None:
        return ""
    return f"Clipping the gradient at the norm {short(at)} {'holds as well' if holds else 'does not hold'}."


def _suggestion(view: View, seen: Seen, held: float | None) -> str:
    if seen["rate_jumps"]:
        return f"Look at the schedule of the learning rate at step {jump_of_rate(view)}."
    at = "a third to a tenth of the rate"
    if held:
        at = (
            f"{short(MARGIN * held)} or less at every step: trials are short, so a margin below the {short(held)} that "
            "holds is wise"
        )
    earlier = view.of("same", "from")
    return f"Go on from a checkpoint before step {earlier} at {at}." if earlier else f"Start again at {at}."
