"""What is told of the samples of a suspicious batch: facts and the record ``replay_samples``."""

from __future__ import annotations

import math
from typing import Any

import torch

from normzoo.callbacks._run.batches import bit_sum, hexadecimal
from normzoo.records.schema import Column, Figure, Schema
from normzoo.replaying.batch_rows import tensor_leaves
from normzoo.replaying.bisection import Part

MOST_WORST = 8
SAMPLES = Schema(
    "replay_samples",
    "one sample of the suspicious batch, or several in one pass",
    (
        Column("rank", "int", "the rank that the sample was on"),
        Column("micro_batch", "int", "place of the micro-batch among those of the step, from 0"),
        Column("row", "int", "place of the sample along the first dimension of the batch, or of the first of several"),
        Column("samples", "int", "samples in the pass, 1 or more"),
        Column("loss", "float", "loss of the pass, layers that normalize over the batch held at its statistics"),
        Column("share", "float", "share of the pass in the batch's loss; null if that is not known"),
        Column("alone", "float", "loss of the pass with these layers held at the statistics of a quiet batch, or null"),
        Column("gradient", "float", "Euclidean norm of the gradient of the pass's loss; null where it was not taken"),
        Column("id", "text", "what identifies the sample; null if that is not known"),
    ),
    (
        Figure(
            "Loss of single samples",
            "line",
            x="row",
            y="loss",
            lines=("rank", "micro_batch"),
            y_scale="log",
            x_label="row of the batch",
            y_label="loss of the sample",
        ),
    ),
)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``worst``, ``median``, ``nonfinite`` and ``evaluated`` of described parts."""
    single = [row for row in rows if row["samples"] == 1 and row["loss"] is not None]
    keys = ("row", "rank", "micro_batch", "id", "hash", "loss", "share", "gradient")
    order = sorted(
        single, key=lambda row: (not math.isfinite(row["loss"]), row["loss"] if math.isfinite(row["loss"]) else 0.0)
    )
    finite = sorted(
        (row["loss"], row["samples"]) for row in rows if row["loss"] is not None and math.isfinite(row["loss"])
    )
    return {
        "worst": [{key: row[key] for key in keys} for row in order[::-1][:MOST_WORST]],
        "median": _weighted_median(finite),
        "nonfinite": sum(not math.isfinite(row["loss"]) for row in single),
        "evaluated": len(single),
    }


def record_rows(step: int, rows: list[dict[str, Any]], alone: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``replay_samples``: of each pass by either statistics one, of the same samples one together."""
    merged: dict[tuple[int, ...], dict[str, Any]] = {}
    for of_pass, name in ((rows, "loss"), (alone, "alone")):
        for row in of_pass:
            key = tuple(row[k] for k in ("rank", "micro_batch", "row", "samples"))
            about = {"step": step, **dict(zip(("rank", "micro_batch", "row", "samples"), key, strict=True))}
            known = merged.setdefault(key, {**about, "loss": None, "alone": None, "share": None, "gradient": None})
            known[name] = row["loss"]
            known["id"] = None if row["id"] is None else str(row["id"])
            if name == "loss":
                known |= {"share": row["share"], "gradient": row["gradient"]}
    return [merged[key] for key in sorted(merged)]


def has_dropout(module: torch.nn.Module) -> bool:
    """Whether a module draws dropout masks: one of its modules is called so, or has a rate of its own, as an LSTM."""
    for m in module.modules():
        rates = [getattr(m, name, 0.0) for name in ("p", "drop_prob")] if "Drop" in type(m).__name__ else []
        rates.append(getattr(m, "dropout", 0.0))
        if m.training and any(isinstance(rate, float | int) and rate > 0 for rate in rates):
            return True
    return False


def place_of(part: Part) -> dict[str, int]:
    """Where a part's first sample stands."""
    return {"rank": part.micro.rank, "micro_batch": part.micro.number, "row": part.start}


def described(part: Part) -> dict[str, Any]:
    """Where a sample stands, and what identifies it."""
    return {**place_of(part), "id": own_id(part), "hash": sample_hash(part) if part.samples == 1 else None}


def sample_hash(part: Part) -> str:
    """Checksums of a sample's tensors, as hexadecimal digits."""
    leaves = tensor_leaves(part.micro.part(part.start, part.stop))
    return " ".join(hexadecimal(bit_sum(x)) for _, x in leaves if x.numel())


def own_id(part: Part) -> Any:
    """What identifies the sample of a part, as plain data; None for several samples, or if it is not known."""
    if part.micro.ids is None or part.samples != 1:
        return None
    value = part.micro.ids[part.start]
    return value if isinstance(value, str | int | float) else str(value)


def _weighted_median(values: list[tuple[float, int]]) -> float | None:
    """The median of sorted values, each of which counts several times."""
    total, seen = sum(count for _, count in values), 0
    for value, count in values:
        seen += count
        if 2 * seen >= total:
            return value
    return None
