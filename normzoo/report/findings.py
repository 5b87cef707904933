"""What a capsule shows of the steps before its alarm, and its replay of their cause, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from normzoo.capsules import Capsule
from normzoo.causes import Findings

COMMON_UPDATE = "0.001 to 0.01"  # norm of an update relative to a weight matrix's, in training that goes well
_NAMED = 3  # parameters in a sentence
_MOST_CAUSES = 3
_MEASURED = {"step", "layer", "dimensions", "gradient", "nonfinite", "weight", "relative_update"}


def findings(capsule: Capsule) -> list[str]:
    """Sentences on the last steps: loss and gradient, what is not finite, the largest gradients, updates, remaking."""
    norms = capsule.records.get("parameter_norms")
    measured = norms is not None and not norms.empty and set(norms) >= _MEASURED
    of_parameters = [_not_finite(norms), _largest(norms), _updates(norms)] if measured else []
    sentences = [
        course_of(capsule.rows, capsule.about.get("step")),
        *of_parameters,
        _made_again(capsule.about),
        _batch_of_error(capsule),
    ]
    return [sentence for sentence in sentences if sentence]


def causes_of(replayed: Findings) -> list[str]:
    """A sentence or more for each of the likeliest causes; the first with what would refute it, and what to do."""
    first, *others = replayed.causes[:_MOST_CAUSES]
    likeliest = f"Replayed; the likeliest cause, {first.confidence} confidence: {first.sentence}"
    return [
        " ".join(filter(None, [likeliest, first.refuted_by, first.suggestion])),
        *(f"Also possible, {other.confidence} confidence: {other.sentence}" for other in others),
    ]


def course_of(rows: Sequence[Mapping[str, Any]], alarm: Any) -> str:
    """Loss, gradient and learning rate: first, halfway, where the norm was largest, before and at the alarm.

    Args:
        rows: of :attr:`normzoo.capsules.Capsule.rows`.
        alarm: its step; if it is not known, the last steps are described.
    """
    judged = [row for row in rows if row["loss"] is not None or row["norm"] is not None]
    known = sorted({row["step"] for row in judged if not isinstance(alarm, int) or row["step"] <= alarm})
    places = {0, len(known) // 2, max(len(known) - 2, 0), len(known) - 1} if known else set()
    norms = [largest_of_step(rows, step, "norm") for step in known[:-1]]
    finite = {place: norm for place, norm in enumerate(norms) if norm is not None and math.isfinite(norm)}
    places |= {max(finite, key=finite.__getitem__)} if finite else set()
    steps = [known[place] for place in sorted(places)]
    courses = []
    for column, name in (("loss", "loss"), ("norm", "gradient norm"), ("lr", "learning rate")):
        values = [largest_of_step(rows, step, column) for step in steps]
        if any(value is not None for value in values):
            courses.append(f"{name} {', '.join('–' if value is None else _short(value) for value in values)}")
    at = f"At step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
    return f"{at}: {'; '.join(courses)}." if courses else ""


def by_gradient(norms: pd.DataFrame) -> pd.DataFrame:
    """A row for each parameter at the last step of a record ``parameter_norms``, the largest gradient first.

    Columns are ``gradient`` and ``relative_update``, and those of the first step, ``gradient_before`` and
    ``relative_update_before``.
    """
    first, last = (
        norms[norms["step"] == step].drop_duplicates("layer").set_index("layer")[["gradient", "relative_update"]]
        for step in (norms["step"].min(), norms["step"].max())
    )
    both = last.join(first.add_suffix("_before"))
    return both.sort_values("gradient", ascending=False, na_position="first", kind="stable")


def largest_of_step(rows: Sequence[Mapping[str, Any]], step: int, column: str) -> float | None:
    """The largest known value of a step over micro-batches and ranks; NaN is the largest; None if none is known."""
    values = [row[column] for row in rows if row["step"] == step and row[column] is not None]
    return next((value for value in values if value != value), max(values, default=None))


def _not_finite(norms: pd.DataFrame) -> str:
    """The first step at which a gradient is not finite, in which parameters, and whether weights were finite before."""
    step = _first_not_finite(norms)
    if step is None:
        return ""
    at = norms[norms["step"] == step]
    gradients, weights = at.loc[at["nonfinite"] > 0, "layer"], at.loc[~np.isfinite(at["weight"]), "layer"]
    where = f"all {len(at)} parameters"
    if len(gradients) < len(at):
        where = f"{len(gradients)} of {len(at)} parameters: {_first_few(gradients)}"
    before = f"not finite before its update: {_first_few(weights)}" if len(weights) else "all finite before its update"
    return f"Step {step} is the first whose gradient is not finite, in {where}. Weights are {before}."


def before_not_finite(norms: pd.DataFrame) -> pd.DataFrame:
    """The steps before the first whose gradient is not finite; all of them if it is that from the first on."""
    step = _first_not_finite(norms) if "nonfinite" in norms else None
    finite = norms if step is None else norms[norms["step"] < step]
    return norms if finite.empty else finite


def _first_not_finite(norms: pd.DataFrame) -> int | None:
    steps = norms.loc[norms["nonfinite"] > 0, "step"]
    return None if steps.empty else int(steps.min())


def _largest(norms: pd.DataFrame) -> str:
    """The largest gradients at the last step at which all are finite."""
    first_odd = _first_not_finite(norms)
    finite = norms if first_odd is None else norms[norms["step"] < first_odd]
    if finite.empty:
        return ""
    first, last = finite["step"].min(), finite["step"].max()
    named = []
    for layer, row in by_gradient(finite).head(_NAMED).iterrows():
        before = f", at step {first} {_short(row['gradient_before'])}" if first < last else ""
        named.append(f"{layer} ({_short(row['gradient'])}{before})")
    return f"The largest gradient norms at step {last} are those of {_listed(named)}."


def _updates(norms: pd.DataFrame) -> str:
    """How far the last update moves weights, the one before it, and the first, which a warm-up may make tiny."""
    updates = norms.dropna(subset=["relative_update"])
    if updates.empty:
        return ""
    matrices = updates[updates["dimensions"] > 1]  # biases begin near 0, where any update is large beside them
    medians = (updates if matrices.empty else matrices).groupby("step")["relative_update"].median()
    places = sorted({0, max(len(medians) - 2, 0), len(medians) - 1}, reverse=True)
    sizes = [f"{_short(medians.iloc[place], 2)} times its norm at step {medians.index[place]}" for place in places]
    return (
        f"The update moves the median {'parameter' if matrices.empty else 'weight matrix'} by {_listed(sizes)}; "
        f"{COMMON_UPDATE} is common."
    )


def _made_again(about: Mapping[str, Any]) -> str:
    remade = about.get("remade")
    if not isinstance(remade, Mapping):
        return ""
    if "from" not in remade:
        return f"No steps were made again: {remade.get('why_not')}."
    if remade.get("why_not"):
        return f"Making the steps from {remade['from']} on again failed: {remade['why_not']}."
    steps = f"Steps {remade['from']} to {remade.get('to')} were made again"
    if remade.get("first_difference") is not None:
        return f"{steps}; from step {remade['first_difference']} on their losses differ from those of the run."
    return f"{steps}, with the losses of the run, bit for bit."


def _batch_of_error(capsule: Capsule) -> str:
    """Where the batch is in which an error was raised, if a rank has kept it."""
    step, rank = capsule.about.get("step"), capsule.about.get("rank", 0)
    frames = [row for row in capsule.rows if row["step"] == step and row["rank"] == rank]
    if capsule.about.get("kind") != "exception" or not frames or frames[-1]["ids"] or frames[-1]["hash"]:
        return ""
    arguments = f"{step}, rank={rank}" if rank else f"{step}"
    return f"The batch of step {step}, in which the error was raised, is capsule.batches({arguments})."


def _short(value: float, digits: int = 3) -> str:
    """A number of few digits, without an exponent from 0.0001 to 999999."""
    return f"{float(f'{value:.{digits}g}'):g}"


def _first_few(names: pd.Series) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
