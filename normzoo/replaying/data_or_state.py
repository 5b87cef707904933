"""Whether the data or the weights make the loss bad: question 3 of a replay.

``ask`` adds to the evidence

- ``"inputs"``, a list: see :mod:`normzoo.replaying.inputs`;
- ``"parameters"``, a dict, not of an exception: see :mod:`normzoo.replaying.parameters`;
- ``"data_or_state"``, a dict of
    - ``batch``: step of the suspicious batch: the onset, or of an exception the step that raised it;
    - ``other``: step of a quiet batch; None if there is no other step;
    - ``weights``: [the onset, the first step]; weights are those before these steps, and the same if these are one;
    - ``loss``: [[of ``batch`` at the onset's weights, at the first weights], [of ``other`` likewise]];
    - ``norm``: Euclidean norms of the gradients likewise, over all parameters, before clipping;
    - ``other_after``: loss of ``other`` after the update with ``batch``; None if that step raises an error;
    - ``others``, ``others_first``: losses of up to 5 further quiet batches at the onset's weights, at the first;
    - ``raises``: of an exception texts like ``loss`` with the error that stands in the place of each, or None.

All losses are in training mode, under the random streams of the batch's own step. A loss that raises an error is None.
"""

from __future__ import annotations

import math
from statistics import median_low
from typing import Any

from normzoo._errors import one_line
from normzoo.records.schema import Schema
from normzoo.replaying.inputs import inputs
from normzoo.replaying.parameters import growth, largest, path_of, put_back
from normzoo.replaying.tensor_sizes import gradient_norms, kinds_of

MOST_OTHERS = 5


def ask(stage: Any, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Add the facts above to the evidence; there are no records.

    Args:
        stage: a :class:`normzoo.replaying.stage.Stage`.
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
    evidence["data_or_state"] = _two_by_two(stage, evidence, onset, quiet)
    if evidence["about"]["kind"] != "exception":
        evidence["parameters"] = _parameters(stage, onset, quiet)
    return []


def onset_of(stage: Any, evidence: dict[str, Any]) -> int | None:
    """The step of the suspicious batch; None if it cannot be made again."""
    course = evidence.get("course") or {}
    onset = course.get("onset")
    step = stage.alarm if onset is None or evidence["about"]["kind"] == "exception" else onset
    return step if step in stage.steps else None


def quiet_steps(stage: Any, evidence: dict[str, Any], onset: int) -> list[int]:
    """Steps of quiet batches: those before the onset whose losses are finite, else those after it.

    The first is that of the median loss, the others are spread over the ring.
    """
    course = evidence.get("course") or {}
    losses = dict(zip(course.get("steps") or [], course.get("loss") or [], strict=True))
    if not losses:
        losses = {step: _mean(stage.frame(step).losses) for step in stage.steps}
    known = {s: losses[s] for s in stage.steps if s != onset and losses.get(s) is not None}
    known = {s: loss for s, loss in known.items() if math.isfinite(loss)}
    candidates = [s for s in known if s < onset] or [s for s in stage.steps if s > onset]
    if not candidates:
        return []
    typical = median_low([(known.get(s, math.inf), s) for s in candidates])[1]
    rest = [s for s in candidates if s != typical]
    return [typical, *rest[:: math.ceil(len(rest) / MOST_OTHERS) or 1]]


def _two_by_two(stage: Any, evidence: dict[str, Any], onset: int, quiet: list[int]) -> dict[str, Any]:
    first = stage.steps[0]
    fails = evidence["about"]["kind"] == "exception"
    rows = [onset, *quiet[:1]]
    stage.go_to(first)
    at_first = [_evaluated(stage, step, fails) for step in rows]
    others_first = [_loss(stage, step, fails) for step in quiet[1:]]
    at_onset, others = at_first, others_first
    if onset != first:
        stage.go_to(onset)
        stage.keep()
        at_onset = [_evaluated(stage, step, fails) for step in rows]
        others = [_loss(stage, step, fails) for step in quiet[1:]]
    after = None
    if quiet:
        with stage.aside():
            try:
                stage.train(onset)
                after = stage.loss(quiet[0])
            except Exception:  # of the user's training_step, which an exception's capsule is about
                if not fails:
                    raise
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


def _evaluated(stage: Any, step: int, fails: bool) -> tuple[float | None, float | None, str | None]:
    """The loss of a step's batches, the norm of the gradient, and the error that stands in their place."""
    try:
        loss, gradient = stage.backward(step)
    except Exception as error:  # of the user's training_step, which an exception's capsule is about
        if not fails:
            raise
        return None, None, error_line(error)
    return loss, math.sqrt(sum(n * n for n in gradient_norms(stage, gradient).values())), None


def _loss(stage: Any, step: int, fails: bool) -> float | None:
    try:
        loss: float = stage.loss(step)
    except Exception:  # of the user's training_step, which an exception's capsule is about
        if not fails:
            raise
        return None
    return loss


def error_line(error: BaseException) -> str:
    """An error with its class, on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def _parameters(stage: Any, onset: int, quiet: list[int]) -> dict[str, Any]:
    first_step = stage.steps[0]
    until = onset if onset != first_step else max([s for s in stage.steps if s <= stage.alarm] + stage.steps[1:2])
    first, last, updates = path_of(stage, until)
    stage.go_to(onset)
    gradient = gradient_norms(stage, stage.backward(onset)[1])
    kinds = kinds_of(stage.module)
    facts, candidates = growth(first, last, updates, gradient, kinds)
    return {
        "steps": [first_step, until],
        "growth": facts,
        "largest": largest(last, kinds),
        **put_back(stage, first, candidates, quiet[0] if quiet else None, onset, onset),
    }


def _mean(losses: list[list[float]]) -> float:
    values = [value for of_ranks in losses for value in of_ranks]
    return sum(values) / len(values) if values else math.nan
