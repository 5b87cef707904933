"""The evidence of a replay as tables of text, one or two for each of the titles that findings name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from normzoo.causes import titles
from normzoo.report.cells import (
    Table,
    as_float,
    is_number,
    known,
    listing_of,
    mapping_at,
    percent,
    rows_at,
    table_of,
    text_of,
)
from normzoo.report.replay_batch_tables import batch_and_weights, inputs, parameters, samples

_LAST_LOSSES = 4
_TRIALS = {  # how the trials are told; {} are their facts
    "control": "nothing changed",
    "without_batch": "another batch at step {step}",
    "without_batches": "other batches at steps {steps}",
    "clip": "gradients clipped at the norm {at}",
    "warm_up": "learning rate warmed up over {steps} steps",
    "frozen": "{name} left as it was at first",
    "float32": "passes in float32",
    "eps": "eps = {eps} in {module}",
    "rate": "learning rate times {rate}",  # or divided by a whole number
}
_PASSES = {"steps": "steps", "forward": "forward passes of micro-batches", "backward": "backward passes"}
_SECONDS = {"replay": " in all", "step": " a step"}
_KINDS = {"nonfinite": "values are not finite", "jump": "values are far larger than at a quiet step"}
_WHY = {"nonfinite": "not finite", "loss": "loss high", "norm": "gradient large"}


def tables_of(evidence: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Tables by their titles; none of a question that was not answered.

    Args:
        evidence: of :func:`normzoo.causes.read_evidence`; values of other forms than a replay writes are shown as text,
            or passed over.
    """
    made = {title: [table for table in make(evidence) if table.rows] for title, make in _MAKERS.items()}
    return {title: tables for title, tables in made.items() if tables}


def _same(evidence: Mapping[str, Any]) -> list[Table]:
    facts, passes, seconds = (mapping_at(evidence, key) for key in ("same", "passes", "seconds"))
    difference = known(facts.get("first_difference"))
    by = known(facts.get("relative_difference"))
    by = f", by {by} of itself" if by else ""
    differs = f"no: the {text_of(facts.get('first_difference_of'))} of step {difference} is the first that differs{by}"
    noise = f"no: its loss varies by {text_of(facts.get('noise'))} of itself"
    tensor = mapping_at(facts, "tensor")
    element = text_of(tensor.get("element"))
    deviates = (
        f"{text_of(tensor.get('name'))}[{element}]: {text_of(tensor.get('recorded'))} in the run, "
        f"{text_of(tensor.get('replayed'))} made again; {text_of(tensor.get('times'))} times the median deviation"
    )
    took = [f"{text_of(passes[key])} {what}" for key, what in _PASSES.items() if is_number(passes.get(key))]
    took += [f"{text_of(seconds[key], 3)} s{of}" for key, of in _SECONDS.items() if is_number(seconds.get(key))]
    told = {
        "steps made again": f"{text_of(facts.get('from'))} to {text_of(facts.get('to'))}",
        "losses, norms and weights as in the run": differs if difference else "yes, all of them",
        "a step repeats itself": _told_truth(facts.get("repeatable"), "yes, bit for bit", noise),
        "a step repeats itself with deterministic algorithms": _told_truth(facts.get("deterministic"), "yes", "no"),
        "the steps diverge again": _told_truth(facts.get("diverges_again"), "yes", "no"),
        "step that raises an error again": known(facts.get("raises_step")),
        "error": known(facts.get("raises")),
        "value that deviates most from the run": deviates if tensor else "",
        "what the replay took": ", ".join(took),
    }
    return [listing_of(told)] if facts else []


def _fractions(evidence: Mapping[str, Any]) -> list[Table]:
    facts = mapping_at(evidence, "fractions")
    told = listing_of(
        {
            "step whose update it is": known(facts.get("step")),
            "largest part of the update that does not raise the loss": percent(facts.get("largest_that_holds")),
            "part from which on the loss rises": percent(facts.get("rise_at")),
        }
    )
    columns = {"layer": "layer", "relative_update": "norm of the update / norm of the weight"}
    return [told, table_of(rows_at(facts, "update_by_layer"), columns, "The layers that the update changes most.")]


def _channels(evidence: Mapping[str, Any]) -> list[Table]:
    rises = mapping_at(evidence, "fractions", "moments_rise")
    rows = [{"site": text_of(site), "rise": rise} for site, rise in rises.items()]
    columns = {"site": "site", "rise": "decades by which the largest variance of a channel grows"}
    return [table_of(rows, columns, "From the weights before the update to those after it.")]


def _first_bad(evidence: Mapping[str, Any]) -> list[Table]:
    facts = mapping_at(evidence, "first_bad")
    weights = text_of(facts["weight_nonfinite"]) if facts.get("weight_nonfinite") else ""
    told = {
        "step": known(facts.get("step")),
        "pass": known(facts.get("direction")),
        "module": known(facts.get("module")),
        "class": known(facts.get("class")),
        "what is wrong": _KINDS.get(text_of(facts.get("kind")), known(facts.get("kind"))),
        "operation": known(facts.get("op")),
        "dtype": known(facts.get("dtype")),
        "largest magnitude of its inputs": known(facts.get("input_max")),
        "largest finite value of the dtype": known(facts.get("limit")),
        "the batch itself is not finite": _told_truth(facts.get("input_nonfinite"), "yes", ""),
        "weights that are not finite": weights,
        "magnitude over that at a quiet step": known(facts.get("times")),
        "place among the calls of the pass": known(facts.get("depth")),
        "rank": known(facts.get("rank")),
        "first module far larger than at a quiet step": known(mapping_at(facts, "jump").get("module")),
        "the pass is finite in float32": _told_truth(facts.get("float32_finite"), "yes", "no"),
        "error": known(facts.get("error")),
    }
    return [listing_of(told)]


def _norm_layers(evidence: Mapping[str, Any]) -> list[Table]:
    columns = {
        "module": "module",
        "class": "class",
        "eps": "eps",
        "unit": "variances are of each",
        "channels": "how many",
        "dead": "variance below eps",
        "dead_quiet": "below eps at a quiet step",
        "channel": "number",
        "variance": "its variance",
        "variance_quiet": "its variance at a quiet step",
        "gradient": "its share of the gradient",
    }
    note = "The last columns are of the channel, group or sample whose variance is the smallest or has changed most."
    return [table_of(rows_at(evidence, "norm_layers"), columns, note)]


def _trials(evidence: Mapping[str, Any]) -> list[Table]:
    facts = mapping_at(evidence, "trials")
    tried = [(name, trial) for name, trial in facts.items() if isinstance(trial, Mapping)]
    rates = sorted(rows_at(facts, "rates"), key=lambda trial: as_float(trial.get("rate")), reverse=True)
    tried += [("rate", trial) for trial in rates]
    rows = []
    for name, trial in sorted(tried, key=lambda pair: pair[0] != "control"):
        losses = trial["losses"] if isinstance(trial.get("losses"), list) else []
        why = _WHY.get(text_of(trial.get("why")))
        result = _told_truth(trial.get("holds"), "holds", f"does not hold{f': {why}' if why else ''}")
        if result:
            told = {"what was tried": _told(name, trial), "result": result}
            rows.append({**told, "last losses": text_of(losses[-_LAST_LOSSES:]) if losses else "–"})
    note = "The steps were made again with one change each, and some more steps on quiet batches after them."
    if is_number(facts.get("lr")):
        note += f" The largest learning rate that was tried and holds is {text_of(facts['lr'])}."
    return [Table(rows, note, "texts")]


def _told(trial: str, facts: Mapping[str, Any]) -> str:
    """What was tried, in words."""
    rate = as_float(facts.get("rate"))
    if trial == "rate" and 0 < rate < 1 and (1 / rate).is_integer():
        return f"learning rate / {1 / rate:.0f}"
    text = _TRIALS.get(trial, trial.replace("_", " "))
    for key, value in facts.items():
        span = f"{text_of(value[0])} to {text_of(value[-1])}" if isinstance(value, list) and value else text_of(value)
        text = text.replace(f"{{{key}}}", span)
    return text


def _told_truth(value: Any, yes: str, no: str) -> str:
    """One of two texts; nothing for what is neither True nor False."""
    return {True: yes, False: no}[value] if isinstance(value, bool) else ""


_MAKERS: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    titles.SAME: _same,
    titles.BATCH_AND_WEIGHTS: batch_and_weights,
    titles.INPUTS: inputs,
    titles.SAMPLES: samples,
    titles.PARAMETERS: parameters,
    titles.FRACTIONS: _fractions,
    titles.CHANNELS: _channels,
    titles.FIRST_BAD: _first_bad,
    titles.NORM_LAYERS: _norm_layers,
    titles.TRIALS: _trials,
}
