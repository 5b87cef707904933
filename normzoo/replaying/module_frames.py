"""Question 4: in which module values first went wrong, by forward and backward frames of a bad and of a quiet step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from normzoo.functional.finite_moments import COUNT, HIGH, LOW, MEAN, finite_std
from normzoo.records.schema import Column, Figure, Schema
from normzoo.replaying.calls import Watch
from normzoo.replaying.first_bad import (
    Merged,
    earliest,
    first_jump,
    merge_calls,
    merge_ranks,
)
from normzoo.replaying.norm_statistics import NormStatistics, Statistics, layers_with_news, over_ranks
from normzoo.replaying.origins import all_finite
from normzoo.replaying.trail import Trail, of_operation

if TYPE_CHECKING:
    from normzoo.replaying.stage import Stage

MOST_CALLS = 8  # of a module in a micro-batch that are recorded
SIDES = ("input", "output", "gradient")
MODULES = Schema(
    "replay_modules",
    "one frame, call of a module, and side of it",
    (
        Column("step", "int", "step whose batch passes through the module"),
        Column(
            "frame", "text", "`bad`: the batch of the onset at its weights; `quiet`: another one at the first weights"
        ),
        Column("module", "text", "name of the module"),
        Column("call", "int", "place of the call among those of the module in a micro-batch, from 0"),
        Column("class", "text", "class of the module"),
        Column("depth", "int", "place among all calls of a micro-batch, in the order in which they return, from 0"),
        Column("side", "text", "`input`, `output`, or `gradient`, that of the loss with respect to the output"),
        Column("min", "float", "least finite value, over micro-batches and ranks"),
        Column("max", "float", "greatest finite value"),
        Column("mean", "float", "mean of the finite values"),
        Column("std", "float", "standard deviation of the finite values"),
        Column("largest", "float", "largest finite magnitude"),
        Column("nonfinite", "int", "values that are infinite or NaN"),
    ),
    (
        Figure(
            "Outputs of modules, the batch and a quiet one",
            "line",
            x="depth",
            y="largest",
            lines=("frame",),
            facet="side",
            y_scale="log",
            x_label="depth (calls of modules)",
            y_label="largest finite magnitude",
        ),
        Figure(
            "Values that are not finite over depth",
            "line",
            x="depth",
            y="nonfinite",
            lines=("frame",),
            facet="side",
            y_scale="signed log",
            x_label="depth (calls of modules)",
            y_label="values that are not finite",
        ),
    ),
)


def ask(stage: Stage, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Pass the onset's batch at the onset's weights, and a quiet batch at the first weights, and compare the modules.

    Adds to the evidence:

    - ``first_bad``: the first module whose output (``direction`` forward) or gradient (backward) is not finite though
      what it is given is (``kind`` nonfinite); else the first that is more than 10 times larger than in the quiet pass
      though what it is given is not (jump); None for neither. Its ``module`` and ``class``, ``"training_step"`` outside
      of all modules, and ``depth`` among the calls of the pass. ``times`` and ``input_times``: how many times the root
      mean square of its output and its input is that of the quiet pass (backward: of the gradient at its input and at
      its output). Of the operation that makes the first values that are not finite: ``op``, ``dtype``, ``input_max``,
      the largest magnitude of its inputs, and ``limit``, the largest number of its dtype; None if such values are in
      the batch (``input_nonfinite``) or in weights (``weight_nonfinite``, their names). ``float32_finite``: whether the
      pass is finite in float32; None if half precision has no part in it. ``jump``: beside values that are not finite,
      the first module that is more than 10 times larger, by its finite values. If the pass raises an error: ``error``,
      its text, and ``module``, where it is raised, alone.
    - ``norm_layers``: see :func:`normzoo.replaying.norm_statistics.layers_with_news`.

    Returns:
        the record ``replay_modules``.
    """
    evidence["first_bad"], evidence["norm_layers"] = None, []
    onset = _step(stage, (evidence.get("course") or {}).get("onset"))
    other = (evidence.get("data_or_state") or {}).get("other")
    quiet_step = next((s for s in (other, *stage.steps) if s in stage.steps and s != onset), None)
    quiet = _Frame()
    if quiet_step is not None:
        stage.go_to(stage.steps[0])
        quiet = _pass(stage, quiet_step)
    stage.go_to(onset)
    bad = _pass(stage, onset, follow=True)
    if bad.error:
        evidence["first_bad"] = {"step": onset, "module": bad.module, "error": bad.error}
        return []
    ranks = zip(*stage.gather([bad.merged, bad.norms, quiet.merged, quiet.norms]), strict=True)
    merged, norms, quiet_merged, quiet_norms = (list(of_ranks) for of_ranks in ranks)
    bad_calls, quiet_calls = merge_ranks(merged), merge_ranks(quiet_merged)
    nonfinite, jump = earliest(stage.gather(bad.nonfinite)), _jump(bad_calls, quiet_calls)
    if (found := nonfinite or jump) is not None:
        told = ("module", "class", "direction", "depth", "times")
        found["jump"] = {key: jump[key] for key in told} if nonfinite and jump else None
        finite = _finite_in_float32(stage, onset, found, evidence)
        evidence["first_bad"] = {"step": onset, **found, "float32_finite": finite}
    layers = NormStatistics(stage.run).layers
    evidence["norm_layers"] = layers_with_news(layers, over_ranks(norms), over_ranks(quiet_norms))
    if any(m.number >= MOST_CALLS for m in bad_calls):
        stage.notes.append(f"of modules that are called more often the first {MOST_CALLS} calls are recorded")
    frames = (("bad", onset, bad_calls), ("quiet", quiet_step, quiet_calls))
    rows = [row for frame, step, calls in frames for m in calls for row in _rows(frame, step, m)]
    finite = not any(row["nonfinite"] for row in rows)
    return [(replace(MODULES, figures=MODULES.figures[:1]) if finite else MODULES, rows)]


@dataclass
class _Frame:
    """What one pass of a step's batches tells on this rank."""

    merged: list[Merged] = field(default_factory=list)
    norms: dict[str, Statistics] = field(default_factory=dict)
    nonfinite: dict[str, Any] | None = None  # of the first bad module, if values are not finite
    module: str = ""  # that has raised
    error: str = ""


def _pass(stage: Stage, step: int, follow: bool = False) -> _Frame:
    """Pass the batches of a step forward and backward at the present weights.

    Args:
        stage: in which they pass.
        step: whose batches.
        follow: whether to find out where values come from that are not finite.
    """
    trail = Trail(stage.run)
    watch, origins, norms = trail.watch, trail.origins, NormStatistics(stage.run, trail.origins.paused)
    try:
        with watch, norms, origins if follow else nullcontext():
            loss, gradients = stage.backward(step)
    except Exception as error:  # of the user's code, which has ended the run
        if stage.capsule.about.get("kind") != "exception":
            raise
        return _Frame(module=watch.module, error=f"{type(error).__name__}: {error}")
    frame = _Frame(merge_calls(watch.calls), norms.found)
    if follow:
        frame.nonfinite = trail.first_nonfinite(frame.merged, math.isfinite(loss), gradients)
    return frame


def _jump(bad: list[Merged], quiet: list[Merged]) -> dict[str, Any] | None:
    """What is to tell of the first module that is far larger than in the quiet pass."""
    if (jump := first_jump(bad, quiet)) is None:
        return None
    direction, call, times, of_input = jump
    return {
        "direction": direction,
        "kind": "jump",
        "module": call.name,
        "class": call.class_,
        **of_operation(None),
        "times": times,
        "input_times": None if math.isnan(of_input) else of_input,
        "depth": call.depth,
        "input_nonfinite": False,
        "weight_nonfinite": [],
    }


def _finite_in_float32(stage: Stage, step: int, found: dict[str, Any], evidence: dict[str, Any]) -> bool | None:
    """Whether values are finite in float32 that are not in half precision; None if that has no part in it."""
    half = "16" in str((evidence.get("about") or {}).get("precision")) or "float16" in str(found["dtype"])
    if found["kind"] != "nonfinite" or not half:
        return None
    with Watch(stage.run, sides=()), stage.float32():
        loss, gradients = stage.backward(step)
    return all(stage.gather(math.isfinite(loss) and all(map(all_finite, gradients.values()))))


def _step(stage: Stage, onset: int | None) -> int:
    """The onset, or the last step before it that can be made again."""
    return max((s for s in stage.steps if onset is None or s <= onset), default=stage.steps[0])


def _rows(frame: str, step: int | None, call: Merged) -> list[dict[str, Any]]:
    rows = []
    for side in SIDES:
        if call.number >= MOST_CALLS or (moments := call.moments.get(side)) is None:
            continue
        empty = not moments[COUNT]
        least, greatest, mean = (math.nan if empty else moments[i] for i in (LOW, HIGH, MEAN))
        rows.append(
            {
                "step": step,
                "frame": frame,
                "module": call.name,
                "call": call.number,
                "class": call.class_,
                "depth": call.depth,
                "side": side,
                "min": least,
                "max": greatest,
                "mean": mean,
                "std": finite_std(torch.tensor(moments, dtype=torch.float64)).item(),
                "largest": math.nan if empty else max(abs(least), abs(greatest)),
                "nonfinite": call.nonfinite(side),
            }
        )
    return rows
