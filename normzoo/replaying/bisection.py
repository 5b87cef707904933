"""Losses of parts of a step's batches, from large parts down to the single samples with the highest losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normzoo._errors import one_line
from normzoo.replaying.batch_rows import Division, division
from normzoo.replaying.held_statistics import BatchStatisticsLayers, Statistics
from normzoo.replaying.stage import Stage

ALL_SINGLE = 64  # samples of which each passes alone
PARTS = 16  # of a larger batch, and of each of its parts
WORST = 4  # parts that are divided further


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that this process has of a step.

    Attributes:
        place: among those that this process has.
        rank: that it was on.
        number: place among those of this rank.
        batch: as it stands in the capsule.
        ids: what identifies its samples; None if that is not known.
        division: how it is divided into samples.
    """

    place: int
    rank: int
    number: int
    batch: Any
    ids: list[Any] | None
    division: Division

    @property
    def samples(self) -> int:
        """How many it has."""
        return self.division.samples

    def part(self, start: int, stop: int) -> Any:
        """Its samples from ``start`` to before ``stop``."""
        return self.division.part(self.batch, start, stop)


@dataclass
class Part:
    """Consecutive samples of a micro-batch.

    Attributes:
        micro: the micro-batch.
        start: the first sample.
        stop: behind the last one.
        loss: what ``training_step`` returns for them; None if it raises an error.
        error: that error, for people.
    """

    micro: MicroBatch
    start: int
    stop: int
    loss: float | None = None
    error: str = ""
    whole: bool = False  # its samples cannot pass alone

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.stop - self.start


def micro_batches(stage: Stage, step: int) -> list[MicroBatch]:
    """The micro-batches that this process has of a step."""
    frame = stage.frame(step)
    seen: dict[int, int] = {}
    found = []
    for place, (rank, micro) in enumerate(zip(frame.rank_of, frame.micro_batches, strict=True)):
        number = seen[rank] = seen.get(rank, -1) + 1
        divided = division(micro["batch"])
        ids = micro.get("ids")
        known = isinstance(ids, list) and len(ids) == divided.samples
        found.append(MicroBatch(place, rank, number, micro["batch"], ids if known else None, divided))
    return found


class Bisection:
    """Evaluates parts of the batches of a step, at the stage's present weights.

    All ranks make the same number of passes, so that collectives of a ``training_step`` do not wait for ranks that have
    fewer samples.

    Args:
        stage: what is asked.
        step: whose batches and random streams are used.
        micros: the micro-batches of this process, at least one.
        layers: of the module that normalize over a batch.
    """

    def __init__(self, stage: Stage, step: int, micros: list[MicroBatch], layers: BatchStatisticsLayers) -> None:
        self.stage, self.step, self.micros, self.layers = stage, step, micros, layers

    def capture(self, step: int, batches: list[tuple[Any, int]]) -> list[tuple[Statistics, float | None, str]]:
        """Pass whole batches of a step, each with its number of samples: their statistics, losses and errors."""
        passed = []
        for place in range(int(self.stage.reduce_max(len(batches)))):
            batch, samples = batches[min(place, len(batches) - 1)]
            with self.layers.captured(max(samples, 1)) as statistics:
                loss, error = self._loss(batch, step, min(place, len(batches) - 1))
            passed.append((statistics, loss, error))
        return passed[: len(batches)]

    def parts(self, statistics: Mapping[int, Statistics], raising: bool = False) -> list[Part]:
        """All samples of this process in parts, which are single samples where the loss is highest.

        Args:
            statistics: by which the layers normalize, by places of micro-batches.
            raising: whether parts that raise an error are divided, and no others.
        """
        total = sum(micro.samples for micro in self.micros)
        parts = []
        for micro in self.micros:
            count = micro.samples if total <= ALL_SINGLE else math.ceil(PARTS * micro.samples / total)
            parts += _divided(Part(micro, 0, micro.samples), count)
        self._evaluate(parts, statistics)
        while True:
            worst = sorted(parts, key=lambda part: badness(part, raising), reverse=True)[:WORST]
            chosen = [p for p in worst if p.samples > 1 and not p.whole and (p.loss is None) == raising]
            if not self.stage.reduce_max(len(chosen)):
                return sorted(parts, key=lambda part: (part.micro.place, part.start))
            children = [_divided(part, min(PARTS, part.samples)) for part in chosen]
            self._evaluate([child for of_part in children for child in of_part], statistics)
            for part, of_part in zip(chosen, children, strict=True):
                if not raising and all(child.loss is None for child in of_part):
                    part.whole, part.error = True, of_part[0].error
                else:
                    parts.remove(part)
                    parts += of_part

    def gradients(self, chosen: list[Part], count: int, statistics: Mapping[int, Statistics]) -> list[float | None]:
        """The norm of the gradient of each of at most ``count`` parts; None for one that cannot be had."""
        found: list[float | None] = []
        for place in range(count):
            part = chosen[min(place, len(chosen) - 1)] if chosen else Part(self.micros[0], 0, 1)
            with self._holding(part, statistics):
                found.append(self._gradient(part))
        return found[: len(chosen)]

    def _gradient(self, part: Part) -> float | None:
        try:
            gradient = self.stage.gradient_of_batch(part.micro.part(part.start, part.stop), self.step, part.micro.place)
        except Exception:  # of the user's training_step, or of checkpoints that take no torch.autograd.grad
            return None
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square().cpu() for g in gradient.values()]
        return math.sqrt(float(sum(squares))) if squares else None

    def _evaluate(self, parts: list[Part], statistics: Mapping[int, Statistics]) -> None:
        for place in range(int(self.stage.reduce_max(len(parts)))):
            part = parts[place] if place < len(parts) else Part(self.micros[0], 0, 1)
            with self._holding(part, statistics):
                batch = part.micro.part(part.start, part.stop)
                part.loss, part.error = self._loss(batch, self.step, part.micro.place)

    def _holding(self, part: Part, statistics: Mapping[int, Statistics]) -> Any:
        held = statistics.get(part.micro.place) or Statistics(part.micro.samples)
        return self.layers.held(held, part.start, part.stop)

    def _loss(self, batch: Any, step: int, micro: int) -> tuple[float | None, str]:
        try:
            return float(self.stage.loss_of_batch(batch, step, micro)), ""
        except Exception as error:  # of the user's training_step, which may not take such a batch
            return None, one_line(f"{type(error).__name__}: {error}")


def badness(part: Part, raising: bool = False) -> tuple[bool, bool, float]:
    """What parts are sorted by: errors if these are looked for, then losses that are not finite, then high ones."""
    if part.loss is None:
        return raising, False, -math.inf
    return False, not math.isfinite(part.loss), part.loss if math.isfinite(part.loss) else 0.0


def _divided(part: Part, count: int) -> list[Part]:
    """A part in ``count`` parts whose sizes differ by one at most."""
    ends = [part.start + part.samples * i // count for i in range(count + 1)]
    return [Part(part.micro, a, b) for a, b in itertools.pairwise(ends) if b > a]
