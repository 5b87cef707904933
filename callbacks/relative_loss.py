"""How the loss changes along the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import rank_and_ranks
from normzoo.callbacks._run.gradients import gradient_step, is_gradient_step, local_values, runs_step_hooks
from normzoo.callbacks._run.ranks import Reading
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule, is_number, is_whole
from normzoo.functional.relative_loss import bounded_headroom, relative_curve, relative_loss
from normzoo.records.headroom import headroom_quantile

_NO_GRADIENTS = (
    "RelativeLoss evaluates training_step without gradients; where it differentiates, as for a gradient penalty, do so "
    "under torch.enable_grad(), or pass loss=, a function of (module, batch)"
)
LossFunction = Callable[[LightningModule, Any], Tensor]

# In octaves, where the headroom is looked for; two points below 0 show the slope and curvature at the start
MULTIPLES = (-1.0, -0.125, 0.0, *(2.0**k for k in range(-6, 4)))
_ALONG = ("gradient", "update")


class RelativeLoss(Measurement):
    """Records L(theta - s * u; batch) / L(theta; batch) for multiples s of a step u of the optimizer.

    Along the ``"update"``, u is what the optimizer takes from the parameters, with momentum, preconditioning, weight
    decay and clipping; along the ``"gradient"``, the learning rate (of each parameter group) times the gradient that
    the optimizer is about to use, before clipping; theta is where the step starts in both cases. By default the update
    is followed unless it is known to be the plain gradient step: ``torch.optim.SGD`` without momentum, weight decay and
    ``maximize``, where nothing comes between gradient and step. The loss is that of the mini-batch being trained on
    (the last, when accumulating), in training mode. Under DDP and ``ModelParallelStrategy`` it is the mean over ranks.

    A row of the record ``relative_loss`` for each sampled step holds ``multiples``, ``relative`` (exactly 1 at s = 0;
    NaN throughout if the loss at the start is 0 or not finite), ``loss`` (the denominator), ``lr``, ``along`` (what was
    followed) and ``headroom``, the largest s up to which the loss stays at or below where it started: below 1, this
    step raised the loss of its own mini-batch, and a learning rate of ``headroom`` times this one is the largest that
    would not have. Where the loss has risen already at the smallest multiple above 0, ``headroom`` is that multiple and
    ``headroom_bound`` says ``below``; where it has not risen at the largest, that one and ``above``. ``headroom_low``
    is a low quantile over the last samples, as one step says little of the next. Logged as ``relative_loss/headroom``,
    ``relative_loss/headroom_low`` and ``relative_loss/at/S``, with several optimizers followed by ``/optimizer_INDEX``;
    the column ``optimizer`` holds the index. A step that moves nothing (one that a GradScaler skips, or at a learning
    rate of 0) leaves no row.

    The run goes on as if nothing had been measured. Parameters are restored bit for bit, and so is what an evaluation
    changes of the module, the metrics, the batch, random streams, ``should_stop`` and generators that the module holds,
    in containers at any depth, too. ``log``, ``log_dict``, ``print`` and the trainer's loggers do nothing meanwhile.
    Not undone is what lies outside the module: files, writers and iterators that it holds, objects that hold more than
    data and modules, class attributes, globals, hooks of other callbacks. An exception is passed on, one that
    ``training_step`` raises for a large loss as well.

    All multiples are evaluated alike: with the same random draws (dropout), those that come next in the random streams,
    not those of the training pass; with the buffers (running statistics) as the training pass left them; and without
    gradients: what differentiates in its forward pass has to enable them itself.

    A sampled step costs one forward pass, and one for each multiple but 0; meanwhile it holds two more copies of the
    parameters, three along the update.

    With ``step_sizes`` the points are given in units of the learning rate, so that runs of different learning rates are
    measured at the same lengths: ``multiples`` are then the step sizes over the learning rate of the first parameter
    group in that step, and the curve is logged as ``relative_loss/at_step_size/A``.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        multiples: s, multiples of the step: finite, all different, at least one above 0. By default -1, -1/8, 0, 1/64,
            1/32, ..., 8, unless there are ``step_sizes``.
        step_sizes: in the place of ``multiples``, the learning rates that the step is tried at, with the same promises.
        along: ``"gradient"`` or ``"update"``; by default the update, unless it is the plain gradient step.
        loss: ``loss(module, batch)``, a tensor of one value; or a list of such functions, one for each optimizer; by
            default the module's own ``training_step``.
        optimizer: index of the optimizer whose steps are sampled, in the order of ``configure_optimizers``; or several;
            all by default.
        window: samples of an optimizer that ``headroom_low`` is over.
        quantile: which quantile of them it is.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies, for manual optimization without
            ``loss``, and for a ``training_step`` that takes ``dataloader_iter``; for both ``multiples`` and
            ``step_sizes``; when training starts for an index that no optimizer has, a list of more or fewer losses than
            optimizers, or ``along="update"`` and an optimizer without step hooks.
        TypeError: if ``loss`` returns anything else than a tensor of one value.

    Source: Bjorck et al. 2018, arXiv 1806.02375, their relative loss along the gradient.
    """

    name = "relative_loss"
    columns = (
        Column("lr", "float", "learning rate of the first parameter group"),
        Column("loss", "float", "loss of the mini-batch before the step, the denominator"),
        Column("multiples", "curve", "s, multiples of the step"),
        Column("relative", "curve", "loss at s times the step over `loss`, for each of `multiples`; 1 at 0"),
        Column(
            "headroom",
            "float",
            "largest s up to which the loss stays at or below where it started, as `headroom_bound` says; null if "
            "`loss` is 0 or not finite",
            logged=True,
        ),
        Column("along", "text", "the step: `gradient`, the learning rate times it; or `update`, the one made"),
        Column("optimizer", "int", "index of the optimizer whose step it is; 0 if there is one"),
        Column(
            "headroom_bound",
            "text",
            "`below`: less than `headroom`, the smallest of `multiples` above 0; `above`: at least `headroom`, the "
            "largest; null: it is `headroom`, interpolated",
        ),
        Column(
            "headroom_low",
            "float",
            "`quantile` (10 %) of the headroom over the last `window` (20) samples of this optimizer, this one "
            "included; one of their values",
            logged=True,
        ),
        Column(
            "headroom_low_bound",
            "text",
            "`below` or `above` where `headroom_low` is only a bound, as in `headroom_bound`",
        ),
    )
    figures = (
        Figure(
            "Relative loss along the step",
            "curve",
            x="multiples",
            y="relative",
            lines=("optimizer", "along"),
            x_scale="signed log",
            y_scale="log",
            x_unit="lr",
            level=1.0,
            y_range=(1e-2, 1e3),
            x_label="step size (multiple × learning rate)",
            y_label="loss after / before",
            samples=True,
        ),
        Figure(
            "Relative loss at single steps",
            "curve",
            x="multiples",
            y="relative",
            lines=("optimizer", "along"),
            facet="step",
            x_scale="signed log",
            y_scale="log",
            x_unit="lr",
            level=1.0,
            y_range=(1e-2, 1e6),
            x_label="step size",
            y_label="loss after / before",
        ),
        Figure(
            "Learning-rate headroom",
            "line",
            x="step",
            y="headroom",
            lines=("optimizer", "along"),
            y_scale="log",
            level=1.0,
            y_label="headroom (multiple of the learning rate)",
        ),
    )
    shards = True
    needs = frozenset({"batch", "extra_pass"})

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        multiples: list[float] | tuple[float, ...] | None = None,
        step_sizes: list[float] | tuple[float, ...] | None = None,
        along: str | None = None,
        loss: LossFunction | Sequence[LossFunction] | None = None,
        optimizer: int | Sequence[int] | None = None,
        window: int = 20,
        quantile: float = 0.1,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if multiples is not None and step_sizes is not None:
            raise ValueError("pass the points of the curve as multiples of the step or as step_sizes, not both")
        self.multiples = checked_multiples(MULTIPLES if multiples is None else multiples)
        self.step_sizes = None if step_sizes is None else checked_multiples(step_sizes, "step_sizes")
        if along is not None and along not in _ALONG:
            raise ValueError(f"along must be one of {', '.join(map(repr, _ALONG))}, not {along!r}")
        indices = list(optimizer) if isinstance(optimizer, Sequence) else None if optimizer is None else [optimizer]
        if indices is not None and not (indices and all(is_whole(i) and i >= 0 for i in indices)):
            raise ValueError(
                f"optimizer must be the index of an optimizer, from 0, or several, or None for all; not {optimizer!r}"
            )
        if not (is_whole(window) and window >= 1):
            raise ValueError(f"window must be a whole number of at least 1, not {window!r}")
        if not (is_number(quantile) and 0 < quantile < 1):
            raise ValueError(f"quantile must be between 0 and 1, not {quantile!r}")
        self.along, self.optimizer, self.window, self.quantile = along, indices, window, quantile
        self.loss: LossFunction | list[LossFunction] | None = checked_losses(loss)
        self._recent: dict[int, list[tuple[float, str | None]]] = {}  # headrooms, by optimizer
        self._without_hooks: set[int] = set()
        self._several = False
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def check(self, run: Run) -> None:
        """Refuse a ``training_step`` that cannot be evaluated once more, if it is the loss."""
        if self.loss is None:
            run.check_training_step("RelativeLoss", "pass loss=, a function of (module, batch)")

    def start(self, run: Run) -> None:
        """Refuse optimizers that there are not, and an update that cannot be seen."""
        several = len(run.optimizers)
        if wrong := [i for i in self.optimizer or () if i >= several]:
            raise ValueError(
                f"RelativeLoss(optimizer={wrong[0]}): there is no optimizer of this index; the indices go from 0 to "
                f"{several - 1}"
            )
        if isinstance(self.loss, list) and len(self.loss) != several:
            raise ValueError(
                f"RelativeLoss takes one loss for all optimizers or one for each; {len(self.loss)} were given, and the "
                f"number of optimizers is {several}"
            )
        # Noted here, as the first zero_grad() makes torch add hooks to the step of such a class
        self._several = several > 1
        self._without_hooks = {i for i, o in enumerate(run.optimizers) if not runs_step_hooks(o)}
        for i in self._without_hooks.intersection(self.optimizer or self._without_hooks):
            name = type(run.optimizers[i]).__name__
            why = (
                f"{name} calls no step hooks (it leaves out Optimizer.__init__), so RelativeLoss cannot see its update"
            )
            if self.along == "update":
                raise ValueError(f'{why}; pass along="gradient", or train with the optimizer that it wraps')
            if self.along is None:
                rank_zero_warn(f"{why}, and follows the gradient")

    def samples(self, run: Run, index: int, made: int) -> bool:
        """Whether the schedule samples a step, and the optimizer is one of those asked for."""
        return (self.optimizer is None or index in self.optimizer) and super().samples(run, index, made)

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """All that the optimizer holds, whether the module has them or not."""
        return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def measure(self, step: Step) -> None:
        """Follow the gradient, or ask for the update."""
        # Copied: the learning rate may be a tensor that a scheduler changes in place
        first = step.optimizer.param_groups[0]["lr"]
        lr = torch.as_tensor(first, dtype=torch.float64).clone()
        step.memory["lr"], step.memory["divisor"] = Reading(lr), lr if isinstance(first, Tensor) else first
        gradient = step.index in self._without_hooks or is_gradient_step(step.run, step.optimizer)
        if (self.along or ("gradient" if gradient else "update")) == "update":
            step.wants_update = True
        else:
            self._measure(step, "gradient", *gradient_step(step.run, step.optimizer))

    def measure_update(self, step: Step) -> None:
        """Follow the update that was made."""
        params = [step.parameters[i] for i in step.before]
        start = list(step.before.values())
        self._measure(step, "update", params, [p0 - p for p0, p in zip(start, params, strict=True)], start)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The row of a sample, unless nothing moved, the step was skipped or its length has no unit."""
        losses, lr = values["losses"].tolist(), sample.about["lr"].read().item()
        if not values["moved"] or values["skipped"] or (self.step_sizes is not None and lr == 0):
            return []
        # The sum over ranks cancels in the ratio, and the mean is the loss of the whole batch
        relative = relative_curve(losses)
        multiples = self.multiples if self.step_sizes is None else [size / lr for size in self.step_sizes]
        headroom, bound = bounded_headroom(multiples, relative, negative=losses[0] < 0)
        if not math.isfinite(losses[0]) or losses[0] == 0:  # nothing is relative to it
            headroom, bound = math.nan, None
        recent = [*self._recent.get(sample.optimizer, []), (headroom, bound)][-self.window :]
        self._recent[sample.optimizer] = recent
        low, low_bound = headroom_quantile(recent, self.quantile)
        row: dict[str, Any] = {
            "lr": lr,
            "loss": losses[0] / sample.about["ranks"],
            "multiples": multiples,
            "relative": relative,
            "headroom": _known(headroom),
            "along": sample.about["along"],
            "optimizer": sample.optimizer,
            "headroom_bound": bound,
            "headroom_low": _known(low),
            "headroom_low_bound": low_bound,
        }
        return [row]

    def scalars(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The headrooms and the curve."""
        part, points = ("at", row["multiples"]) if self.step_sizes is None else ("at_step_size", self.step_sizes)
        curve = zip(points, row["relative"], strict=True)
        return {**super().scalars(row), **{f"{part}/{_name(s)}{self.suffix(row)}": value for s, value in curve}}

    def suffix(self, row: Mapping[str, Any]) -> str:
        """The optimizer, if there are several."""
        return f"/optimizer_{row['optimizer']}" if self._several else ""

    def state_dict(self) -> dict[str, Any]:
        """The last headrooms of each optimizer, and the steps that each has made."""
        recent = {str(i): [list(sample) for sample in samples] for i, samples in self._recent.items()}
        return {**super().state_dict(), **({"recent": recent} if recent else {})}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().restore(state_dict)
        recent = state_dict.get("recent", {})
        self._recent = {int(i): [(value, bound) for value, bound in samples] for i, samples in recent.items()}

    def forget(self) -> None:
        """Drop the headrooms of another run."""
        super().forget()
        self._recent = {}

    def _measure(
        self,
        step: Step,
        along: str,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        start: Sequence[Tensor] | None = None,
    ) -> None:
        if self.step_sizes is not None:
            steps = _per_learning_rate(steps, step.memory["divisor"])
        with step.extra_passes(moved=params) as one_pass:
            evaluate = partial(self._evaluate, step, one_pass)
            try:
                losses = relative_loss(evaluate, params, steps, self.step_sizes or self.multiples, start)
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    error.add_note(_NO_GRADIENTS)
                raise
        none = torch.zeros((), dtype=torch.bool, device=losses.device)
        moved = torch.stack([none, *(local_values(u).any() for u in steps)]).any()
        skips = along == "gradient" and step.run.scaler is not None
        skipped = torch.stack([none, *(~local_values(u).isfinite().all() for u in steps if skips)]).any()
        values = {"losses": losses, "moved": moved.to(losses), "skipped": skipped.to(losses)}
        self.send(step, values, along=along, lr=step.memory["lr"], ranks=rank_and_ranks()[1])

    def _evaluate(self, step: Step, one_pass: Callable[[], Any]) -> Tensor:
        own = self.loss[step.index] if isinstance(self.loss, list) else self.loss
        with one_pass():
            if own is not None:
                with step.run.precision():
                    return _one_value(own(step.run.module, step.batch))
            loss = step.training_loss()
            return torch.full((), torch.nan, device=step.run.device) if loss is None else _one_value(loss)


def _per_learning_rate(steps: Sequence[Tensor], lr: float | Tensor) -> list[Tensor]:
    """Steps divided by a learning rate; as they are at a learning rate of 0, of which there will be no row."""
    divisor = torch.where(lr == 0, 1.0, lr) if isinstance(lr, Tensor) else lr or 1.0  # a tensor is not read here
    return [u / divisor for u in steps]


def checked_multiples(multiples: Any, name: str = "multiples") -> list[float]:
    """The multiples of a step that an argument of this name gives, or an error that says what they have to be."""
    given = list(multiples) if isinstance(multiples, Iterable) else []
    if not (isinstance(multiples, Iterable) and all(map(is_number, given))):
        raise TypeError(f"{name} must be a list of numbers, not {multiples!r}")
    numbers = sorted(float(s) for s in given)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be finite, got {given}")
    if not numbers or numbers[-1] <= 0:
        raise ValueError(f"{name} must hold at least one value above 0, got {given}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} must all be different, got {given}")
    return numbers


def checked_losses(loss: Any) -> LossFunction | list[LossFunction] | None:
    """The loss functions that an argument gives, or an error that says what they have to be."""
    if loss is None or callable(loss):
        return loss
    if isinstance(loss, list | tuple) and loss and all(map(callable, loss)):
        return list(loss)
    raise TypeError(
        "loss must be a function of (module, batch), a list of them, one for each optimizer, or None for the loss of "
        f"training_step; not {loss!r}"
    )


def _one_value(loss: Any) -> Tensor:
    loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss  # of a DTensor
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"RelativeLoss needs a loss that is a tensor of one value, not {found}")
    return loss.reshape(())


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _name(multiple: float) -> str:
    """A multiple as it stands in a log key: shortest that tells it from all others."""
    return f"{multiple:g}" if float(f"{multiple:g}") == multiple else repr(multiple)
