"""How much the gradients of samples differ, and which batch size that asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._isolation import check_training_step
from normzoo.callbacks._parts import cut, squared_norms
from normzoo.callbacks._record import key
from normzoo.callbacks._recording import RecordingCallback, checked_dirpath, checked_label
from normzoo.callbacks._schedule import Schedule, as_schedule, is_number, is_whole
from normzoo.callbacks._taps import (
    BackwardNorm,
    Reading,
    batch_size,
    check_several_gradients,
    check_strategy,
    loss_factor,
    squared_norm,
)
from normzoo.functional.noise import (
    DEFAULT_FACTOR,
    chosen_factor,
    noise_scale,
    noise_scale_means,
    noise_scale_update,
    update_noise_bound,
)

_LOGGED = {"scale": "mean_scale", "trace": "trace", "gradient_sq": "gradient_sq", "bound": "bound"}


class GradientNoise(RecordingCallback):
    """Records the simple noise scale B = tr(Sigma)/|G|^2, the critical batch size, from gradients of two batch sizes.

    The small batch is that of one backward pass on one rank, the big one all of those that an optimizer step uses:
    micro-batches (``accumulate_grad_batches`` above 1), ranks, or both, K gradients in all. Their norms are taken as
    each backward pass yields them, before accumulation and reduction, without gradient scaling and without Lightning's
    division by ``accumulate_grad_batches``; the norm of their mean, before clipping. With equal batches ``trace``, C,
    is b/(K-1) times the sum of |g_k - mean g|^2. A row of the record ``gradient_noise`` for each sampled step; logged
    under ``gradient_noise``: ``scale`` (the ratio of running means), ``trace``, ``gradient_sq``, ``bound``.

    With ``split``, each micro-batch of a sampled step is also evaluated in K parts, by the module's ``training_step``
    and in isolation as that of :class:`RelativeLoss`, before it is trained on (and before the module's own
    ``on_train_batch_start``). The parts are the small batches then, and each micro-batch of each rank a big one; the
    figures are means over these. That costs another forward and backward pass, uncompiled, and holds two more
    gradients and a copy of the parameters meanwhile. A batch of fewer samples than parts is left out, and so is a
    short one with a part of a single sample, which batch normalization may refuse.

    The loss is taken to be a mean over samples. Under batch normalization samples share their statistics, so the
    gradient is that of a loss of whole micro-batches, or parts, and depends on their size.

    Args:
        every_n_steps: sample when the number of optimizer steps taken is a multiple of this; or a schedule.
        decay: factor by which the weight of older samples falls in the running means; None to weigh all alike.
        population: N, samples in the training set, for the finite-population factor; None leaves it out.
        factor: its name; with C estimated from batches drawn without replacement, ``"(N-b)/N"`` is exact.
        samples: ``samples(batch)``, the number of samples in a batch; by default the length of its first tensor.
        split: the number of parts, 2 or more, each of consecutive samples, in which each micro-batch is evaluated; or
            ``split(batch)``, which returns them. By default None: what the run computes is compared.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies, manual optimization (and so several
            optimizers), local SGD, steps of one gradient without ``split``, or with it a ``training_step`` that takes
            ``dataloader_iter``; at a sampled step for a batch without a tensor if ``samples`` is not given, for one
            that cannot be split, for one larger than ``population``, or for checkpoints with ``use_reentrant=True``
            (with ``split`` any, without those of a parameter used in several segments).

    Source: McCandlish et al. 2018, arXiv 1812.06162, section 2.2 and appendix A.1; C and the bound from Bjorck et
    al. 2018, arXiv 1806.02375.
    """

    quantity = "gradient_noise"

    _sums: Tensor  # of gradient_sq, trace and weights
    # Sums over the small batches of a step, and over the big ones that are split
    _small_sq: Tensor | float
    _gradients: int
    _inverse_small: float
    _big_sq: Tensor | float
    _split: int
    _inverse_big: float
    _inverse_whole: float

    def __init__(
        self,
        every_n_steps: int | Schedule = 50,
        *,
        decay: float | None = 0.95,
        population: int | None = None,
        factor: str = DEFAULT_FACTOR,
        samples: Callable[[Any], int] | None = None,
        split: int | Callable[[Any], Sequence[Any]] | None = None,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if decay is not None and not (is_number(decay) and 0 < decay < 1):
            raise ValueError(f"decay must be between 0 and 1, not {decay!r}")
        if population is not None and not (is_whole(population) and population >= 1):
            raise ValueError(f"population must be at least 1, not {population!r}")
        if not (split is None or callable(split) or (isinstance(split, int) and split >= 2)):
            raise ValueError(f"split must be a number of parts from 2, a function of the batch, or None, not {split!r}")
        update_noise_bound(0.0, learning_rate=0.0, batch_size=1, population=population, factor=factor)  # checks factor
        self._is_due = as_schedule(every_n_steps)
        self.decay, self.population, self.factor = decay, population, chosen_factor(factor, None, 1)
        self.samples, self.split, self.dirpath, self.label = (
            samples,
            split,
            checked_dirpath(dirpath),
            checked_label(label),
        )
        self._forget_run()
        self._pending: tuple[int, float, Reading] | None = None
        self._tap: BackwardNorm | None = None
        self._batch_size: int | None = None
        self._of_parts: tuple[list[int], Tensor, Tensor] | None = None  # sizes and squared norms
        self._largest = 0
        self._warned = False
        self._sampled: int | None = None
        self._reset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GradientNoise cannot know how manual optimization weighs the losses of a step's backward passes; "
                "it supports automatic optimization only"
            )
        # Lightning sets it for local SGD, and for nothing else
        if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
            raise ValueError("GradientNoise needs gradients that are reduced over all ranks; under local SGD none are")
        if self.split is None:
            check_several_gradients(trainer, "GradientNoise", ", or pass split=2, which evaluates halves of the batch")
        else:
            check_training_step(pl_module, "GradientNoise, to split the batch,", "leave out split")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the record."""
        super().on_train_start(trainer, pl_module)
        self._largest, self._warned = 0, False
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the samples, if due, and evaluate the parts of the batch."""
        self._sampled = self._batch_size = self._of_parts = None
        if self._is_due(trainer.global_step):
            if self.split is None:
                self._batch_size = self._count(batch)
            else:
                self._of_parts = self._evaluate_parts(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Listen to this backward pass, if due."""
        if self._batch_size is not None:
            self._tap = BackwardNorm(p for group in trainer.optimizers[0].param_groups for p in group["params"])

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the norm of the gradient that it brought, or those of the parts."""
        if self._of_parts is not None:  # only now, as the batch might have been skipped
            sizes, small_sq, big_sq = self._of_parts
            self._of_parts = None
            inverse = sum(1 / b for b in sizes)
            self._small_sq, self._big_sq = self._small_sq + small_sq, self._big_sq + big_sq
            self._gradients, self._split = self._gradients + len(sizes), self._split + 1
            self._inverse_small += inverse
            self._inverse_big += inverse / len(sizes) ** 2
            self._inverse_whole += 1 / sum(sizes)
        if self._tap is None or self._batch_size is None:
            return
        tap, self._tap = self._tap, None
        square = tap.close()
        if square is not None:
            undo = loss_factor(trainer, square)
            self._small_sq = self._small_sq + square / undo.square()
            self._gradients += 1
            self._inverse_small += 1 / self._batch_size

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare with the gradient the optimizer is about to use, if due, without waiting for the result."""
        if trainer.global_step == self._sampled:  # a closure evaluated again, as LBFGS does
            return
        self.flush(trainer)
        if not self._is_due(trainer.global_step):
            return
        self._sampled = trainer.global_step
        big_sq = torch.zeros((), dtype=torch.float64, device=pl_module.device) + self._big_sq
        if self.split is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            # Lightning has unscaled it, unless the optimizer does that itself
            scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
            mean = self._gradients * loss_factor(trainer, big_sq, scaled)  # .grad is this times the mean gradient
            big_sq = sum((squared_norm(g) for g in grads), big_sq) / mean.square()
        counts = [self._gradients, self._inverse_small, self._split, self._inverse_big, self._inverse_whole]
        filled = [torch.full_like(big_sq, v) for v in counts]  # on a GPU without a copy that waits
        values = torch.stack([torch.zeros_like(big_sq) + self._small_sq, big_sq, *filled])
        lr = float(optimizer.param_groups[0]["lr"])
        self._pending = (trainer.global_step, lr, Reading(values, dist.ReduceOp.SUM))
        self._reset()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._reset()

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"sums": self._sums.tolist()}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self._sums = torch.tensor(state_dict["sums"], dtype=torch.float64)

    def _forget_run(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def row(
        self,
        step: int,
        lr: float,
        small_sq: float,
        big_sq: float,
        count: int,
        small_batch: float,
        big_batch: float,
        batch: float,
    ) -> dict[str, Any]:
        """The record's row, from mean squared norms, how many are small, and sizes; adds to the running means."""
        noise = noise_scale(small_sq, big_sq, small_batch, big_batch)
        now = [noise.gradient_sq.item(), noise.trace.item()]
        if all(map(math.isfinite, now)):  # a GradScaler skips the step otherwise, or the run is lost
            self._sums = noise_scale_update(self._sums, torch.tensor(now, dtype=torch.float64), self.decay)
        means = noise_scale_means(self._sums).tolist()
        bound = update_noise_bound(noise.trace, lr, round(batch), self.population, self.factor)
        return {
            "step": step,
            "gradients": count,
            "small_batch": small_batch,
            "big_batch": big_batch,
            "small_sq": small_sq,
            "big_sq": big_sq,
            "gradient_sq": now[0],
            "trace": now[1],
            "scale": noise.scale.item(),
            "mean_gradient_sq": means[0],
            "mean_trace": means[1],
            "mean_scale": means[1] / means[0] if means[0] else math.nan,
            "lr": lr,
            "bound": bound.item(),
            "factor": "1" if self.population is None else self.factor,
        }

    def flush(self, trainer: Trainer) -> None:
        """Write the last sample, if it has not been; a step of one gradient, such as an epoch's last, is none."""
        if self._pending is None:
            return
        (step, lr, reading), self._pending = self._pending, None
        small_sq, big_sq, gradients, inverse_small, split, inverse_big, inverse_whole = reading.read().tolist()
        count = int(gradients)
        if count < 2:
            return
        # Weights are 1/K: E|g|^2 = |G|^2 + tr(Sigma)/b, and E|mean g|^2 = |G|^2 + tr(Sigma) sum(1/b)/K^2, also if the
        # batches differ
        small_batch = count / inverse_small
        if split:  # the step's gradient is the mean of whole micro-batches'
            bigs, big_batch, batch = split, split / inverse_big, split**2 / inverse_whole
        else:
            bigs, big_batch = trainer.world_size, count * small_batch
            batch = big_batch
        row = self.row(step, lr, small_sq / count, big_sq / bigs, count, small_batch, big_batch, batch)
        self._record.append(row)
        self._record.log({key("gradient_noise", name): row[column] for name, column in _LOGGED.items()}, step)

    def _reset(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._batch_size = self._of_parts = None
        self._small_sq = self._big_sq = self._inverse_small = self._inverse_big = self._inverse_whole = 0.0
        self._gradients = self._split = 0

    def _evaluate_parts(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> tuple[list[int], Tensor, Tensor] | None:
        assert self.split is not None
        given = self.split
        parts = cut(batch, self._count(batch), given) if isinstance(given, int) else list(given(batch))
        if len(parts) < 2:
            if not self._largest and isinstance(given, int) and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"GradientNoise(split={given}) leaves out batches of fewer than {given} samples, and the first one "
                    f"sampled has {self._count(batch)}; take larger batches, or accumulate_grad_batches without split"
                )
            return None
        sizes = [self._count(part) for part in parts]
        self._largest = max(self._largest, sum(sizes))
        if min(sizes) == 1 and sum(sizes) < self._largest:
            return None
        try:
            norms = squared_norms(trainer, pl_module, batch, batch_idx, parts)
        except (ValueError, RuntimeError) as error:
            if min(sizes) == 1:
                error.args = (
                    f"GradientNoise(split=...) evaluated a part of one sample, of a batch of {sum(sizes)}; batch "
                    "normalization, for one, needs more: take larger batches or fewer parts, or leave out split "
                    f"({error})",
                )
            raise
        return None if norms is None else (sizes, *norms)

    def _count(self, batch: Any) -> int:
        count = batch_size(batch) if self.samples is None else self.samples(batch)
        if not count:
            raise ValueError(
                f"GradientNoise needs the number of samples in a batch, and found {count} in a {type(batch).__name__}; "
                "pass samples=, a function of the batch"
            )
        return count
