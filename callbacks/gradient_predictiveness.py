"""How far along the step the gradient can be relied on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import rank_and_ranks
from normzoo.callbacks._run.gradients import check_differentiable, gradient_step, runs_step_hooks
from normzoo.callbacks._run.ranks import Reading
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.relative_loss import LossFunction, checked_losses, checked_multiples
from normzoo.callbacks.schedule import Schedule
from normzoo.functional.gradient_changes import as_real, gradient_changes, gradient_predictiveness

# Of the learning rate; the first lies within the step, the last beyond it
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
_ALONG = ("gradient", "update")


class GradientPredictiveness(Measurement):
    """Records how loss and gradient of the mini-batch change along the optimizer's step: the effective smoothness.

    At theta, where the step starts, and at theta - s * u for multiples s of a step u, loss and gradient are evaluated
    by the same passes: g at theta, g' there. Along the ``"gradient"``, u is the learning rate (of each parameter group)
    times the gradient that the optimizer is about to use, before clipping; along the ``"update"``, what the optimizer
    takes from the parameters. A row of the record ``gradient_predictiveness`` for each sampled step holds, for each of
    ``multiples``, ``loss``, ``distance`` (Euclidean, from theta), ``gradient_change`` (the norm of g' - g) and
    ``cosine`` (of g' and g), and over all of them ``smoothness`` (the largest ``gradient_change / distance``, the
    effective beta-smoothness), ``worst_cosine``, ``largest_change`` (the largest ``gradient_change`` over the norm of
    g) and ``loss_range``. These four are logged as ``gradient_predictiveness/smoothness`` and so on, with several
    optimizers followed by ``/optimizer_INDEX``. A loss or gradient that is not finite at a multiple counts as an
    infinite change. A step that moves nothing leaves no row.

    The mini-batch is the one being trained on (the last micro-batch, when accumulating, while ``"gradient"`` and
    ``"update"`` are the whole step's), the gradient that with respect to the optimizer's parameters, neither clipped
    nor scaled. All points are evaluated in training mode, with the same random draws (dropout), with the buffers
    (running statistics) as the training pass left them, and at the run's precision, as are the losses of
    :class:`RelativeLoss`; the run goes on as if nothing had been measured, as with that.

    g' - g cancels: at short steps it is rounding of the two gradients, about 1e-6 of their norm in float32 and several
    1e-2 under bfloat16 autocast. Where ``largest_change`` comes near this, the steps are too short for the precision:
    take larger ``multiples``.

    Under DDP loss and gradient of each point are means over ranks, so that R ranks record what one rank does on the
    union of their batches. To that end the ranks sum as many numbers as the gradient has in one all-reduce for each
    point: this measurement is exempt from the rule that one small collective serves a sampled step. Layers that
    normalize by statistics of the batch have those of each rank's own batch unless they are synchronized, as in
    training; the union would have others.

    A sampled step costs a forward and a backward pass, and one of each for each multiple but 0; meanwhile it holds
    three more copies of the parameters and two more gradients.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        multiples: s, multiples of the step: finite, all different, at least one above 0.
        along: ``"gradient"`` or ``"update"``.
        loss: ``loss(module, batch)``, a tensor of one value that can be differentiated, without gradient scaling; or a
            list of such functions, one for each optimizer; by default the module's own ``training_step``.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for strategies other than one device and DDP (``fully_shard``
            among them), for local SGD, for manual optimization without ``loss``, and for a ``training_step`` that takes
            ``dataloader_iter``; when training starts for a list of more or fewer losses than optimizers, or
            ``along="update"`` and an optimizer without step hooks; at a sampled step for checkpoints with
            ``use_reentrant=True``, or a loss that requires no gradient.
        TypeError: if ``loss`` returns anything else than a tensor of one value.

    Source: Santurkar et al. 2018, arXiv 1805.11604, figure 4.
    """

    name = "gradient_predictiveness"
    columns = (
        Column("optimizer", "int", "index of the optimizer whose step it is; 0 if there is one"),
        Column("lr", "float", "learning rate of the first parameter group"),
        Column("along", "text", "the step: `gradient`, the learning rate times it; or `update`, the one made"),
        Column("start_loss", "float", "loss of the mini-batch where the step starts"),
        Column("gradient_norm", "float", "Euclidean norm of its gradient g there"),
        Column("multiples", "curve", "s, multiples of the step"),
        Column("loss", "curve", "loss of the mini-batch at s times the step, for each of `multiples`"),
        Column("distance", "curve", "Euclidean distance of that point from the start"),
        Column("gradient_change", "curve", "norm of g' - g, where g' is the gradient at that point"),
        Column("cosine", "curve", "cosine of the angle between g' and g; NaN where one is 0 or not finite"),
        Column(
            "smoothness",
            "float",
            "largest `gradient_change` over `distance`, the effective beta-smoothness; infinite if a gradient is not "
            "finite, null if g or `start_loss` is not",
            logged=True,
        ),
        Column("worst_cosine", "float", "smallest `cosine`; null if there is none", logged=True),
        Column(
            "largest_change",
            "float",
            "largest `gradient_change` over `gradient_norm`; infinite and null as `smoothness`, null if g is 0",
            logged=True,
        ),
        Column(
            "loss_range",
            "float",
            "largest of `start_loss` and `loss` less the smallest; infinite if one of `loss` is not finite",
            logged=True,
        ),
    )
    figures = (
        Figure(
            "Loss along the step",
            "curve",
            x="multiples",
            y="loss",
            lines=("optimizer", "along"),
            x_scale="signed log",
            y_scale="signed log",
            x_unit="lr",
            y_range=(-1e6, 1e6),
            x_label="step size (multiple × learning rate)",
            y_label="loss",
            samples=True,
        ),
        Figure(
            "Change of the gradient along the step",
            "curve",
            x="multiples",
            y="gradient_change",
            lines=("optimizer", "along"),
            x_scale="signed log",
            y_scale="log",
            x_unit="lr",
            y_range=(1e-9, 1e9),
            x_label="step size (multiple × learning rate)",
            y_label="|g' − g|",
            samples=True,
        ),
        Figure(
            "Effective smoothness",
            "line",
            x="step",
            y="smoothness",
            lines=("optimizer", "along"),
            y_scale="log",
            y_range=(1e-9, 1e9),  # an infinite or undefined smoothness is drawn at the upper end
            y_label="largest |g' − g| / distance",
        ),
    )
    needs = frozenset({"batch", "extra_pass"})
    reduce = None  # all ranks hold the same

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        multiples: list[float] | tuple[float, ...] = MULTIPLES,
        along: str = "gradient",
        loss: LossFunction | Sequence[LossFunction] | None = None,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        self.multiples = checked_multiples(multiples)
        if along not in _ALONG:
            raise ValueError(f"along must be one of {', '.join(map(repr, _ALONG))}, not {along!r}")
        self.along = along
        self.loss: LossFunction | list[LossFunction] | None = checked_losses(loss)
        self._several = False
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse ranks of different parameters, and a ``training_step`` that cannot be evaluated once more."""
        if run.averages_locally:
            raise ValueError(
                "GradientPredictiveness needs ranks with the same parameters, and local SGD lets them differ; use DDP "
                "without it, or leave GradientPredictiveness out"
            )
        if self.loss is None:
            run.check_training_step("GradientPredictiveness", "pass loss=, a function of (module, batch)")

    def start(self, run: Run) -> None:
        """Refuse losses of other optimizers, and an update that cannot be seen."""
        several = len(run.optimizers)
        if isinstance(self.loss, list) and len(self.loss) != several:
            raise ValueError(
                f"GradientPredictiveness takes one loss for all optimizers or one for each; {len(self.loss)} were "
                f"given, and the number of optimizers is {several}"
            )
        self._several = several > 1
        for optimizer in run.optimizers if self.along == "update" else ():
            if not runs_step_hooks(optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} calls no step hooks (it leaves out Optimizer.__init__), so "
                    'GradientPredictiveness cannot see its update; pass along="gradient", or train with the optimizer '
                    "that it wraps"
                )

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """All that the optimizer holds, whether the module has them or not."""
        return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def measure(self, step: Step) -> None:
        """Follow the gradient, or ask for the update."""
        # Copied: the learning rate may be a tensor that a scheduler changes in place
        lr = torch.as_tensor(step.optimizer.param_groups[0]["lr"], dtype=torch.float64).clone()
        step.memory["lr"] = Reading(lr)
        if self.along == "update":
            step.wants_update = True
        else:
            self._measure(step, *gradient_step(step.run, step.optimizer))

    def measure_update(self, step: Step) -> None:
        """Follow the update that was made."""
        params = [step.parameters[i] for i in step.before]
        start = list(step.before.values())
        self._measure(step, params, [p0 - p for p0, p in zip(start, params, strict=True)], start)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The row of a sample, unless nothing moved or the step was skipped."""
        changes = values["changes"].tolist()
        (start_loss, _, gradient_norm, _, _), *moved = changes
        losses, distances, _, changed, _ = (list(column) for column in zip(*moved, strict=True))
        if not any(distances) or (sample.about["skips"] and not all(map(math.isfinite, distances))):
            return []
        found = gradient_predictiveness(changes)
        row: dict[str, Any] = {
            "optimizer": sample.optimizer,
            "lr": sample.about["lr"].read().item(),
            "along": self.along,
            "start_loss": start_loss,
            "gradient_norm": gradient_norm,
            "multiples": self.multiples,
            "loss": losses,
            "distance": distances,
            "gradient_change": changed,
            "cosine": found.cosine,
            "smoothness": _known(found.smoothness),
            "worst_cosine": _known(found.worst_cosine),
            "largest_change": _known(found.largest_change),
            "loss_range": _known(found.loss_range),
        }
        return [row]

    def suffix(self, row: Mapping[str, Any]) -> str:
        """The optimizer, if there are several."""
        return f"/optimizer_{row['optimizer']}" if self._several else ""

    def _measure(
        self, step: Step, params: Sequence[Tensor], steps: Sequence[Tensor], start: Sequence[Tensor] | None = None
    ) -> None:
        followed = [p for p in params if p.requires_grad]
        if not followed:
            return
        with step.extra_passes(moved=params) as one_pass:
            changes = gradient_changes(
                lambda: self._loss_and_gradient(step, one_pass, followed), params, steps, self.multiples, start
            )
        # Of steps that a GradScaler skips there is an infinite gradient, and no update
        skips = self.along == "gradient" and step.run.scaler is not None
        self.send(step, {"changes": changes}, lr=step.memory["lr"], skips=skips)

    def _loss_and_gradient(
        self, step: Step, one_pass: Callable[[], Any], params: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Those of the mini-batch, means over ranks."""
        own = self.loss[step.index] if isinstance(self.loss, list) else self.loss
        with torch.enable_grad(), one_pass():
            if own is None:
                loss = step.training_loss()
            else:
                with step.run.precision():
                    loss = own(step.run.module, step.batch)
            if loss is None:  # of training_step: there is none for this batch
                loss = torch.full((), torch.nan, device=step.run.device)
                return _mean_over_ranks(loss, [torch.full_like(p, torch.nan) for p in params])
            check_differentiable(loss, "GradientPredictiveness")
            # Half precision takes gradients of a scaled loss, as the run does
            scale = torch.ones_like(loss.detach())
            scale = scale if step.run.scaler is None else step.run.scaler.scale(scale)
            found = torch.autograd.grad(loss * scale, params, allow_unused=True, grad_outputs=torch.ones_like(loss))
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        dense = [as_real(g.to_dense() if g.is_sparse else g) for g in gradient]
        return _mean_over_ranks(as_real(loss), dense if step.run.scaler is None else [g / scale for g in dense])


def _mean_over_ranks(loss: Tensor, gradient: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    ranks = rank_and_ranks()[1]
    if ranks == 1:
        return loss, gradient
    together = torch.cat([loss.reshape(1), *(as_real(g).flatten() for g in gradient)])
    dist.all_reduce(together)
    first, *others = (together / ranks).split([1, *(as_real(g).numel() for g in gradient)])
    return first, others


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
