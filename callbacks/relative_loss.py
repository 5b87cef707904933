"""How the loss changes along the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from normzoo.callbacks._direction import direction, gradient_step
from normzoo.callbacks._figures import relative_loss_curve
from normzoo.callbacks._isolation import Snapshot, check_training_step, isolated, loss_of, training_step
from normzoo.callbacks._record import key
from normzoo.callbacks._recording import checked_dirpath, checked_label
from normzoo.callbacks._sampling import OptimizerStep, OptimizerSteps, SamplingCallback
from normzoo.callbacks._schedule import Schedule, as_schedule, is_number, is_whole
from normzoo.callbacks._taps import Reading, check_strategy, grad_scaler, runs_step_hooks
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


class _Sampled(NamedTuple):
    """Which step was measured: steps made before it, the optimizer's index, the direction, and the learning rate."""

    step: int
    optimizer: int
    along: str
    lr: Reading


class RelativeLoss(SamplingCallback):
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

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        multiples: s, multiples of the step: finite, all different, at least one above 0.
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
            ``loss``, and for a ``training_step`` that takes ``dataloader_iter``; when training starts for an index that
            no optimizer has, a list of more or fewer losses than optimizers, or ``along="update"`` and an optimizer
            without step hooks.
        TypeError: if ``loss`` returns anything else than a tensor of one value.

    Source: Bjorck et al. 2018, arXiv 1806.02375, their relative loss along the gradient.
    """

    quantity = "relative_loss"

    def __init__(
        self,
        every_n_steps: int | Schedule = 500,
        *,
        multiples: list[float] | tuple[float, ...] = MULTIPLES,
        along: str | None = None,
        loss: LossFunction | Sequence[LossFunction] | None = None,
        optimizer: int | Sequence[int] | None = None,
        window: int = 20,
        quantile: float = 0.1,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        self._is_due = as_schedule(every_n_steps)
        given, multiples = multiples, list(multiples) if isinstance(multiples, Iterable) else []
        if not (isinstance(given, Iterable) and all(map(is_number, multiples))):
            raise TypeError(f"multiples must be a list of numbers, not {given!r}")
        self.multiples = sorted(float(s) for s in multiples)
        if not all(map(math.isfinite, self.multiples)):
            raise ValueError(f"multiples must be finite, got {list(multiples)}")
        if not self.multiples or self.multiples[-1] <= 0:
            raise ValueError(f"multiples must hold at least one value above 0, got {list(multiples)}")
        if len(set(self.multiples)) < len(self.multiples):
            raise ValueError(f"multiples must all be different, got {list(multiples)}")
        if along is not None and along not in _ALONG:
            raise ValueError(f"along must be one of {', '.join(map(repr, _ALONG))}, not {along!r}")
        self.optimizer = (
            list(optimizer) if isinstance(optimizer, Sequence) else None if optimizer is None else [optimizer]
        )
        if self.optimizer is not None and not (self.optimizer and all(is_whole(i) and i >= 0 for i in self.optimizer)):
            raise ValueError(
                f"optimizer must be the index of an optimizer, from 0, or several, or None for all; not {optimizer!r}"
            )
        if not (is_whole(window) and window >= 1):
            raise ValueError(f"window must be a whole number of at least 1, not {window!r}")
        if not (is_number(quantile) and 0 < quantile < 1):
            raise ValueError(f"quantile must be between 0 and 1, not {quantile!r}")
        self.along, self.window, self.quantile = along, window, quantile
        self.dirpath, self.label = checked_dirpath(dirpath), checked_label(label)
        self.loss: LossFunction | list[LossFunction] | None = _checked_losses(loss)
        self._steps = OptimizerSteps()
        self._recent: dict[int, list[tuple[float, str | None]]] = {}  # headrooms, by optimizer
        self._without_hooks: set[int] = set()
        self._batch: tuple[Any, int] | None = None
        self._given: Snapshot | None = None
        self._armed: Any = None  # the hook that waits for the step
        self._waits = False  # for the first step after it was set
        self._pending: tuple[_Sampled, Reading] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and open the record."""
        check_strategy(trainer, self, sharded=True)
        super().setup(trainer, pl_module, stage)
        if self.loss is None:
            check_training_step(pl_module, "RelativeLoss", "pass loss=, a function of (module, batch)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that there are not, and continue the record."""
        several = len(trainer.optimizers)
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
        self._without_hooks = {i for i, o in enumerate(trainer.optimizers) if not runs_step_hooks(o)}
        for i in self._without_hooks.intersection(self.optimizer or self._without_hooks):
            self._tell_no_update(type(trainer.optimizers[i]).__name__)
        super().on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last headrooms of each optimizer, and the steps that each has made."""
        recent = {str(i): [list(sample) for sample in samples] for i, samples in self._recent.items()}
        return {**super().state_dict(), **({"recent": recent} if recent else {})}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        recent = state_dict.get("recent", {})
        self._recent = {int(i): [(value, bound) for value, bound in samples] for i, samples in recent.items()}

    def _forget_run(self) -> None:
        super()._forget_run()
        self._recent = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the step, as it is before ``training_step`` may change it."""
        self._batch = (batch, batch_idx)
        # How many steps a batch brings is known beforehand under automatic optimization only
        unknown = len(trainer.optimizers) > 1 or not pl_module.automatic_optimization
        self._given = Snapshot(nn.Module(), batch) if unknown or self._is_due(trainer.global_step) else None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if due, without waiting for the result; along the update, once it has been made."""
        step = self._steps.begin(trainer, optimizer)
        if step is None or self._batch is None:
            return
        self._disarm()
        self.flush(trainer)
        if self._samples(step):
            self._sample(trainer, pl_module, optimizer, step)

    def is_due(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether the next step of an optimizer of the trainer is to be measured."""
        return self._samples(self._steps.next(trainer, trainer.optimizers.index(optimizer)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the batch, and of a step that was skipped."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of a step that was not made."""
        self._let_go()

    def flush(self, trainer: Trainer) -> None:
        """Write the last sample, if it has not been."""
        if self._pending is None:
            return
        (sampled, reading), self._pending = self._pending, None
        *losses, moved, skipped = reading.read().tolist()
        if not moved or skipped:
            return
        # The sum over ranks cancels in the ratio, and the mean is the loss of the whole batch
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        relative = relative_curve(losses)
        headroom, bound = bounded_headroom(self.multiples, relative, negative=losses[0] < 0)
        if not math.isfinite(losses[0]) or losses[0] == 0:  # nothing is relative to it
            headroom, bound = math.nan, None
        recent = [*self._recent.get(sampled.optimizer, []), (headroom, bound)][-self.window :]
        self._recent[sampled.optimizer] = recent
        low, low_bound = headroom_quantile(recent, self.quantile)
        row: dict[str, Any] = {
            "step": sampled.step,
            "lr": sampled.lr.read().item(),
            "loss": losses[0] / world,
            "multiples": self.multiples,
            "relative": relative,
            "headroom": _known(headroom),
            "along": sampled.along,
            "optimizer": sampled.optimizer,
            "headroom_bound": bound,
            "headroom_low": _known(low),
            "headroom_low_bound": low_bound,
        }
        self._record.append(row)
        of = f"optimizer_{sampled.optimizer}" if len(trainer.optimizers) > 1 else ""
        curve = {key("relative_loss", f"at/{_name(s)}", of): v for s, v in zip(self.multiples, relative, strict=True)}
        headrooms = {key("relative_loss", k, of): row[k] for k in ("headroom", "headroom_low") if row[k] is not None}
        self._record.log({**headrooms, **curve}, sampled.step)
        self._record.log_figure(key("relative_loss", "curve", of), partial(relative_loss_curve, row), sampled.step)

    def _tell_no_update(self, name: str) -> None:
        """Say that an optimizer's update cannot be followed: as an error if it was asked for."""
        why = f"{name} calls no step hooks (it leaves out Optimizer.__init__), so RelativeLoss cannot see its update"
        if self.along == "update":
            raise ValueError(f'{why}; pass along="gradient", or train with the optimizer that it wraps')
        if self.along is None:
            rank_zero_warn(f"{why}, and follows the gradient")

    def _samples(self, step: OptimizerStep) -> bool:
        return (self.optimizer is None or step.optimizer in self.optimizer) and self._is_due(step.made)

    def _sample(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, step: OptimizerStep) -> None:
        # Copied: the learning rate may be a tensor that a scheduler changes in place
        lr = Reading(torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64).clone())
        seen = step.optimizer not in self._without_hooks
        along = self.along or (direction(trainer, pl_module, optimizer) if seen else "gradient")
        measure = partial(self._measure, trainer, pl_module, _Sampled(trainer.global_step, step.optimizer, along, lr))
        if along == "gradient":
            measure(*gradient_step(trainer, optimizer))
            return
        params = [p for group in optimizer.param_groups for p in group["params"] if p.numel()]
        start = [p.detach().clone() for p in params]
        self._waits = True
        # The hook stays until the batch ends: taken away from within, it would disturb those that come after it
        self._armed = optimizer.register_step_post_hook(lambda *_: self._after_step(measure, params, start))

    def _after_step(self, measure: Callable[..., None], params: Sequence[Tensor], start: Sequence[Tensor]) -> None:
        if not self._waits:
            return
        self._waits = False
        with torch.no_grad():
            measure(params, [p0 - p for p0, p in zip(start, params, strict=True)], start)

    def _let_go(self) -> None:
        self._batch = self._given = None
        self._disarm()

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.remove()
            self._armed = None

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        sampled: _Sampled,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        start: Sequence[Tensor] | None = None,
    ) -> None:
        assert self._batch is not None
        changed = Snapshot(nn.Module(), self._batch[0])
        if self._given is not None:
            self._given.restore()
        snapshot = Snapshot(pl_module, self._batch[0], moved=params)
        try:
            evaluate = partial(self._evaluate, trainer, snapshot, sampled.optimizer)
            losses = relative_loss(evaluate, params, steps, self.multiples, start)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                error.add_note(_NO_GRADIENTS)
            raise
        finally:
            changed.restore()
        none = torch.zeros((), dtype=torch.bool, device=losses.device)
        moved = torch.stack([none, *(_local(u).any() for u in steps)]).any()
        skips = sampled.along == "gradient" and grad_scaler(trainer) is not None
        skipped = torch.stack([none, *(~_local(u).isfinite().all() for u in steps if skips)]).any()
        self._pending = (
            sampled,
            Reading(torch.cat([losses, torch.stack([moved, skipped]).to(losses)]), dist.ReduceOp.SUM),
        )

    def _evaluate(self, trainer: Trainer, snapshot: Snapshot, optimizer: int) -> Tensor:
        assert self._batch is not None
        module: Any = snapshot.module
        own = self.loss[optimizer] if isinstance(self.loss, list) else self.loss
        with isolated(snapshot, trainer):
            if own is not None:
                with trainer.precision_plugin.train_step_context():
                    return _one_value(own(module, self._batch[0]))
            loss = loss_of(training_step(trainer, module, *self._batch))
            return torch.full((), torch.nan, device=module.device) if loss is None else _one_value(loss)


def _checked_losses(loss: Any) -> LossFunction | list[LossFunction] | None:
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


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _name(multiple: float) -> str:
    """A multiple as it stands in a log key: shortest that tells it from all others."""
    return f"{multiple:g}" if float(f"{multiple:g}") == multiple else repr(multiple)
