"""Question 2: what the fatal update does on its way, by fractions of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normzoo.callbacks._run.gradients import local_values
from normzoo.functional.channel_moments import merge_moments, moments_variance
from normzoo.functional.finite_moments import HIGH, INFINITE, LOW, MEAN, NAN, finite_std
from normzoo.functional.relative_loss import learning_rate_headroom, relative_curve
from normzoo.functional.tails import excess_kurtosis
from normzoo.records.schema import Schema
from normzoo.replaying.calls import Watch, dense
from normzoo.replaying.first_bad import Merged, merge_calls, merge_ranks
from normzoo.replaying.fraction_records import CHANNELS, DEPTH, LOSS, TAILS, UPDATES
from normzoo.replaying.sites import ChannelTaker, chosen_sites, weights_of_sites

if TYPE_CHECKING:
    from normzoo.replaying.stage import Stage

Row = dict[str, Any]
PARTS = 20  # of the update
SHOWN = (0.0, 0.5, 1.0)  # at which the activations of all modules are recorded
MOST_CHANNELS = 512  # of a site that are recorded


def ask(
    stage: Stage, evidence: dict[str, Any], sites: str | Sequence[str] | None = None
) -> list[tuple[Schema, list[Row]]]:
    """Apply 0, 5, ..., 100 per cent of the fatal update, and look at the loss, channels and gradients at each.

    Parameters are those before the update and the fraction of the difference; buffers and random streams are as before.
    Each fraction takes a forward and a backward pass of the step's batches, and one further forward pass finds out
    which modules are called. Moments of channels are of all ranks, merged.

    Adds to the evidence ``fractions``, None without a fatal step that can be made again:

    - ``step``; ``at``, the fractions; ``loss`` at each, of the step's own batches;
    - ``largest_that_holds``: the largest fraction, interpolated, up to which the loss is at most that at 0;
    - ``rise_at``: the first fraction at which the loss has doubled or is not finite, None if there is none;
    - ``sites``: the modules whose channels were followed; ``moments_rise``: for each the decades by which the largest
      variance of a channel has grown from no to all of the update, infinite if it is not finite any more;
    - ``update_by_layer``: the ten weight matrices with the largest norm of the update relative to their own, each a
      ``layer`` and ``relative_update``.

    Args:
        stage: to try fractions in; its state is that before the fatal step afterwards.
        evidence: with ``course``.
        sites: see :func:`normzoo.replaying.sites.chosen_sites`.

    Returns:
        the records ``replay_fractions``, ``replay_channels``, ``replay_depth``, ``replay_gradient_tails`` and
        ``replay_updates``.
    """
    evidence["fractions"] = None
    step = (evidence.get("course") or {}).get("fatal")
    if step not in stage.steps or stage.capsule.about.get("kind") == "exception":  # whose last step makes no update
        return []
    stage.go_to(step)
    state, before = stage.state(), stage.parameters()
    with Watch(stage.run, sides=()) as first:
        stage.loss(step)
    chosen = chosen_sites(stage.run, first.calls, sites)
    weights = weights_of_sites(stage.run, first.calls, chosen)
    stage.train(step)
    after = stage.parameters()
    stage.put(state, step)
    points = []
    for part in range(PARTS + 1):
        fraction = part / PARTS
        stage.set_parameters({name: _between(before[name], after[name], fraction) for name in before})
        points.append(_look(stage, step, fraction, chosen, weights, first))
    stage.put(state, step)
    updates = _updates(stage, before, after)
    evidence["fractions"] = {"step": step, **_facts(points, list(chosen)), "update_by_layer": _most_updated(updates)}
    _add_notes(stage, points, chosen)
    records = [
        (LOSS, [{"loss": p.loss, "largest": _largest(p.calls), "fraction": p.fraction} for p in points]),
        (CHANNELS, [{"fraction": p.fraction, **row} for p in points for row in _channel_rows(p.moments)]),
        (
            DEPTH,
            [{"fraction": p.fraction, **row} for p in points if p.fraction in SHOWN for row in _depth_rows(p.calls)],
        ),
        (TAILS, [{"fraction": p.fraction, **row} for p in points for row in p.tails]),
        (UPDATES, updates),
    ]
    return [(schema, [{"step": step, **row} for row in rows]) for schema, rows in records]


@dataclass
class _Point:
    """What was seen at one fraction of the update.

    Attributes:
        fraction: of the update.
        loss: of the step's batches.
        moments: (3, C) packed moments of channels by site, of all ranks.
        calls: the calls of all modules with the moments of their outputs, of all ranks.
        tails: rows of the gradients' record.
    """

    fraction: float
    loss: float
    moments: dict[str, Tensor]
    calls: list[Merged]
    tails: list[Row]


def _look(
    stage: Stage, step: int, fraction: float, chosen: Mapping[str, str], weights: Mapping[str, str], like: Watch
) -> _Point:
    """Pass the batches of a step at the present weights."""
    taker = ChannelTaker(chosen)
    with Watch(stage.run, sides=("output",), take=taker, like=like) as watch:
        loss, gradients = stage.backward(step)
    own = {site: packed.cpu() for site, packed in taker.merged().items()}
    ranks = stage.gather((own, merge_calls(watch.calls)))
    moments = {}
    for site in chosen:
        parts = [of_rank[site] for of_rank, _ in ranks if site in of_rank]
        if parts and len({part.shape for part in parts}) == 1:
            moments[site] = merge_moments(torch.stack(parts))
    names = dict.fromkeys(weights.values())
    tails = [{"weight": name, **_tails(gradients[name])} for name in names if name in gradients]
    return _Point(fraction, loss, moments, merge_ranks([calls for _, calls in ranks]), tails)


def _between(before: Tensor, after: Tensor, fraction: float) -> Tensor:
    """The values at a fraction of an update, at its ends exactly those there."""
    if fraction in (0.0, 1.0):
        return after if fraction else before
    a, b = (local_values(t).to(torch.promote_types(t.dtype, torch.float32)) for t in (before, after))
    return (a + fraction * (b - a)).to(before.dtype)


def _facts(points: Sequence[_Point], sites: Sequence[str]) -> dict[str, Any]:
    """Evidence of losses and channels at the fractions."""
    at, losses = [p.fraction for p in points], [p.loss for p in points]
    first = losses[0]
    doubled = (p.fraction for p in points if not p.loss - first <= abs(first))
    return {
        "at": at,
        "loss": losses,
        "largest_that_holds": learning_rate_headroom(at, relative_curve([first, *losses]), negative=first < 0),
        "rise_at": next(doubled, None),
        "sites": list(sites),
        "moments_rise": {
            site: _decades(points[0].moments[site], points[-1].moments[site])
            for site in sites
            if site in points[0].moments and site in points[-1].moments
        },
    }


def _decades(before: Tensor, after: Tensor) -> float:
    """By how many decades the largest variance of a channel grows between packed moments (3, C)."""
    start, end = moments_variance(before).max().item(), moments_variance(after).max().item()
    if not math.isfinite(end):
        return math.inf
    return math.log10(end / start) if start > 0 < end else math.inf if end > 0 else 0.0


def _channel_rows(moments: Mapping[str, Tensor]) -> Iterator[Row]:
    for site, packed in moments.items():
        recorded = _recorded_channels(packed.shape[-1])
        mean, variance = packed[1].tolist(), moments_variance(packed).tolist()
        yield from ({"site": site, "channel": c, "mean": mean[c], "variance": variance[c]} for c in recorded)


def _recorded_channels(count: int) -> list[int]:
    """All of some channels, or as many as are recorded, evenly spaced."""
    most = min(count, MOST_CHANNELS)
    return [i * count // most for i in range(most)]


def _depth_rows(calls: Sequence[Merged]) -> Iterator[Row]:
    leaves = [call for call in calls if call.leaf and not call.number and "output" in call.moments]
    for depth, call in enumerate(leaves):
        moments, bad = torch.tensor(call.moments["output"], dtype=torch.float64), call.nonfinite("output")
        mean, std = (math.nan, math.nan) if bad else (moments[MEAN].item(), finite_std(moments).item())
        yield {"module": call.name, "depth": depth, "mean": mean, "std": std, "max": _largest([call])}


def _largest(calls: Iterable[Merged]) -> float:
    """The largest magnitude of outputs: NaN if one is NaN, else infinite if one is."""
    outputs = [call.moments["output"] for call in calls if "output" in call.moments]
    if any(m[NAN] for m in outputs):
        return math.nan
    if any(m[INFINITE] for m in outputs):
        return math.inf
    return max((max(-m[LOW], m[HIGH]) for m in outputs), default=math.nan)


def _tails(gradient: Tensor) -> Row:
    """Quantiles of magnitudes (the value of rank ``ceil(q n)``), their largest, and the excess kurtosis."""
    g = dense(gradient).flatten()
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if not g.numel():
        return dict.fromkeys(("q50", "q999", "max", "kurtosis"), math.nan)
    sizes = g.abs()
    median, far = (sizes.kthvalue(math.ceil(q * g.numel())).values.item() for q in (0.5, 0.999))
    return {"q50": median, "q999": far, "max": sizes.max().item(), "kurtosis": excess_kurtosis(g).item()}


def _updates(stage: Stage, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[Row]:
    """Rows of the record of updates."""
    pairs = ((local_values(before[name]).double(), local_values(after[name]).double()) for name in before)
    squares = torch.tensor(
        [[float(a.square().sum()), float((b - a).square().sum())] for a, b in pairs], dtype=torch.float64
    )
    if stage.run.layout == "sharded":  # each rank has its part
        squares = torch.stack(stage.gather(squares)).sum(0)
    rows = []
    for place, (name, (weight, update)) in enumerate(zip(before, squares.tolist(), strict=True)):
        relative = math.sqrt(update / weight) if weight else math.nan
        about = {"parameter": name, "place": place, "matrix": before[name].ndim > 1}
        rows.append({**about, "weight": math.sqrt(weight), "update": math.sqrt(update), "relative_update": relative})
    return rows


def _most_updated(rows: Sequence[Row]) -> list[Row]:
    known = [row for row in rows if row["matrix"] and row["weight"]]
    # What is not finite first
    order = sorted(known, key=lambda row: (math.isfinite(row["relative_update"]), -row["relative_update"]))
    return [{"layer": row["parameter"], "relative_update": row["relative_update"]} for row in order[:10]]


def _add_notes(stage: Stage, points: Sequence[_Point], chosen: Mapping[str, str]) -> None:
    for site, side in chosen.items():
        channels = {p.moments[site].shape[-1] for p in points if site in p.moments}
        if not channels:
            stage.notes.append(f"the {side} of {site} has no channels that can be followed along the update")
        elif max(channels) > MOST_CHANNELS:
            stage.notes.append(
                f"{MOST_CHANNELS} of the {max(channels)} channels of {site}, evenly spaced, are recorded"
            )
    if stage.run.layout == "sharded" and points[0].tails:
        stage.notes.append("gradients along the update are of the parts of the weights that rank 0 holds")
