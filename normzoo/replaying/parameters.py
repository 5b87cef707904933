"""Parameters that have grown or moved, and what the loss is with each of them put back: question 3 of a replay.

``ask`` of :mod:`normzoo.replaying.data_or_state` puts together the facts

- ``steps``: [first, last]; norms are those before these steps, updates those of the steps between;
- ``growth``: up to 10 parameters that have grown or moved most, dicts of ``name``, ``kind``, ``from`` and ``to``
  (norms), ``moved`` (norm of the difference), ``share`` (of the squares of all updates), ``straightness`` (norm of the
  sum of its updates over the sum of their norms, 1 if all point one way), ``gradient_share`` (of the squared gradient
  of the onset's batch at the onset's weights);
- ``largest``: up to 5 parameters that are largest for their kind, before the last step: ``name``, ``rms`` (root mean
  square of the values), ``kind``, ``kind_median`` (median of the rms of its kind, None for fewer than 3), ``count``;
- ``at``: the step before which parameters are put back: the onset if the quiet batch's loss is bad there (1.5 times
  that at the first weights), or else the first later one where it is: then the onset's update has moved the weights;
- ``nonfinite``: names of parameters and buffers with infinite or NaN values before ``at``;
- ``loss_first``: [loss of a quiet batch, loss of the onset's batch] at the weights of the first step;
- ``loss_before``: the two losses at the weights before ``at``;
- ``loss_all_back``: the same with all parameters as before the first step, and buffers as before ``at``; None if no
  weights are bad;
- ``put_back``: none if no weights are bad, or more than 6 parameters are not finite; else dicts of ``name`` (of a
  parameter, or of a module), ``parameters`` (their names), ``loss`` (the two losses with these alone as before the
  first step) and ``only`` (that of the quiet batch with these alone as before ``at``, and all other parameters as
  before the first step).

The first of two losses is None if there is no quiet batch. A kind is ``"norm weight"``, ``"norm bias"``, ``"bias"``,
``"scalar"``, ``"vector"`` or ``"matrix"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from normzoo.replaying.stage import Stage
from normzoo.replaying.tensor_sizes import all_finite, norms

MOST_GROWTH, MOST_CANDIDATES, MOST_LARGEST = 10, 6, 5
BAD = 1.5  # a loss this many times that at the first weights is bad
_FLOOR = 1.0  # times the median rms of all parameters: growth of smaller ones is relative to this


def growth(
    first: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    updates: Mapping[str, Sequence[float]],
    gradient: Mapping[str, float],
    kinds: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The facts ``growth``, and the names of the parameters to put back, the likeliest first.

    Args:
        first: parameters before the first step.
        last: the same later.
        updates: of each parameter the sum of the norms of its updates between, and of their squares.
        gradient: the norm of each parameter's gradient; those without one may be missing.
        kinds: of each parameter.
    """
    before, after = norms(first), norms(last)
    moved = norms({name: last[name] - first[name] for name in first})
    roots = {name: math.sqrt(max(first[name].numel(), 1)) for name in first}
    floor = _FLOOR * median([before[name] / roots[name] for name in first]) or 1e-12
    sums = {name: updates.get(name, (0.0, 0.0)) for name in first}
    all_squares = sum(square for _, square in sums.values())
    gradient_squares = {name: g * g for name, g in gradient.items()}
    all_gradients = sum(gradient_squares.values())

    def grown(fact: dict[str, Any]) -> float:
        least = floor * roots[fact["name"]]
        return _finite((fact["to"] + least) / (fact["from"] + least))

    def went(fact: dict[str, Any]) -> float:
        return _finite(fact["moved"] / (fact["from"] + floor * roots[fact["name"]]))

    facts = [
        {
            "name": name,
            "kind": kinds[name],
            "from": before[name],
            "to": after[name],
            "moved": moved[name],
            "share": sums[name][1] / all_squares if all_squares else None,
            "straightness": moved[name] / sums[name][0] if sums[name][0] else None,
            "gradient_share": gradient_squares.get(name, 0.0) / all_gradients if all_gradients else None,
        }
        for name in first
        if moved[name] != 0
    ]
    orders = [sorted(facts, key=key, reverse=True) for key in (grown, went, lambda fact: fact["share"] or 0.0)]
    chosen = list(_taking_turns(orders))
    return chosen[:MOST_GROWTH], [fact["name"] for fact in chosen[:MOST_CANDIDATES]]


def largest(parameters: Mapping[str, Tensor], kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The facts ``largest`` of parameters."""
    rms = {name: size / math.sqrt(max(parameters[name].numel(), 1)) for name, size in norms(parameters).items()}
    of_kind: dict[str, list[float]] = {}
    for name, value in rms.items():
        of_kind.setdefault(kinds[name], []).append(value)
    medians = {kind: median(values) if len(values) >= 3 else None for kind, values in of_kind.items()}
    facts = [
        {
            "name": name,
            "rms": value,
            "kind": kinds[name],
            "kind_median": medians[kinds[name]],
            "count": len(of_kind[kinds[name]]),
        }
        for name, value in rms.items()
    ]

    def excess(fact: dict[str, Any]) -> float:
        usual = fact["kind_median"] or 1.0  # of a kind of its own, such as the scale of logits
        return _finite(fact["rms"] / usual)

    return sorted(facts, key=excess, reverse=True)[:MOST_LARGEST]


def put_back(
    stage: Stage, first: Mapping[str, Tensor], candidates: Iterable[str], quiet: int | None, batch: int, onset: int
) -> dict[str, Any]:
    """The facts ``at``, ``nonfinite`` and those of losses; the stage is then before the step ``at``.

    Args:
        stage: before the step ``onset``.
        first: parameters before the first step.
        candidates: names of parameters that are put back.
        quiet: step of a quiet batch, if there is one.
        batch: step of the suspicious batch.
        onset: its step, or a later one.
    """

    def losses(steps: Sequence[int | None] = (quiet, batch)) -> list[float | None]:
        return [None if step is None else stage.loss(step) for step in steps]

    with stage.aside():
        stage.set_parameters(first)
        at_first = losses()
    for at in _places(stage, onset):
        stage.go_to(at)
        before = losses()
        if is_bad := _is_bad(_judged(before), _judged(at_first)):
            break
    bad = stage.parameters()
    nonfinite = [name for name, x in stage.tensors().items() if not all_finite(x)]
    broken = [name for name in nonfinite if name in bad]
    candidates = list(dict.fromkeys([*broken, *candidates]))
    if not is_bad or len(broken) > MOST_CANDIDATES:  # none of which restores the others
        candidates = []
    judged = (quiet, batch if quiet is None else None)
    all_back, facts = None, []
    with stage.aside():
        if is_bad:
            stage.set_parameters(first)
            all_back = losses()
        for name, members in _with_modules(candidates, bad):
            stage.set_parameters({**first, **{m: bad[m] for m in members}})
            only = losses(judged)
            stage.set_parameters({**bad, **{m: first[m] for m in members}})
            facts.append({"name": name, "parameters": members, "loss": losses(), "only": only})
    return {
        "at": at,
        "nonfinite": nonfinite,
        "loss_first": at_first,
        "loss_before": before,
        "loss_all_back": all_back,
        "put_back": facts,
    }


def _judged(losses: Sequence[float | None]) -> float:
    """The loss of the quiet batch, or of the onset's if there is none."""
    return next((loss for loss in losses if loss is not None), math.nan)


def _is_bad(loss: float, first: float) -> bool:
    return not math.isfinite(loss) or loss > BAD * max(first, 0.0)


def _finite(value: float) -> float:
    """A number to sort by, in which what is not finite is largest."""
    return value if math.isfinite(value) else math.inf


def _taking_turns(lists: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The elements of lists, the first of each, then the second of each, each element once."""
    seen = set()
    for together in zip(*lists, strict=True):
        for fact in together:
            if fact["name"] not in seen:
                seen.add(fact["name"])
                yield fact


def _places(stage: Stage, onset: int) -> list[int]:
    """The steps before which the weights may be bad: the onset, the step after it, the alarm, and the last one."""
    ends = [s for s in stage.steps if s >= onset]
    return list(dict.fromkeys([onset, *ends[1:2], *(s for s in (stage.alarm,) if s in ends), ends[-1]]))


def _with_modules(names: Iterable[str], parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Each parameter, and each module that holds one of them beside others, with the parameters that it holds."""
    owners: dict[str, list[str]] = {}
    for name in parameters:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    seen = set()
    for name in names:
        yield name, [name]
        owner = name.rpartition(".")[0]
        if owner and 1 < len(owners[owner]) < len(parameters) and owner not in seen:
            seen.add(owner)
            yield owner, owners[owner]
