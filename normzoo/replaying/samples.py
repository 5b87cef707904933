"""Which samples of the suspicious batch make its loss: question 3 of a replay.

``ask`` passes the samples of the onset's batches through ``training_step`` one by one, at the weights before the onset
(of a batch of more than 64 samples in parts, and those of the worst parts one by one). Layers that normalize over the
batch are held at the statistics of the whole batch. It adds to the evidence ``"samples"``, a dict of

- ``step``: whose batches they are;
- ``possible``, ``why_not``: whether the loss of the batch is made of those of single samples; why not, for people;
- ``held``: names of the layers whose statistics were held;
- ``statistics_of``: the step whose batch these statistics are of; another than ``step`` if those of the batch itself
  are not finite, or if the batch raises an error;
- ``batch_loss``: loss of the whole batches, mean over micro-batches and ranks;
- ``reduction``: how it follows from the samples' losses, as ``"the mean over samples"`` or ``"the sum over samples"``;
- ``check``: relative difference between the loss made so and that of the whole batch, the largest over micro-batches;
  None if it is not finite, or the statistics are of another step;
- ``dropout``: whether the module has active dropout, whose draws differ between the batch and its parts;
- ``samples``, ``evaluated``: number of samples on all ranks; how many of them passed alone;
- ``nonfinite``: how many of these have a loss that is not finite;
- ``worst``: up to 8 samples, those that are not finite first, then those of the highest loss: ``row``, ``rank``,
  ``micro_batch``, ``id`` and ``hash`` of the sample, ``loss``, ``share`` of the total (None where the total is not
  finite, or losses are negative), ``gradient`` (norm of the gradient of the sample's loss; None where unknown);
- ``median``, ``median_gradient``: loss of the median sample, and the norm of its gradient;
- ``alone``: None without such layers, else the dict of ``statistics_of``, ``mean``, ``median``, ``nonfinite`` and
  ``worst`` with the layers held at the statistics of a quiet batch: a sample that moves those of its own batch hides
  behind them; ``worst`` is empty if the mean of these losses is less than half of ``batch_loss``;
- ``moved``: up to 8 samples that move the statistics of such a layer, as ``worst``, with the ``layer`` and their
  ``share`` of the variance of its input, the mean over channels: above a half, or ten times that of a mean sample;
- ``without``: None if no samples stand out, or more than a quarter of all; else the ``rows`` of those that carry the
  loss (by either statistics) or move the statistics, and the ``loss`` of the batches without them;
- ``error``, ``raising``: error of the batch or of single samples; ``row``, ``rank``, ``micro_batch`` and ``id`` of the
  samples that raise it.

``hash`` is the sum of bits of each of the sample's tensors, as :func:`normzoo.callbacks._run.batches.bit_sum` takes it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from normzoo.records.schema import Schema
from normzoo.replaying.bisection import Bisection, MicroBatch, Part, micro_batches
from normzoo.replaying.data_or_state import onset_of, passes_alone, quiet_steps
from normzoo.replaying.held_statistics import BatchStatisticsLayers, Statistics
from normzoo.replaying.reductions import check
from normzoo.replaying.sample_facts import (
    SAMPLES,
    has_dropout,
    own_id,
    place_of,
    record_rows,
    summary,
)
from normzoo.replaying.sample_losses import described_parts, median_gradient
from normzoo.replaying.stage import Stage
from normzoo.replaying.standing_out import FEW, carrying, loss_without, moved

LOW = 0.5  # of the batch's loss: samples of a smaller mean by other statistics tell nothing of it
_FACTS: dict[str, Any] = {
    "possible": False,
    "why_not": "",
    "held": [],
    "statistics_of": None,
    "batch_loss": None,
    "reduction": None,
    "check": None,
    "dropout": False,
    "samples": 0,
    "evaluated": 0,
    "nonfinite": 0,
    "worst": [],
    "median": None,
    "median_gradient": None,
    "alone": None,
    "moved": [],
    "without": None,
    "error": None,
    "raising": [],
}


def ask(stage: Stage, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Add the facts above to the evidence.

    Args:
        stage: what is asked.
        evidence: with the facts ``"about"``, ``"course"`` and ``"data_or_state"``.

    Returns:
        the record ``replay_samples``, if the loss is made of those of single samples.
    """
    step = onset_of(stage, evidence)
    if step is None:
        evidence["samples"] = {**_FACTS, "step": None, "why_not": "the step at the alarm cannot be made again"}
        return []
    if evidence["about"]["kind"] == "exception" and not passes_alone(stage):
        evidence["samples"] = {
            **_FACTS,
            "step": step,
            "why_not": "ranks wait for each other within a pass of this module",
        }
        return []
    micros = micro_batches(stage, step)
    undivided = [micro.division.why_not for micro in micros if micro.division.why_not]
    if why_not := next((why for of_rank in stage.gather(undivided) for why in of_rank), ""):
        evidence["samples"] = {**_FACTS, "step": step, "why_not": why_not}
        return []
    quiet = next(iter(quiet_steps(stage, evidence, step)), None)
    stage.go_to(step)
    # Compiled code would be compiled again for the smaller batches
    with torch.compiler.set_stance("force_eager"):
        facts, rows = _Question(stage, step, quiet, micros).answer()
    evidence["samples"] = {**_FACTS, "step": step, **facts}
    return [(SAMPLES, rows)] if rows else []


class _Question:
    """The samples of one step, at the stage's present weights."""

    def __init__(self, stage: Stage, step: int, quiet: int | None, micros: list[MicroBatch]) -> None:
        self.stage, self.step, self.quiet, self.micros = stage, step, quiet, micros
        self.layers = BatchStatisticsLayers(stage.module, stage.gather if stage.ranks > 1 else None)
        self.bisection = Bisection(stage, step, micros, self.layers)

    def answer(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The facts, and the rows of the record."""
        passed = self.bisection.capture(self.step, [(micro.batch, micro.samples) for micro in self.micros])
        own = {place: statistics for place, (statistics, _, _) in enumerate(passed)}
        losses = [loss for _, loss, _ in passed]
        errors = self._first_of_all([error for _, _, error in passed])
        facts: dict[str, Any] = {
            "held": sorted({name for s in own.values() for name, calls in s.calls.items() if calls}),
            "samples": sum(self.stage.gather(sum(micro.samples for micro in self.micros))),
            "batch_loss": _mean([x for of_rank in self.stage.gather(losses) for x in of_rank]),
            "dropout": has_dropout(self.stage.module),
            "error": errors or None,
        }
        others, why_no_others = self._of_quiet_batch() if errors or self.layers.layers else (None, "")
        if errors:
            return self._raising(facts, others, why_no_others), []
        finite = all(self.stage.gather(all(s.finite for s in own.values())))
        if not finite and others is None:
            return {**facts, "why_not": f"statistics of {facts['held'][0]} are not finite; {why_no_others}"}, []
        statistics = own if finite else others
        assert statistics is not None
        parts = self.bisection.parts(statistics)
        facts["statistics_of"] = (self.step if finite else self.quiet) if facts["held"] else None
        if raised := self._first_of_all([part.error for part in parts]):
            facts |= {"error": raised, "raising": self._rows_of([part for part in parts if part.loss is None])}
            if all(self.stage.gather(all(part.loss is None for part in parts))):
                return {**facts, "why_not": f"training_step does not take parts of the batch: {raised}"}, []
        facts |= check(self.stage, self.micros, parts, losses, own_statistics=finite, dropout=facts["dropout"])
        if facts["why_not"]:
            return facts, []
        if facts["dropout"]:
            self.stage.notes.append(
                "Dropout draws other masks for a sample alone than for it in its batch: losses of single samples are "
                "those under other masks."
            )
        everything = described_parts(self.bisection, parts, facts["reduction"], statistics)
        facts |= {"possible": True, **summary(everything)}
        facts["median_gradient"] = median_gradient(self.bisection, parts, statistics)
        alone: list[dict[str, Any]] = []
        if finite and others is not None and facts["held"]:
            alone = described_parts(self.bisection, self.bisection.parts(others), facts["reduction"], others)
            facts["alone"] = self._alone(alone, facts["batch_loss"])
        facts["moved"] = moved(self.bisection, own) if finite else []
        facts["without"] = self._without(facts)
        return facts, record_rows(self.step, everything, alone)

    def _alone(self, rows: list[dict[str, Any]], batch_loss: float | None) -> dict[str, Any]:
        """The facts ``alone``."""
        found = summary(rows)
        known = [(row["loss"], row["samples"]) for row in rows if row["loss"] is not None]
        mean = sum(loss * count for loss, count in known) / (sum(count for _, count in known) or 1)
        high = batch_loss is None or not math.isfinite(mean) or mean > LOW * batch_loss
        told = {name: found[name] for name in ("median", "nonfinite")}
        return {"statistics_of": self.quiet, "mean": mean, **told, "worst": found["worst"] if high else []}

    def _without(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The facts ``without``."""
        few = max(FEW * facts["samples"], 1)
        rows = [row for of in (facts.get("alone") or {}, facts) for row in carrying(of, facts["samples"])]
        rows += facts["moved"] if len(facts["moved"]) <= few else []
        places = {(row["rank"], row["micro_batch"], row["row"]): row for row in rows}
        if not places or len(places) > few:
            return None
        names = ("row", "rank", "micro_batch", "id")
        chosen = [{name: row[name] for name in names} for _, row in sorted(places.items())]
        return {"rows": chosen, "loss": loss_without(self.bisection, chosen)}

    def _of_quiet_batch(self) -> tuple[dict[int, Statistics] | None, str]:
        """The statistics of a quiet batch, for all micro-batches; or None and why there are none."""
        if self.quiet is None:
            return None, "there is no other batch whose statistics could be held"
        batch = self.stage.frame(self.quiet).micro_batches[0]["batch"]
        [(statistics, loss, error)] = self.bisection.capture(self.quiet, [(batch, 1)])
        if error := self._first_of_all([error]):
            return None, f"the batch of step {self.quiet} raises an error as well: {error}"
        usable = statistics.finite and statistics.of_channels and loss is not None
        if not all(self.stage.gather(usable)):
            return None, f"the statistics of the batch of step {self.quiet} cannot be held in the place of its own"
        return {micro.place: statistics for micro in self.micros}, ""

    def _raising(self, facts: dict[str, Any], others: dict[int, Statistics] | None, why_not: str) -> dict[str, Any]:
        """The facts of a batch that raises an error: which of its samples do."""
        if others is None and (self.quiet is not None or self.layers.layers):
            return {**facts, "why_not": f"the batch raises an error, and {why_not}"}
        parts = self.bisection.parts(others or {}, raising=True)
        kind = facts["error"].partition(":")[0]
        found = self._rows_of([part for part in parts if part.error.partition(":")[0] == kind])
        why_not = "" if found else "no single sample raises the error of the batch"
        statistics_of = self.quiet if self.layers.layers else None
        return {**facts, "possible": bool(found), "why_not": why_not, "statistics_of": statistics_of, "raising": found}

    def _rows_of(self, parts: list[Part]) -> list[dict[str, Any]]:
        own = [{**place_of(part), "id": own_id(part)} for part in parts if part.samples == 1]
        return [row for of_rank in self.stage.gather(own) for row in of_rank]

    def _first_of_all(self, errors: list[str]) -> str:
        return next((error for of_rank in self.stage.gather(errors) for error in of_rank if error), "")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
