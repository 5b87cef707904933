"""Tables of a replay's third question, whether the batch or the weights make the loss bad, and which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normzoo.report.cells import Table, is_number, known, listing_of, mapping_at, rows_at, table_of, text_of, value_at

_PLACE = ("row", "id", "rank", "micro_batch")


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
                    error = known(value_at(facts, "raises", place, column)) if quantity == "loss" else ""
                    value = text_of(value_at(facts, quantity, place, column))
                    row[f"{name} at the weights of step {text_of((now, first)[column])}"] = error or value
            rows.append(row)
    notes = []
    if (after := facts.get("other_after")) is not None:
        notes.append(f"After the update with the suspicious batch the loss of the other batch is {text_of(after)}.")
    for key, step in (("others", now), ("others_first", first)):
        if (others := facts.get(key)) and (key == "others" or now != first):
            notes.append(f"Losses of further quiet batches at the weights of step {text_of(step)}: {text_of(others)}.")
    return [Table(rows, " ".join(notes))]


def inputs(evidence: Mapping[str, Any]) -> list[Table]:
    """The tensors of the batch beside those of others."""
    columns = {
        "path": "input",
        "dtype": "dtype",
        "max": "largest magnitude",
        "others_max": "of other batches",
        "nonfinite": "not finite",
        "others_nonfinite": "not finite in others",
        "range": "range of other batches",
        "outside": "outside of it",
        "far": "far outside",
        "constant": "all equal",
        "rows": "rows that stand out",
        "rank": "on rank",
        "micro_batch": "in micro-batch",
    }
    note = "The tensors of the suspicious batch beside those of the other batches, the most unusual first."
    rows = [{**row, "range": _range(row.get("range"))} for row in rows_at(evidence, "inputs")]
    return [table_of(rows, columns, note)]


def _range(ends: Any) -> str:
    return f"{text_of(ends[0])} to {text_of(ends[1])}" if isinstance(ends, list) and len(ends) == 2 else known(ends)


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
    count = "Samples with the highest losses"
    if is_number(facts.get("evaluated")) and is_number(facts.get("samples")):
        count += f", of {text_of(facts['evaluated'])} that passed alone of {text_of(facts['samples'])}"
    notes = [f"{count}; the loss of the median sample is {text_of(facts.get('median'))}."]
    if odd := facts.get("nonfinite"):
        notes.append(f"The losses of {text_of(odd)} of them are not finite.")
    if held := facts.get("held"):
        of = facts.get("statistics_of")
        whose = f"the batch of step {text_of(of)}" if of is not None else "the whole batch"
        notes.append(f"Normalization layers that were held at the statistics of {whose}: {text_of(held)}.")
    if is_number(facts.get("check")):
        how = text_of(facts.get("reduction") or "that of its samples")
        notes.append(f"The loss of the batch is {how}, up to {text_of(facts['check'])} of itself.")
    alone, tables = mapping_at(facts, "alone"), [table_of(rows_at(facts, "worst"), columns, " ".join(notes))]
    if rows_at(alone, "worst"):
        step, median = text_of(alone.get("statistics_of")), text_of(alone.get("median"))
        note = f"The same with these layers held at the statistics of step {step}; the median loss is {median}."
        tables.append(table_of(rows_at(alone, "worst"), columns, note))
    if rows_at(facts, "moved"):
        moved = {"layer": "layer", "share": "share of the variance of its input"}
        note = "Samples that move the statistics of a normalization layer, by which all others are normalized."
        tables.append(table_of(rows_at(facts, "moved"), {**{k: columns[k] for k in _PLACE}, **moved}, note))
    without = mapping_at(facts, "without")
    if rows_at(without, "rows"):
        whole, rest = text_of(facts.get("batch_loss")), text_of(without.get("loss"))
        note = f"The loss of the batch is {whole}, and that of the batch without these samples {rest}."
        tables.append(table_of(rows_at(without, "rows"), {k: columns[k] for k in _PLACE}, note))
    if rows_at(facts, "raising"):
        tables.append(
            table_of(rows_at(facts, "raising"), columns, f"Samples that raise: {text_of(facts.get('error'))}")
        )
    if facts.get("why_not"):
        tables.append(listing_of({"why single samples were not judged": text_of(facts["why_not"])}))
    return tables


def parameters(evidence: Mapping[str, Any]) -> list[Table]:
    """Parameters that have grown, those that are largest for their kind, and losses with parameters put back."""
    facts = mapping_at(evidence, "parameters")
    first, last, at = (text_of(value) for value in (*(value_at(facts, "steps", i) for i in (0, 1)), facts.get("at")))
    grown = {
        "name": "parameter",
        "from": f"norm at step {first}",
        "to": f"norm at step {last}",
        "moved": "norm of the difference",
        "share": "share of the squared updates",
        "straightness": "straightness",
        "gradient_share": "share of the squared gradient",
    }
    note = (
        "Parameters that have grown or moved most. Straightness is the norm of the sum of a parameter's updates over "
        "the sum of their norms, 1 if all updates point one way."
    )
    large = {
        "name": "parameter",
        "kind": "kind",
        "rms": "root mean square",
        "kind_median": "median of its kind",
        "count": "values",
    }
    return [
        _put_back(facts, first, at),
        table_of(rows_at(facts, "growth"), grown, note),
        table_of(rows_at(facts, "largest"), large, "Parameters that are largest for their kind."),
    ]


def _put_back(facts: Mapping[str, Any], first: str, at: str) -> Table:
    """Losses of a quiet batch and of the suspicious one, with some parameters as before the first step."""
    tried = [{"name": "nothing", "loss": facts.get("loss_before")}, *rows_at(facts, "put_back")]
    tried.append({"name": "all parameters", "loss": facts.get("loss_all_back")})
    tried.append({"name": "all parameters and buffers", "loss": facts.get("loss_first")})
    rows = [
        {
            "name": trial.get("name"),
            **{f"{key}{place}": value_at(trial, key, place) for key in ("loss", "only") for place in (0, 1)},
        }
        for trial in tried
        if isinstance(trial.get("loss"), list)
    ]
    columns = {
        "name": f"put back to its values at step {first}",
        "loss0": "loss of a quiet batch",
        "loss1": "loss of the suspicious batch",
        "only0": f"quiet batch, this alone as at step {at}",
        "only1": f"suspicious batch, this alone as at step {at}",
    }
    odd = f" Not finite there: {text_of(facts['nonfinite'])}." if facts.get("nonfinite") else ""
    return table_of(rows, columns, f"Losses at the weights of step {at}, with some of them put back.{odd}")
