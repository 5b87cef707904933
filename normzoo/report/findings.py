"""What a capsule shows of the steps before its alarm, in sentences and in a table of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from normzoo.capsules import Capsule

COMMON_UPDATE = 1e-3  # norm of an update relative to the weight's, in training that goes well
_NAMED = 3  # parameters in a sentence
_MEASURED = {"step", "layer", "gradient", "nonfinite", "relative_update"}


def findings(capsule: Capsule) -> list[str]:
    """Sentences on the last steps: loss and gradient, the largest gradients, updates, and what was made again."""
    norms = capsule.records.get("parameter_norms")
    measured = norms is not None and not norms.empty and set(norms) >= _MEASURED
    of_parameters = [_nonfinite(norms), _largest(norms), _updates(norms)] if measured else []
    sentences = [_rise(capsule.rows, capsule.about.get("step")), *of_parameters, _made_again(capsule.about)]
    return [sentence for sentence in sentences if sentence]


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


def _rise(rows: Sequence[Mapping[str, Any]], alarm: Any) -> str:
    steps = [row["step"] for row in rows if not isinstance(alarm, int) or row["step"] <= alarm]
    if not steps or steps[0] == steps[-1]:
        return ""
    changes = []
    for column, name in (("loss", "loss"), ("norm", "gradient norm"), ("lr", "learning rate")):
        before, after = (largest_of_step(rows, step, column) for step in (steps[0], steps[-1]))
        if before is not None and after is not None:
            changes.append(f"{name} from {before:.3g} to {after:.3g}")
    return f"Step {steps[0]} to step {steps[-1]}: {', '.join(changes)}." if changes else ""


def _nonfinite(norms: pd.DataFrame) -> str:
    odd = norms[norms["nonfinite"] > 0]
    if odd.empty:
        return ""
    step = odd["step"].min()
    layers, all_layers = ([*frame.loc[frame["step"] == step, "layer"]] for frame in (odd, norms))
    named = ", ".join(layers[:_NAMED]) + (", ..." if len(layers) > _NAMED else "")
    counts = f"{len(layers)} of {len(all_layers)}"
    return f"Step {step} is the first whose gradient is not finite, in {counts} parameters: {named}."


def _largest(norms: pd.DataFrame) -> str:
    first, last = norms["step"].min(), norms["step"].max()
    named = []
    for layer, row in by_gradient(norms).head(_NAMED).iterrows():
        before = f", at step {first} {row['gradient_before']:.3g}" if first < last else ""
        named.append(f"{layer} ({row['gradient']:.3g}{before})")
    return f"The largest gradient norms at step {last} are those of {_listed(named)}."


def _updates(norms: pd.DataFrame) -> str:
    updates = norms.dropna(subset=["relative_update"])
    if updates.empty:
        return ""
    medians = updates.groupby("step")["relative_update"].median()
    before = f" and by {medians.iloc[0]:.2g} times at step {medians.index[0]}" if len(medians) > 1 else ""
    return (
        f"The update moves the median parameter by {medians.iloc[-1]:.2g} times its norm at step {medians.index[-1]}"
        f"{before}; about {COMMON_UPDATE:g} is common."
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


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
