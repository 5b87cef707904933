"""Samples of the batch: the batch is bad at other weights too, and other batches are not at its weights."""

from __future__ import annotations

from normzoo.causes.blame import Blame
from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.observations.batch import odd_input, outliers, raising
from normzoo.causes.titles import BATCH_AND_WEIGHTS, INPUTS, SAMPLES, TRIALS
from normzoo.causes.view import View, counted, listed, short

_NAMED = 5  # samples in a sentence
CRITERIA = Criteria(
    needs=("batch_alone", "inputs_odd", "whole_batch_wrong", "rows_raise"),
    points={
        "rows_raise": (4, 0),
        "inputs_odd": (3, 0),
        "without_batch_saves": (3, -2),
        "whole_batch_wrong": (3, 0),
        "batch_alone": (2, -2),
        "batch_bad_early": (2, -2),
        "others_bad": (-2, 0),
        "few_samples": (1, 0),
        "few_samples_wrong": (1, 0),
        "update_harms": (1, -1),
        "accelerates": (-1, 0),
        "alarm_at_once": (0, -3),
        "control_holds": (-3, 0),
        "float32_saves": (-3, 0),
        "eps_saves": (-3, 0),
        "channel_steers": (-2, 0),
        "bad_by_weights": (-1, 0),
        "quiet_again": (-2, 0),
        "damaged_first": (-2, 0),
    },
    interventions=("without_batch_saves", "rows_raise", "batch_bad_early"),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    step = view.of("data_or_state", "batch")
    step = view.of("about", "step") if step is None else step
    named = samples_of(view)
    odd = [row for row in view.rows("inputs") if odd_input(row)]
    looked_at = next(filter(None, [named, *map(_rows, odd)]), "the samples")
    about = [*_inputs(odd), *_losses(view, seen), *_trials(view, seen)]
    return Finding(
        "data",
        "low" if seen["control_holds"] else CRITERIA.confidence(seen),  # a batch that a run survives may be a hard one
        f"The batch of step {step} is bad{f', {named}' if named else ''}: {'; '.join(about) or 'its loss is high'}.",
        f"Refuted if a run that leaves out the batch of step {step} diverges at these steps as well.",
        INPUTS if odd else SAMPLES if named else TRIALS if seen["without_batch_saves"] else BATCH_AND_WEIGHTS,
        f"Look at {looked_at} of capsule.batches({step}{_rank(view)}){_labels(seen)}, and repair or leave them out"
        f"{'; clip gradients, so that one batch cannot do as much' if view.truth('trials', 'clip', 'holds') else ''}.",
        score,
    )


def _rank(view: View) -> str:
    """The argument that asks for the batch of the rank that the samples in question are of, unless it is the first."""
    ranks = {row.number("rank") or 0 for row in (raising(view) or outliers(view))}
    return f", rank={next(iter(ranks)):.0f}" if len(ranks) == 1 and ranks != {0} else ""


def _labels(seen: Seen) -> str:
    return " and at their labels" if seen["whole_batch_wrong"] or seen["few_samples_wrong"] else ""


def samples_of(view: View) -> str:
    """The samples that carry the loss or raise the error, by their ids, else by their rows; empty if there are none.

    Of which batch they are is told by its step.
    """
    rows = raising(view) or outliers(view)
    if not rows:
        return ""
    more = [f"{len(rows) - _NAMED} others"] * (len(rows) > _NAMED)
    if all(row.of("id") is not None for row in rows):
        return counted("sample", [f"{row.of('id')} ({_place(row)})" for row in rows[:_NAMED]] + more)
    if any(row.number("rank") or row.number("micro_batch") for row in rows):
        return listed([_place(row) for row in rows[:_NAMED]] + more)
    return counted("row", [row.text("row") for row in rows[:_NAMED]] + more)


def _place(row: View) -> str:
    names = ("row", *(name for name in ("rank", "micro_batch") if row.number(name)))
    return " of ".join(f"{name.replace('_', '-')} {row.text(name)}" for name in names)


def _inputs(odd: list[View]) -> list[str]:
    places = [f" ({rows})" if (rows := _rows(row)) else "" for row in odd[:2]]
    return [f"{row.text('path')} has {odd_input(row)}{place}" for row, place in zip(odd[:2], places, strict=True)]


def _rows(row: View) -> str:
    rows = [short(number) for number in row.numbers("rows")[:_NAMED]]
    return counted("row", rows) if rows else ""


def _losses(view: View, seen: Seen) -> list[str]:
    of = Blame(view).of
    what = "loss" if of == "loss" else "gradient's norm"
    own, quiet = ([view.number("data_or_state", of, batch, weights) for weights in (0, 1)] for batch in (0, 1))
    found = []
    if seen["batch_bad_early"]:
        found.append(
            f"its {what} is {short(own[1])} at the weights of step {view.of('data_or_state', 'weights', 1)} already, "
            f"where that of a quiet batch is {short(quiet[1])}"
        )
    elif seen["batch_alone"]:
        found.append(f"its {what} is {short(own[0])}, and that of a quiet batch {short(quiet[0])} at the same weights")
    rows = outliers(view)
    if rows and seen["few_samples"]:
        share = sum(row.number("share") or 0.0 for row in rows)
        many = f"{'this sample carries' if len(rows) == 1 else f'these {len(rows)} samples carry'}"
        found.append(f"{many} {f'{share:.0%} of its' if 0 < share <= 1 else 'the'} loss")
    elif seen["whole_batch_wrong"]:
        found.append("most of its samples have a higher loss than a guess would have")
    return found


def _trials(view: View, seen: Seen) -> list[str]:
    if seen["without_batch_saves"]:
        return ["with another batch in its place the same steps hold"]
    if seen["without_batch_saves"] is False:
        return ["with another batch in its place the steps do not hold either"]
    return ["training has recovered from it"] if seen["control_holds"] else []
