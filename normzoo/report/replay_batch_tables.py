"""Tables of a replay's third question, whether the batch or the weights make the loss bad, and which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normzoo.report.cells import Table, is_number, listing_of, mapping_at, rows_at, table_of, text_of, value_at


def batch_and_weights(evidence: Mapping[str, Any]) -> list[Table]:
    """Losses and gradient norms of two batches at two weights."""
    facts = mapping_at(evidence, "data_or_state")
    now, first = (value_at(facts, "weights", place) for place in (0, 1))
    columns = [0] if now == first else [0, 1]
    rows = []
    for place, key in enumerate(("batch", "other")):
        if facts.get(key) is not None:
            row = {"batch of step": f"{text_of(facts[key])}{' (suspicious)' if key == 'batch' else ''}"}
            for quantity, name in (("loss", "loss"), ("norm", "gradient norm")):
                for column in columns:
                    value = value_at(facts, quantity, place, column)
                    row[f"{name} at the weights of step {text_of((now, first)[column])}"] = text_of(value)
            rows.append(row)
    notes = []
    if (after := facts.get("other_after")) is not None:
        notes.append(f"After the update with the suspicious batch the loss of the other batch is {text_of(after)}.")
    if others := facts.get("others"):
        notes.append(f"Losses of further quiet batches at the weights of step {text_of(now)}: {text_of(others)}.")
    return [Table(rows, " ".join(notes))]


def inputs(evidence: Mapping[str, Any]) -> list[Table]:
    """The tensors of the batch beside those of others."""
    columns = {
        "path": "input",
        "dtype": "dtype",
        "max": "largest magnitude",
        "others_max": "of other batches",
        "nonfinite": "not finite",
        "range": "range of other batches",
        "outside": "outside of it",
        "constant": "all equal",
        "rows": "rows that stand out",
    }
    note = "The tensors of the suspicious batch beside those of the other batches, the most unusual first."
    return [table_of(rows_at(evidence, "inputs"), columns, note)]


def samples(evidence: Mapping[str, Any]) -> list[Table]:
    """The samples of the batch with the highest losses, and those that raise."""
    facts = mapping_at(evidence, "samples")
    columns = {
        "row": "row",
        "id": "sample",
        "rank": "rank",
        "micro_batch": "micro-batch",
        "loss": "loss",
        "share": "share of the total",
        "gradient": "gradient norm",
        "hash": "hash",
    }
    notes = [f"Samples with the highest losses; that of the median sample is {text_of(facts.get('median'))}."]
    if held := facts.get("held"):
        of = facts.get("statistics_of")
        whose = f"the batch of step {text_of(of)}" if of is not None else "the whole batch"
        notes.append(f"Normalization layers that were held at the statistics of {whose}: {text_of(held)}.")
    if is_number(facts.get("check")):
        notes.append(f"The loss of the batch is that of its samples up to {text_of(facts['check'])} of itself.")
    alone, tables = mapping_at(facts, "alone"), [table_of(rows_at(facts, "worst"), columns, " ".join(notes))]
    if rows_at(alone, "worst"):
        step, median = text_of(alone.get("statistics_of")), text_of(alone.get("median"))
        note = f"The same with these layers held at the statistics of step {step}; the median loss is {median}."
        tables.append(table_of(rows_at(alone, "worst"), columns, note))
    if rows_at(facts, "raising"):
        tables.append(
            table_of(rows_at(facts, "raising"), columns, f"Samples that raise: {text_of(facts.get('error'))}")
        )
    if facts.get("why_not"):
        tables.append(listing_of({"why single samples were not judged": text_of(facts["why_not"])}))
    return tables


def parameters(evidence: Mapping[str, Any]) -> list[Table]:
    """Parameters that have grown, and losses with parameters put back."""
    facts = mapping_at(evidence, "parameters")
    first, last = (text_of(value_at(facts, "steps", place)) for place in (0, 1))
    columns = {
        "name": "parameter",
        "from": f"norm at step {first}" if first != "–" else "norm at first",
        "to": f"at step {last}" if last != "–" else "at last",
        "share": "share of the squared updates",
        "straightness": "straightness",
        "gradient_share": "share of the squared gradient",
    }
    note = (
        "Parameters that have grown or moved most. Straightness is the norm of the sum of a parameter's updates over "
        "the sum of their norms, 1 if all updates point one way."
    )
    losses = [{"name": "nothing", "loss": facts.get("loss_before")}, *rows_at(facts, "put_back")]
    losses.append({"name": "all parameters", "loss": facts.get("loss_all_back")})
    back = [
        {
            "put back to its first values": text_of(row.get("name")),
            "loss of a quiet batch": text_of(
                value_at(row, "loss", 0) if isinstance(row["loss"], list) else row["loss"]
            ),
            "loss of the suspicious batch": text_of(value_at(row, "loss", 1)),
        }
        for row in losses
        if row.get("loss") is not None
    ]
    at = f"Losses at the weights of step {text_of(facts['at'])}" if facts.get("at") is not None else "Losses"
    odd = f" Not finite there: {text_of(facts['nonfinite'])}." if facts.get("nonfinite") else ""
    return [
        table_of(rows_at(facts, "growth"), columns, note),
        Table(back, f"{at}, with some parameters put back.{odd}"),
    ]
