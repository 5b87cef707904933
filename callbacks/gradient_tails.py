"""How heavy the tails of the gradients are, layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._record import key, trainable_parameters
from normzoo.callbacks._recording import checked_dirpath, checked_label
from normzoo.callbacks._sampling import OptimizerSteps, SamplingCallback
from normzoo.callbacks._schedule import Schedule, as_schedule, is_whole
from normzoo.callbacks._sharing import SharedHistograms, own_parts, world
from normzoo.callbacks._tail_sources import NoiseTap, UpdateTap, check_noise
from normzoo.callbacks._taps import check_strategy, gradients_in_use, is_sharded, plain_name
from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import euclidean_norm, kurtosis, largest_magnitude
from normzoo.functional.histogram_and_moments import histogram_and_moments, merged, sampled_histogram_and_moments
from normzoo.functional.log_histogram import (
    TAIL_LEVELS,
    filled_buckets,
    from_pairs,
    magnitude_counts,
    quantiles,
    tail_indices,
    tensorboard_histogram,
    zero_counts,
)

_LOGGED = ("kurtosis", "max", "l2", "tail_ratio", "alpha")
_SOURCES = ("gradient", "update", "noise")


class Sample(NamedTuple):
    """What was measured in one step, on its way to the host."""

    step: int
    of: str
    names: list[str]
    sizes: list[int]
    histograms: SharedHistograms


class GradientTails(SamplingCallback):
    """Records the distribution of each layer's gradient as the optimizer is about to use it.

    That is after reduction over ranks and unscaling, before clipping. A row of the record ``gradient_tails`` for each
    sampled step and layer holds: ``max`` |g|, ``l2``, excess ``kurtosis`` (exact); quantiles ``q50``, ``q99``,
    ``q999`` of |g|, ``tail_ratio`` q999/q50, ``alpha`` (Hill, over the top ``tail_fraction``), from the histogram;
    counts of ``zeros`` and ``nonfinite``; and the histogram as pairs (bucket, count). Logged under
    ``gradient/STAT/LAYER``, and under ``update`` and ``noise`` likewise; a TensorBoard logger gets the histograms.

    Under DDP the ranks, which all hold the same gradients, share the layers out by size, so that each measures less the
    more there are; with DTensor parameters (FSDP2, tensor parallelism) each rank measures its shard. One reduction for
    each sampled step puts the results together; nothing waits for it.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        parameters: names to follow, with ``*`` as in a shell, or several such patterns; all trainable parameters by
            default.
        by: what a layer is: each ``"parameter"``; each ``"module"``, its parameters together; or a number of parts of
            the name, so that 1 takes together what is inside each of the model's outermost modules.
        of: ``"gradient"``; ``"update"``, what the optimizer's step adds to the parameters, with its momentum, learning
            rate and clipping; ``"noise"``, what the gradient of each rank's last micro-batch is off the mean of all
            micro-batches and ranks; or several of these. The variance of ``"noise"`` from K gradients is (K-1)/K times
            that of a gradient. ``"update"`` keeps a copy of the parameters for the length of a sampled step.
        budget: values of each parameter that the histogram is made of, in larger ones spread evenly, others at each
            sampled step; None for all. ``max`` and ``l2`` are of all values nonetheless.
        tail_fraction: share of the largest magnitudes that alpha is estimated from.
        mantissa_bits: of the histogram's buckets; quantiles are off by at most 2^-(m+1).
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies; when training starts if no
            parameter matches, or if ``"noise"`` has nothing to compare.

    Source: heavy tails as in Bjorck et al. 2018, arXiv 1806.02375; of the noise as in Simsekli et al. 2019, arXiv
    1901.06053.
    """

    quantity = "gradient_tails"

    def __init__(
        self,
        every_n_steps: int | Schedule = 50,
        *,
        parameters: str | Sequence[str] = "*",
        by: str | int = "parameter",
        of: str | Sequence[str] = "gradient",
        budget: int | None = None,
        tail_fraction: float = 0.01,
        mantissa_bits: int = 3,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if not 0 < tail_fraction < 1:
            raise ValueError(f"tail_fraction must be between 0 and 1, not {tail_fraction}")
        if budget is not None and not (is_whole(budget) and budget >= 16):
            raise ValueError(f"budget must be a whole number of at least 16 values, or None for all, not {budget!r}")
        if by not in ("parameter", "module") and not (is_whole(by) and int(by) >= 1):
            raise ValueError(f"by must be 'parameter', 'module' or a number of parts of the name, not {by!r}")
        if budget is not None and by != "parameter":
            raise ValueError("a budget takes as much of a small parameter as of a large one, which by= cannot add up")
        if not is_whole(mantissa_bits):
            raise ValueError(f"mantissa_bits must be a whole number, not {mantissa_bits!r}")
        Layout(mantissa_bits)  # checks its range
        self._is_due = as_schedule(every_n_steps)
        self.parameters = [parameters] if isinstance(parameters, str) else list(parameters)
        if not self.parameters:
            raise ValueError("parameters must be one or more patterns of names")
        self.of = [of] if isinstance(of, str) else list(of)
        if not self.of or not set(self.of) <= {*_SOURCES}:
            raise ValueError(f"of must be one or more of {', '.join(_SOURCES)}, not {of!r}")
        self.by, self.budget, self.tail_fraction = by, budget, tail_fraction
        self.mantissa_bits, self.dirpath, self.label = mantissa_bits, checked_dirpath(dirpath), checked_label(label)
        self._steps = OptimizerSteps()
        self._update: UpdateTap | None = None
        self._noise = NoiseTap()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self, sharded=True)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the record, and refuse what the module, which now is whole, has not."""
        names = [plain_name(name) for name, _ in pl_module.named_parameters()]
        for pattern in self.parameters:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"no parameter matches {pattern!r}; there are {', '.join(names)}")
        if "noise" in self.of:
            check_noise(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        self._forget()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Listen to this backward pass, if the noise is due."""
        if "noise" in self.of and self._is_due(trainer.global_step):
            self._noise.listen(self._followed(pl_module, trainer.optimizers[0]).items())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._noise.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if due, without waiting for the result."""
        step = self._steps.begin(trainer, optimizer)
        if step is None:
            return
        self.flush(trainer)
        params = self._followed(pl_module, optimizer) if self._is_due(step.made) else {}
        if params and "gradient" in self.of:
            self._take("gradient", trainer.global_step, gradients_in_use(trainer, optimizer, params.items()))
        if params and "noise" in self.of:
            self._take("noise", trainer.global_step, self._noise.differences(trainer, optimizer, params))
            self._noise.reset()
        if params and "update" in self.of:
            self._remove_tap()  # of an earlier step in this batch
            self._update = UpdateTap(optimizer, params, partial(self._take, "update", trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of a step that was skipped."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._remove_tap()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured last, and keep nothing."""
        super().on_train_end(trainer, pl_module)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._forget()

    def measure(self, tensors: Sequence[Tensor], step: int = 0) -> tuple[Tensor, Tensor]:
        """Histograms, (layers, buckets) int64, and moments, (layers, 8) float64, on the tensors' device."""
        if self.budget is None:
            return histogram_and_moments(tensors, self.mantissa_bits)
        return sampled_histogram_and_moments(tensors, self.budget, step, self.mantissa_bits)

    def rows(
        self, step: int, of: str, names: list[str], sizes: list[int], counts: Tensor, moments: Tensor
    ) -> list[dict[str, Any]]:
        """The record's rows, from what was measured of each parameter."""
        number: dict[str, int] = {}
        group = [number.setdefault(self._layer(name), len(number)) for name in names]
        layers, values = list(number), [0] * len(number)
        for g, size in zip(group, sizes, strict=True):
            values[g] += size
        counts, moments = merged(counts, moments, group)
        q50, q99, q999 = quantiles(counts, TAIL_LEVELS, self.mantissa_bits, absolute=True).T.tolist()
        columns: dict[str, Sequence[Any]] = {
            "layer": layers,
            "size": values,
            "counted": counts.sum(1).tolist(),
            "max": largest_magnitude(moments).tolist(),
            "l2": euclidean_norm(moments).tolist(),
            "kurtosis": kurtosis(moments).tolist(),
            "q50": q50,
            "q99": q99,
            "q999": q999,
            "tail_ratio": [high / low if low else None for low, high in zip(q50, q999, strict=True)],
            "alpha": tail_indices(counts, self.tail_fraction, self.mantissa_bits).tolist(),
            "zeros": zero_counts(counts).tolist(),
            "nonfinite": magnitude_counts(counts, self.mantissa_bits)[1].tolist(),
            "histogram": [pairs.numpy() for pairs in filled_buckets(counts)],
        }
        alike = {"step": step, "of": of, "mantissa_bits": self.mantissa_bits}
        return [{**alike, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]

    def flush(self, trainer: Trainer) -> None:
        """Write the last samples, if they have not been."""
        pending, self._pending = self._pending or [], None
        for step, of, names, sizes, histograms in pending:
            counts, moments = histograms.read()
            if not self._record.writes:
                continue
            rows = self.rows(step, of, names, sizes, counts, moments)
            self._record.append(*rows)
            self._record.log({key(of, s, r["layer"]): r[s] for r in rows for s in _LOGGED if r[s] is not None}, step)
            self._record.log_histograms(partial(self._for_tensorboard, rows), step)

    def _for_tensorboard(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        dense = from_pairs([row["histogram"] for row in rows], self.mantissa_bits)
        return {
            key(row["of"], "histogram", row["layer"]): tensorboard_histogram(counts, self.mantissa_bits)
            for row, counts in zip(rows, dense, strict=True)
        }

    def _followed(self, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {
            name: p
            for name, p in trainable_parameters(pl_module).items()
            if id(p) in ours and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.parameters)
        }

    def _take(self, of: str, step: int, found: Mapping[str, Tensor]) -> None:
        # Of complex numbers the real and the imaginary parts
        tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found.values()]
        if not tensors:
            return
        every_rank = of == "noise" or any(map(is_sharded, tensors))
        parts = own_parts(tensors, of == "noise")
        mine = [i for i, part in enumerate(parts) if part is not None]
        measured = self.measure([part for part in parts if part is not None], step) if mine else None
        ranks = world()[1] if of == "noise" else 1  # each has its own
        sizes = [t.numel() * ranks for t in tensors]
        shared = SharedHistograms(measured, mine, sizes, self.mantissa_bits, every_rank, tensors[0].device)
        self._pending = [*(self._pending or []), Sample(step, of, list(found), sizes, shared)]

    def _layer(self, name: str) -> str:
        if self.by == "parameter":
            return name
        parts = name.split(".")[:-1]  # of the module
        return ".".join(parts if self.by == "module" else parts[: int(self.by)])

    def _forget(self) -> None:
        self._noise.reset()
        self._remove_tap()

    def _remove_tap(self) -> None:
        if self._update is not None:
            self._update.remove()
            self._update = None
