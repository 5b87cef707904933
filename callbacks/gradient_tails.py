"""How heavy the tails of the gradients are, layer by layer."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._record import Record, key, trainable_parameters
from normzoo.callbacks._recording import RecordingCallback
from normzoo.callbacks._schedule import Schedule, as_schedule
from normzoo.callbacks._taps import Reading, check_strategy, gradients
from normzoo.functional.log_histogram import quantiles
from normzoo.functional.tails import tail_summary
from normzoo.metrics.log_histogram import LogHistogram

_LOGGED = ("kurtosis", "max", "l2", "tail_ratio", "alpha")


class GradientTails(RecordingCallback):
    """Records the distribution of each parameter's gradient as the optimizer is about to use it.

    That is after reduction over ranks and unscaling, before clipping. A row of the record ``gradient_tails`` for each
    sampled step and parameter holds: ``max`` |g|, ``l2``, excess ``kurtosis`` (exact); quantiles ``q50``, ``q99``,
    ``q999`` of |g|, ``tail_ratio`` q999/q50, ``alpha`` (Hill, over the top ``tail_fraction``), from the histogram;
    counts of ``zeros`` and ``nonfinite``; and the histogram as pairs (bucket, count). Logged under
    ``gradient/STAT/PARAMETER``. Under DDP every rank holds the same reduced gradient, so nothing is communicated.

    Args:
        every_n_steps: sample when the number of optimizer steps taken is a multiple of this; or a schedule.
        parameters: names to follow, with ``*`` as in a shell; all trainable parameters by default.
        tail_fraction: share of the largest magnitudes that alpha is estimated from.
        mantissa_bits: of the histogram's buckets; quantiles are off by at most 2^-(m+1).
        dirpath: folder of the record; by default the trainer's log folder.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies, or if no parameter matches.

    Source: heavy tails as in Bjorck et al. 2018, arXiv 1806.02375, section 3.1; Simsekli et al. 2019,
    arXiv 1901.06053.
    """

    def __init__(
        self,
        every_n_steps: int | Schedule = 50,
        *,
        parameters: str = "*",
        tail_fraction: float = 0.01,
        mantissa_bits: int = 3,
        dirpath: str | None = None,
    ) -> None:
        if not 0 < tail_fraction < 1:
            raise ValueError(f"tail_fraction must be between 0 and 1, not {tail_fraction}")
        LogHistogram(mantissa_bits=mantissa_bits)  # checks its range
        self._is_due = as_schedule(every_n_steps)
        self.parameters, self.tail_fraction, self.dirpath = parameters, tail_fraction, dirpath
        self.mantissa_bits = mantissa_bits
        self._pending: tuple[int, list[str], Reading, Reading] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self)
        if stage != "fit":
            return
        names = list(trainable_parameters(pl_module))
        if not fnmatch.filter(names, self.parameters):
            raise ValueError(f"no trainable parameter matches {self.parameters!r}; there are {', '.join(names)}")
        self._record = Record(trainer, "gradient_tails", self.dirpath)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if due, without waiting for the result."""
        self.flush(trainer)
        if not self._is_due(trainer.global_step):
            return
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        followed = [
            (name, p)
            for name, p in trainable_parameters(pl_module).items()
            if id(p) in ours and fnmatch.fnmatchcase(name, self.parameters)
        ]
        if found := gradients(followed):
            counts, exact = self.measure(list(found.values()))
            self._pending = (trainer.global_step, list(found), Reading(counts), Reading(exact))

    def measure(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Histograms, (layers, buckets) int64, and exact figures, (layers, 3), on the gradients' device."""
        histogram = LogHistogram(len(tensors), self.mantissa_bits).to(tensors[0].device)
        histogram.update_all(tensors)
        # The state itself: compute() would add up the ranks, which all hold the same reduced gradient
        return histogram.counts, torch.stack([tail_summary(t).float() for t in tensors])

    def rows(self, step: int, names: list[str], counts: Tensor, exact: Tensor) -> list[dict[str, Any]]:
        """The record's rows, from what :meth:`measure` gave."""
        histogram = LogHistogram(len(names), self.mantissa_bits)
        histogram.counts = counts
        at = quantiles(counts, (0.5, 0.99, 0.999), self.mantissa_bits, absolute=True).tolist()
        rows = []
        for layer, name in enumerate(names):
            largest, l2, kurtosis = exact[layer].tolist()
            q50, q99, q999 = at[layer]
            filled = counts[layer].nonzero().flatten()
            rows.append(
                {
                    "step": step,
                    "layer": name,
                    "size": int(counts[layer].sum()),
                    "max": largest,
                    "l2": l2,
                    "kurtosis": kurtosis,
                    "q50": q50,
                    "q99": q99,
                    "q999": q999,
                    "tail_ratio": q999 / q50 if q50 else None,
                    "alpha": histogram.tail_index(self.tail_fraction, layer=layer),
                    "zeros": histogram.zeros(layer),
                    "nonfinite": histogram.nonfinite(layer),
                    "mantissa_bits": self.mantissa_bits,
                    "histogram": torch.stack([filled, counts[layer][filled]], 1).numpy(),
                }
            )
        return rows

    def flush(self, trainer: Trainer) -> None:
        """Write the last sample, if it has not been."""
        if self._pending is None:
            return
        (step, names, counts, exact), self._pending = self._pending, None
        if not self._record.writes:
            return
        rows = self.rows(step, names, counts.read(), exact.read())
        self._record.append(*rows)
        self._record.log(
            {key("gradient", s, r["layer"]): r[s] for r in rows for s in _LOGGED if r[s] is not None}, step
        )
