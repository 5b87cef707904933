"""Question 1 of a replay: are the steps made again those of the run, and what course do loss and weights take?

All steps are made once more from the first snapshot. Losses, norms, checksums and the weights at the end are compared
with those of the run, one step is repeated, and the first step that is out of line is found.

Facts:
    ``same``: ``from`` and ``to``, the first and last step made; ``first_difference``, the first step that differs from
        the run, and ``first_difference_of``, its ``"loss"`` or ``"norm"``, or the ``"weights"`` before it;
        ``relative_difference`` of these losses or norms; ``tensor``, the element that deviates most (see
        :func:`normzoo.replaying.comparison.standing_out`), and ``tensor_step``, before which step; ``repeatable``,
        ``noise`` and ``deterministic`` (see :func:`normzoo.replaying.repeats.repeat`); ``diverges_again``, whether the
        steps made again leave as well; ``raises``, the error that a step has raised again, and ``raises_step``.
    ``course``: for each of ``steps`` its ``loss``, the loss ``after`` its update on its own batch, the ``norm`` of the
        gradient before clipping, the ``lr``, and ``relative_update``, the median over weight matrices of the norm of
        the update over that of the matrix; ``median_loss``, ``median_norm`` and ``spread_loss``, ``spread_norm`` of
        the quiet steps (see :class:`normzoo.replaying.levels.Level`); ``onset`` and ``onset_by``, the first step out
        of line (see :func:`normzoo.replaying.levels.find_onset`); ``others_high``, whether other batches have high
        losses at the onset's weights too; ``fatal``, the step whose update did most; ``accelerating``;
        ``updates``, of each parameter the sum of the norms of its updates ``before`` the onset (the alarm if the onset
        is the first step), and that of their squares; ``passes``, which :class:`normzoo.replaying.stage.Stage` counts.
    ``seconds``: ``step``, of one step made again, and ``steps``, of all of them once.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from normzoo.records.schema import Column, Figure, Schema
from normzoo.replaying.against_the_run import Difference
from normzoo.replaying.comparison import relative_difference
from normzoo.replaying.levels import Level, Series, find_fatal, find_onset, is_accelerating, level_of
from normzoo.replaying.repeats import repeat
from normzoo.replaying.stage import Stage
from normzoo.replaying.walk import Walk, loss_or_none, made_again, recorded_losses

COURSE = Schema(
    "replay_course",
    "one step made again",
    (
        Column("loss", "float", "loss before the update, mean over micro-batches and ranks"),
        Column("after", "float", "loss on the same batch after the update"),
        Column("norm", "float", "Euclidean norm of the gradient, reduced, unscaled, before clipping"),
        Column("lr", "float", "learning rate of the first parameter group of the first optimizer"),
        Column("relative_update", "float", "median over weight matrices of the norm of the update over the matrix's"),
    ),
    (
        Figure(
            "Norm of the gradient at the replayed steps",
            "line",
            x="step",
            y="norm",
            y_scale="log",
            y_label="norm of the gradient",
        ),
        Figure(
            "Relative update",
            "line",
            x="step",
            y="relative_update",
            y_scale="log",
            level=1e-3,
            y_label="norm of update / weight, median",
        ),
    ),
)
LOSSES = Schema(
    "replay_losses",
    "one step, before its update, after it, and as it was in the run",
    (
        Column("when", "text", "before the update, after the update, or in the run"),
        Column("loss", "float", "loss on the step's batch, mean over micro-batches and ranks"),
    ),
    (
        Figure(
            "Loss on the batch before and after its update",
            "line",
            x="step",
            y="loss",
            lines=("when",),
            y_scale="log",
            y_label="loss on the step's batch",
        ),
    ),
)
PARAMETERS = Schema(
    "replay_parameters",
    "one step made again and parameter",
    (
        Column("layer", "text", "name of the parameter"),
        Column("depth", "int", "place of the parameter in the module"),
        Column("dimensions", "int", "number of dimensions of the parameter, 1 for a bias"),
        Column("weight", "float", "Euclidean norm of the parameter before the step"),
        Column("gradient", "float", "Euclidean norm of its gradient, before clipping; null without"),
        Column("update", "float", "Euclidean norm of what the step adds"),
        Column("relative_update", "float", "`update` over `weight`; null if `weight` is 0"),
    ),
    tuple(
        Figure(title, "line", x="step", y=y, lines=("layer",), y_scale="log", y_label=label, level=level)
        for title, y, label, level in (
            ("Weight norm by parameter", "weight", "norm of the parameter", None),
            ("Gradient norm by parameter", "gradient", "norm of the gradient", None),
            ("Relative update by parameter", "relative_update", "norm of update / weight", 1e-3),
        )
    ),
)
_OTHERS = 3  # quiet batches that are evaluated at the onset's weights
_FAR = 10.0  # times the level: beyond what single batches reach in a run that goes on


def ask(stage: Stage, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Make the steps again; see the module's docstring.

    Returns:
        the records ``replay_losses``, ``replay_course`` and ``replay_parameters``.
    """
    before = stage.passes.copy()
    last = max(i for i, step in enumerate(stage.steps) if step <= stage.alarm or i == 0)
    recorded = recorded_losses(stage)
    recorded_norms = [stage.frame(step).norm for step in stage.steps]
    expected, _ = find_onset(recorded, recorded_norms, last, _is_scaled(stage))
    walk = made_again(stage, keep={stage.steps[i] for i in (max(expected - 1, 0), expected, last)})
    made = len(walk.losses)
    last = min(last, made)  # a step that raises is the first that is not made
    losses, norms = _known(recorded, walk.losses), _known(recorded_norms, walk.norms)
    onset, by = find_onset(losses, norms, last, _is_scaled(stage))
    level, others_high = _others(stage, walk, onset)
    passes = stage.passes - before
    accelerating = is_accelerating(norms[: last + 1]) or is_accelerating(losses[: last + 1])
    gradual = by == "alarm" and accelerating
    fatal = onset if walk.raises else find_fatal(walk.losses, walk.after, onset, others_high, gradual, last)
    evidence["course"] = {
        "steps": stage.steps[:made],
        "loss": walk.losses,
        "after": walk.after,
        "norm": walk.norms,
        "lr": [stage.frame(step).lr for step in stage.steps[:made]],
        "relative_update": walk.relative_updates,
        **_level_facts("loss", level),
        **_level_facts("norm", level_of(walk.norms[:onset])),
        "onset": stage.steps[onset],
        "onset_by": by,
        "others_high": others_high,
        "fatal": stage.steps[fatal],
        "accelerating": accelerating,
        "updates": walk.updates(stage.steps[onset or last]),
        "passes": dict(passes),
    }
    evidence["same"] = _same(stage, walk, stage.steps[onset], stage.steps[fatal], losses[: last + 1], norms[: last + 1])
    seconds = {"step": statistics.median(walk.seconds) if walk.seconds else None, "steps": sum(walk.seconds)}
    evidence["seconds"] = {**evidence.get("seconds", {}), **seconds}
    return [(LOSSES, _losses(stage, walk, recorded)), (COURSE, _course(evidence["course"])), (PARAMETERS, walk.rows)]


def _same(stage: Stage, walk: Walk, onset: int, fatal: int, losses: Series, norms: Series) -> dict[str, Any]:
    """The facts on whether the steps are those of the run, and come out the same when one is repeated."""
    difference = walk.compared.difference
    if difference and stage.ranks < stage.recorded_ranks and difference.step >= onset:
        difference = None  # sums in another order become another course where a run diverges
    facts: dict[str, Any] = {
        "from": stage.steps[0],
        "to": stage.steps[max(len(walk.losses) - 1, 0)],
        "first_difference": difference.step if difference else None,
        "first_difference_of": difference.of if difference else None,
        "relative_difference": difference.relative if difference else 0.0,
        "tensor": walk.compared.tensor,
        "tensor_step": walk.compared.tensor_step,
        "raises": walk.raises,
        "raises_step": walk.raises_step,
        "diverges_again": _diverges_again(stage, walk, difference, losses, norms),
    }
    target = fatal
    if difference and difference.step in stage.steps:
        target = difference.step
    if walk.raises is not None:  # which passes after another step may raise as well
        return {**facts, "repeatable": None, "noise": None, "deterministic": None}
    return {**facts, **repeat(stage, target)}


def _diverges_again(stage: Stage, walk: Walk, difference: Difference | None, losses: Series, norms: Series) -> bool:
    """Whether the steps made again leave the line far, or come half of the way that the run had come at the alarm."""
    last = len(losses) - 1
    if walk.raises or difference is None or difference.step > stage.steps[last]:
        return True
    onset, by = find_onset(walk.losses, walk.norms, last, _is_scaled(stage))
    half_way = []
    for run, again in ((losses, walk.losses), (norms, walk.norms)):
        level = level_of(again[:onset])
        if by != "alarm" and _is_far(again[onset : last + 1], level):
            return True
        had, has = run[last], again[last]
        if had is not None and has is not None:
            half_way.append(_comes_half_way(has, had, level))
    return all(half_way)


def _is_far(values: Series, level: Level | None) -> bool:
    """Whether a value is not finite, or ten times the level; any is if there is no level."""
    known = [x for x in values if x is not None]
    return any(level is None or not x <= level.times(_FAR) for x in known)


def _comes_half_way(again: float, run: float, level: Level | None) -> bool:
    """Whether a value reaches half of what the run had; if that is not finite, ten times the level."""
    if not math.isfinite(again) or (math.isfinite(run) and again >= run):
        return True
    if not math.isfinite(run):
        return _is_far([again], level)
    return relative_difference(run, again) <= 0.5


def _others(stage: Stage, walk: Walk, onset: int) -> tuple[Level | None, bool]:
    """The level of quiet losses, and whether quiet batches have losses above it at the onset's weights.

    If the onset is the first step, the level is that of the other batches at the same weights.
    """
    step = stage.steps[onset]
    others = range(max(onset - _OTHERS, 0), onset) if onset else range(1, min(_OTHERS + 1, len(stage.steps)))
    stage.go_to(step)
    stage.keep()
    made = [loss_or_none(stage, stage.steps[i]) for i in others if stage.steps[i] != walk.raises_step]
    passed = [loss for loss in made if loss is not None]
    if not onset:
        return level_of(passed), False
    level = level_of(walk.losses[:onset])
    passed = [math.inf if math.isnan(loss) else loss for loss in passed]
    return level, level is not None and bool(passed) and statistics.median(passed) > level.times(2)


def _level_facts(name: str, level: Level | None) -> dict[str, float | None]:
    found = (level.middle, level.spread) if level is not None else (None, None)
    return dict(zip((f"median_{name}", f"spread_{name}"), found, strict=True))


def _losses(stage: Stage, walk: Walk, recorded: Series) -> list[dict[str, Any]]:
    lines = {"before the update": walk.losses, "after the update": walk.after, "in the run": recorded}
    return [
        {"step": step, "when": when, "loss": loss}
        for when, series in lines.items()
        for step, loss in zip(stage.steps, series, strict=False)
    ]


def _course(facts: dict[str, Any]) -> list[dict[str, Any]]:
    names = [c.name for c in COURSE.columns if c.name != "step"]
    return [{"step": step, **{name: facts[name][i] for name in names}} for i, step in enumerate(facts["steps"])]


def _is_scaled(stage: Stage) -> bool:
    return any(stage.frame(step).scale is not None for step in stage.steps)


def _known(recorded: Series, replayed: Series) -> list[float | None]:
    """What the run had, or where that is not known, or no number, what the steps made again have."""
    again = [*replayed, *[None] * (len(recorded) - len(replayed))]
    made = len(replayed)
    return [
        b if a is None or (math.isnan(a) and b is None and i < made) else a
        for i, (a, b) in enumerate(zip(recorded, again, strict=True))
    ]
