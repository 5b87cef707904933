"""Whether the data or the weights make the loss bad: question 3 of a replay.

``ask`` adds to the evidence

- ``"inputs"``, a list: see :mod:`normzoo.replaying.inputs`;
- ``"parameters"``, a dict, not of an exception: see :mod:`normzoo.replaying.parameters`;
- ``"data_or_state"``, a dict of
    - ``batch``: step of the suspicious batch: the onset, or of an exception the step that raised it;
    - ``other``: step of a quiet batch; None if there is no other step;
    - ``weights``: [the onset, the first step]; weights are those before these steps, and the same if these are one;
    - ``loss``: [[of ``batch`` at the onset's weights, at the first weights], [of ``other`` likewise]];
    - ``norm``: Euclidean norms of the gradients likewise, over all parameters, before clipping; None of an exception;
    - ``other_after``: loss of ``other`` after the update with ``batch``; None if that step raises an error;
    - ``others``, ``others_first``: losses of up to 5 further quiet batches at the onset's weights, at the first;
    - ``raises``: of an exception texts like ``loss`` with the error that stands in the place of each, or None.

All losses are in training mode, under the random streams of the batch's own step. A loss that raises an error is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from normzoo._errors import one_line
from normzoo.records.schema import Schema
from normzoo.replaying.held_statistics import BatchStatisticsLayers
from normzoo.replaying.inputs import inputs
from normzoo.replaying.parameters import growth, largest, put_back
from normzoo.replaying.stage import Stage
from normzoo.replaying.tensor_sizes import gradient_norms, kinds_of

MOST_OTHERS = 5


def ask(stage: Stage, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Add the facts above to the evidence; there are no records.

    Args:
        stage: what is asked.
        evidence: with the facts ``"about"`` and ``"course"``.
    """
    onset = onset_of(stage, evidence)
    if onset is None:
        stage.notes.append("The step at the alarm cannot be made again, so its batch is not compared with others.")
        return []
    quiet = quiet_steps(stage, evidence, onset)
    if quiet and quiet[0] > onset:
        stage.notes.append(
            f"The first step that can be made again, step {onset}, is suspicious itself: its batch is compared with "
            "those of later steps, at the weights before it, and there are no earlier weights to compare with."
        )
    evidence["inputs"] = inputs(stage, onset)
    if evidence["about"]["kind"] == "exception" and not passes_alone(stage):
        stage.notes.append(
            "Ranks wait for each other within a pass of this module: the batch that raised an error is not tried again."
        )
        return []
    evidence["data_or_state"] = _two_by_two(stage, evidence, onset, quiet)
    if evidence["about"]["kind"] != "exception":
        evidence["parameters"] = _parameters(stage, evidence, onset, quiet)
    return []


def onset_of(stage: Stage, evidence: dict[str, Any]) -> int | None:
    """The step of the suspicious batch; None if it cannot be made again."""
    course = evidence.get("course") or {}
    onset = course.get("onset")
    step = stage.alarm if onset is None or evidence["about"]["kind"] == "exception" else onset
    return step if step in stage.steps else None


def quiet_steps(stage: Stage, evidence: dict[str, Any], onset: int) -> list[int]:
    """Steps of quiet batches: those before the onset whose losses are finite, else not known, else those after it.

    The first is that of the median loss, the others are spread over the ring.
    """
    course = evidence.get("course") or {}
    losses = dict(zip(course.get("steps") or [], course.get("loss") or [], strict=True))
    if not losses:
        losses = {step: _mean(stage.frame(step).losses) for step in stage.steps}
    earlier = {s: losses.get(s) for s in stage.steps if s < onset}
    finite = {s: loss for s, loss in earlier.items() if loss is not None and math.isfinite(loss)}
    unknown = [s for s, loss in earlier.items() if loss is None]
    candidates = [*finite] or unknown or [s for s in stage.steps if s > onset]
    if not candidates:
        return []
    typical = median_low([(finite.get(s, math.inf), s) for s in candidates])[1]
    rest = [s for s in candidates if s != typical]
    return [typical, *rest[:: math.ceil(len(rest) / MOST_OTHERS) or 1]]


def _two_by_two(stage: Stage, evidence: dict[str, Any], onset: int, quiet: list[int]) -> dict[str, Any]:
    first = stage.steps[0]
    fails = evidence["about"]["kind"] == "exception"
    evaluated, loss_of = (_tried, lambda stage, step: _tried(stage, step)[0]) if fails else (_evaluated, _loss)
    rows = [onset, *quiet[:1]]
    stage.go_to(first)
    at_first = [evaluated(stage, step) for step in rows]
    others_first = [loss_of(stage, step) for step in quiet[1:]]
    at_onset, others = at_first, others_first
    if onset != first:
        stage.go_to(onset)
        stage.keep()
        at_onset = [evaluated(stage, step) for step in rows]
        others = [loss_of(stage, step) for step in quiet[1:]]
    after = None
    if quiet and at_onset[0][2] is None:
        with stage.aside():
            stage.train(onset)
            after = loss_of(stage, quiet[0])
    pairs = list(zip(at_onset, at_first, strict=True))
    loss, norm, raises = ([[a[i], b[i]] for a, b in pairs] for i in range(3))
    missing = [] if quiet else [[None, None]]
    facts = {
        "batch": onset,
        "other": quiet[0] if quiet else None,
        "weights": [onset, first],
        "loss": loss + missing,
        "norm": norm + missing,
        "other_after": after,
        "others": others,
        "others_first": others_first,
    }
    return {**facts, "raises": raises + missing} if fails else facts


def _loss(stage: Stage, step: int) -> float | None:
    return stage.loss(step)


def _evaluated(stage: Stage, step: int) -> tuple[float | None, float | None, str | None]:
    """The loss of a step's batches, the norm of the gradient, and no error."""
    loss, gradient = stage.backward(step)
    return loss, math.sqrt(sum(n * n for n in gradient_norms(stage, gradient).values())), None


def _tried(stage: Stage, step: int) -> tuple[float | None, float | None, str | None]:
    """The loss of a step's batches, no norm, and the error that a batch raises; on some ranks alone, maybe."""
    losses, errors = [], []
    for place, micro in enumerate(stage.frame(step).micro_batches):
        try:
            losses.append(float(stage.loss_of_batch(micro["batch"], step, place)))
        except Exception as error:  # of the user's training_step, which an exception's capsule is about
            errors.append(error_line(error))
    told = stage.gather((losses, errors))
    raised = [error for _, of_rank in told for error in of_rank]
    values = [loss for of_rank, _ in told for loss in of_rank]
    return (None, None, raised[0]) if raised else (sum(values) / len(values), None, None)


def passes_alone(stage: Stage) -> bool:
    """Whether a rank can make a pass that others do not make, or in which it raises an error."""
    synchronized = BatchStatisticsLayers(stage.module).synchronized
    return stage.ranks == 1 or (stage.run.layout != "sharded" and not synchronized)


def error_line(error: BaseException) -> str:
    """An error with its class, on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def _parameters(stage: Stage, evidence: dict[str, Any], onset: int, quiet: list[int]) -> dict[str, Any]:
    updates = (evidence.get("course") or {}).get("updates") or {"before": onset, "of": {}}
    first_step, until = stage.steps[0], updates["before"]
    stage.go_to(first_step)
    first = stage.parameters()
    stage.go_to(until)
    last = stage.parameters()
    stage.go_to(onset)
    gradient = gradient_norms(stage, stage.backward(onset)[1])
    kinds = kinds_of(stage.module)
    facts, candidates = growth(first, last, updates["of"], gradient, kinds)
    return {
        "steps": [first_step, until],
        "growth": facts,
        "largest": largest(last, kinds),
        **put_back(stage, first, candidates, quiet[0] if quiet else None, onset, onset),
    }


def _mean(losses: Sequence[Sequence[float | None]]) -> float | None:
    """The mean of losses; None if one is not known."""
    values = [value for of_ranks in losses for value in of_ranks]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
