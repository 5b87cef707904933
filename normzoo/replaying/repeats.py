"""Whether a step that is made several times from the same state comes out the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from normzoo.callbacks._run.batches import checksums
from normzoo.replaying.comparison import difference_of_losses, relative_difference
from normzoo.replaying.stage import Stage

_TIMES = 3


class Made(NamedTuple):
    """What came of a step: losses of micro-batches and ranks, the loss after the update, checksums of the weights."""

    losses: list[list[float]]
    after: float
    weights: dict[str, str]


def repeat(stage: Stage, step: int) -> dict[str, Any]:
    """Make a step three times from the same state, and if it does not repeat, by deterministic algorithms as well.

    The state is that before the step afterwards.

    Returns:
        ``repeatable``, whether losses and weights were the same in every bit, on all ranks; ``noise``, the largest
        relative difference of the loss among the repetitions, before or after the update; ``deterministic``, whether
        it repeats under ``torch.use_deterministic_algorithms(True)``, None if that was not tried.
    """
    made = _make(stage, step)
    repeatable = _are_alike(stage, made)
    deterministic = None
    if not repeatable and not torch.are_deterministic_algorithms_enabled():
        deterministic = _repeats_deterministically(stage, step)
    return {"repeatable": repeatable, "noise": _noise(made), "deterministic": deterministic}


def _make(stage: Stage, step: int) -> list[Made]:
    stage.go_to(step)
    state = stage.state()
    made = []
    try:
        for _ in range(_TIMES):
            stage.put(state, step)
            stage.train(step)
            losses = stage.last_losses
            made.append(Made(losses, stage.loss(step), checksums(stage.parameters())))
    finally:
        stage.put(state, step)
    return made


def _are_alike(stage: Stage, made: list[Made]) -> bool:
    first = made[0]
    own = all(
        difference_of_losses(first.losses, other.losses) is None and first.weights == other.weights for other in made
    )
    return all(stage.gather(own))


def _noise(made: list[Made]) -> float:
    losses = [sum(loss for of_ranks in m.losses for loss in of_ranks) for m in made]
    pairs = [(losses[0], x) for x in losses] + [(made[0].after, m.after) for m in made]
    return max(relative_difference(a, b) for a, b in pairs)


def _repeats_deterministically(stage: Stage, step: int) -> bool:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return _are_alike(stage, _make(stage, step))
    except RuntimeError as error:  # of an operation that has no deterministic algorithm, which it names
        if "deterministic" not in str(error):
            raise
        stage.notes.append(
            f"Step {step} could not be made by deterministic algorithms: {str(error).splitlines()[0].split('. ')[0]}."
        )
        return False
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warn_only)
