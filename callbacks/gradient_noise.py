"""How much the gradients of samples differ, and which batch size that asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import loss_factor, rank_and_ranks
from normzoo.callbacks._run.gradients import batch_size, check_several_gradients, squared_norm, unscales_itself
from normzoo.callbacks._run.parts import cut, squared_norms
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule, is_number, is_whole
from normzoo.functional.noise import (
    DEFAULT_FACTOR,
    chosen_factor,
    noise_scale,
    noise_scale_means,
    noise_scale_update,
    update_noise_bound,
)


class GradientNoise(Measurement):
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

    name = "gradient_noise"
    columns = (
        Column("gradients", "int", "backward passes compared, or with `split` parts of batches, on all ranks"),
        Column("small_batch", "float", "samples in a small batch; the harmonic mean if they differ"),
        Column("big_batch", "float", "samples behind a big gradient: the optimizer's, with `split` a micro-batch's"),
        Column("small_sq", "float", "squared norm of the gradient of a small batch, mean over small batches"),
        Column(
            "big_sq",
            "float",
            "squared norm of the mean of the gradients of a big batch's small batches, mean over big batches",
        ),
        Column(
            "gradient_sq", "float", "estimate of abs(G)^2, unbiased; may be negative where noise is large", logged=True
        ),
        Column(
            "trace", "float", "estimate of tr(Sigma) = C, summed variance of sample gradients, unbiased", logged=True
        ),
        Column("scale", "float", "`trace` over `gradient_sq`, in samples: B_simple of this step alone, noisy"),
        Column("mean_gradient_sq", "float", "running mean of `gradient_sq` over sampled steps"),
        Column("mean_trace", "float", "running mean of `trace` over sampled steps"),
        Column(
            "mean_scale",
            "float",
            "`mean_trace` over `mean_gradient_sq`: B_simple, the critical batch size",
            logged="scale",
        ),
        Column("lr", "float", "alpha, the learning rate of the first parameter group"),
        Column(
            "bound", "float", "alpha^2 C / b times `factor`, of this step's `trace` and the whole batch b", logged=True
        ),
        Column("factor", "text", "the finite-population factor: `(N-b)/N`, `(N-b)/(N-1)`, or `1` for N unknown"),
    )
    figures = (
        Figure(
            "Gradient noise scale",
            "line",
            x="step",
            y="mean_scale",
            y_scale="log",
            level="big_batch",
            y_label="noise scale, samples (straight lines: the batches used)",
        ),
    )

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
        self.decay, self.population, self.factor = decay, population, chosen_factor(factor, None, 1)
        self.count, self.split = samples, split
        self.needs = {"backward"} if split is None else {"batch"}
        self._sums = torch.zeros(3, dtype=torch.float64)  # of gradient_sq, trace and weights
        self._largest = 0
        self._warned = False
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse steps whose gradients are not comparable."""
        if not run.automatic:
            raise ValueError(
                "GradientNoise cannot know how manual optimization weighs the losses of a step's backward passes; "
                "it supports automatic optimization only"
            )
        if run.averages_locally:
            raise ValueError("GradientNoise needs gradients that are reduced over all ranks; under local SGD none are")
        if self.split is not None:
            run.check_training_step("GradientNoise, to split the batch,", "leave out split")
        else:
            check_several_gradients(run, "GradientNoise", ", or pass split=2, which evaluates halves of the batch")

    def start(self, run: Run) -> None:
        """No batch has been seen yet."""
        self._largest, self._warned = 0, False

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """All that the optimizer holds, whether the module has them or not."""
        return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def before_batch(self, step: Step) -> None:
        """Count the samples of a micro-batch, or evaluate its parts."""
        if self.split is None:
            step.memory["batch_size"] = self._count(step.batch)
        else:
            step.memory["parts"] = self._evaluate_parts(step)

    def gradient(self, step: Step, name: Any, g: Tensor) -> None:
        """The squared norm of what a backward pass of this rank adds to a gradient, before ranks are reduced.

        Raises:
            ValueError: if a parameter gets its gradient in parts, whose norms say nothing of that of their sum.
        """
        squares = step.memory.setdefault("squares", {})
        step.memory["in_parts"] = step.memory.get("in_parts", False) or name in squares
        with torch.no_grad():
            squares[name] = squared_norm(g)

    def after_backward(self, step: Step) -> None:
        """Add the norm of the gradient that it brought, or those of the parts of the batch."""
        sums = step.memory.setdefault("sums", _Sums())
        if (parts := step.memory.pop("parts", None)) is not None:  # only now, as the batch might have been skipped
            sums.add_parts(*parts)
        if step.memory.pop("in_parts", False):
            raise ValueError(
                "a parameter got its gradient in several parts in one backward pass, as one used in two checkpointed "
                "segments does; checkpoint with use_reentrant=False"
            )
        if squares := step.memory.pop("squares", {}):
            square = torch.stack(list(squares.values())).sum()
            sums.add(square / loss_factor(step.run, square).square(), step.memory["batch_size"])

    def measure(self, step: Step) -> None:
        """Send the sums, and the norm of the gradient that the optimizer is about to use."""
        sums: _Sums = step.memory.get("sums", _Sums())
        big_sq = torch.zeros((), dtype=torch.float64, device=step.run.device) + sums.big_sq
        if self.split is None:
            grads = [p.grad for p in step.parameters.values() if p.grad is not None]
            # .grad is this times the mean gradient; it has been unscaled, unless the optimizer does that itself
            mean = sums.gradients * loss_factor(step.run, big_sq, unscales_itself(step.optimizer))
            big_sq = sum((squared_norm(g) for g in grads), big_sq) / mean.square()
        counts = [sums.gradients, sums.inverse_small, sums.split, sums.inverse_big, sums.inverse_whole]
        filled = [torch.full_like(big_sq, v) for v in counts]  # on a GPU without a copy that waits
        values = torch.stack([torch.zeros_like(big_sq) + sums.small_sq, big_sq, *filled])
        self.send(step, {"sums": values}, lr=float(step.optimizer.param_groups[0]["lr"]))

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The row of a step; one of a single gradient, such as an epoch's last, has none."""
        small_sq, big_sq, gradients, inverse_small, split, inverse_big, inverse_whole = values["sums"].tolist()
        count = int(gradients)
        if count < 2:
            return []
        # Weights are 1/K: E|g|^2 = |G|^2 + tr(Sigma)/b, and E|mean g|^2 = |G|^2 + tr(Sigma) sum(1/b)/K^2, also if the
        # batches differ
        small_batch = count / inverse_small
        if split:  # the step's gradient is the mean of whole micro-batches'
            bigs, big_batch, batch = split, split / inverse_big, split**2 / inverse_whole
        else:
            bigs, big_batch = rank_and_ranks()[1], count * small_batch
            batch = big_batch
        return [
            self.estimate(sample.about["lr"], small_sq / count, big_sq / bigs, count, small_batch, big_batch, batch)
        ]

    def estimate(
        self,
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

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"sums": self._sums.tolist()}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._sums = torch.tensor(state_dict["sums"], dtype=torch.float64)

    def forget(self) -> None:
        """Drop the running means of another run."""
        self._sums = torch.zeros(3, dtype=torch.float64)

    def _evaluate_parts(self, step: Step) -> tuple[list[int], Tensor, Tensor] | None:
        assert self.split is not None
        given, batch = self.split, step.batch
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
            norms = squared_norms(step.run, batch, step.batch_idx, parts)
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
        count = batch_size(batch) if self.count is None else self.count(batch)
        if not count:
            raise ValueError(
                f"GradientNoise needs the number of samples in a batch, and found {count} in a {type(batch).__name__}; "
                "pass samples=, a function of the batch"
            )
        return count


@dataclass
class _Sums:
    """Sums over the small batches of a step, and over the big ones that are split."""

    small_sq: Tensor | float = 0.0
    gradients: int = 0
    inverse_small: float = 0.0
    big_sq: Tensor | float = 0.0
    split: int = 0
    inverse_big: float = 0.0
    inverse_whole: float = 0.0

    def add(self, square: Tensor, size: int) -> None:
        """Add a small batch: its squared norm and number of samples."""
        self.small_sq = self.small_sq + square
        self.gradients += 1
        self.inverse_small += 1 / size

    def add_parts(self, sizes: Sequence[int], small_sq: Tensor, big_sq: Tensor) -> None:
        """Add a big batch: the numbers of samples of its parts, the sum of their squared norms, and its own."""
        inverse = sum(1 / b for b in sizes)
        self.small_sq, self.big_sq = self.small_sq + small_sq, self.big_sq + big_sq
        self.gradients, self.split = self.gradients + len(sizes), self.split + 1
        self.inverse_small += inverse
        self.inverse_big += inverse / len(sizes) ** 2
        self.inverse_whole += 1 / sum(sizes)
