"""The front door for measurements: what one says of itself, and the order in which it is asked."""

from __future__ import annotations

import copy
import string
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from normzoo._errors import shown, unknown_name
from normzoo.callbacks._run.facts import NEEDS, Run, loss_factor
from normzoo.callbacks._run.gradients import (
    BackwardHooks,
    gradients_in_use,
    runs_step_hooks,
    trainable_parameters,
)
from normzoo.callbacks._run.isolation import Snapshot, isolated, loss_of
from normzoo.callbacks._run.lightning import LightningDriver
from normzoo.callbacks._run.modules import Listener, Site
from normzoo.callbacks._run.ranks import REDUCTIONS, NamedReading
from normzoo.callbacks._run.record import Record, checked_dirpath, checked_label
from normzoo.callbacks._run.steps import BatchesDue, OptimizerStep, OptimizerSteps
from normzoo.callbacks.schedule import Schedule, as_schedule
from normzoo.functional.log_histogram import from_pairs, tensorboard_histogram
from normzoo.records.schema import Column, Figure, Schema

__all__ = ["Column", "Figure", "Measurement", "Run", "Sample", "Step"]

UNITS = ("step", "batch", "micro-batch")
_Kind = TypeVar("_Kind", bound="Measurement")


class Step:
    """What is known of a step that is sampled, from its first micro-batch until it is measured.

    Attributes:
        run: the facts of the run.
        number: optimizer steps that had been made when it began.
        optimizer: whose step it is; None before it is known.
        index: of the optimizer among ``run.optimizers``.
        batch: the micro-batch; when gradients are accumulated the last; in a plain loop only if it is needed.
        batch_idx: its index.
        loss: the detached loss of the micro-batch, if the measurement needs it and there is one.
        parameters: what :meth:`Measurement.parameters` returned.
        passes: backward passes made, if the measurement needs ``"backward"``.
        seen: for each site what :meth:`Measurement.activation` returned, in the order of micro-batches; an empty list
            for one that was not called.
        memory: for the measurement, which may keep here what belongs to this step alone.
        may_be_clipped: whether gradients may change before they are applied; for :meth:`Measurement.measure_applied`.
        wants_update: set by :meth:`Measurement.measure` to have :meth:`Measurement.measure_update` called.
    """

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.optimizer: Any = None
        self.index = 0
        self.batch: Any = None
        self.batch_idx = 0
        self.loss: Tensor | None = None
        self.parameters: dict[Any, Tensor] = {}
        self.passes = 0
        self.seen: dict[Site, list[Any]] = {}
        self.memory: dict[str, Any] = {}
        self.wants_update = self.may_be_clipped = False
        self.before: dict[Any, Tensor] = {}
        self._given: Snapshot | None = None

    def gradients(self) -> dict[Any, Tensor]:
        """The gradients of :attr:`parameters` that the optimizer is about to use: reduced, unscaled, not clipped."""
        return gradients_in_use(self.run, self.optimizer, self.parameters.items())

    def update(self) -> dict[Any, Tensor]:
        """What the step has added to each of :attr:`parameters`; for :meth:`Measurement.measure_update`."""
        return {name: self.parameters[name].detach() - start for name, start in self.before.items()}

    @contextmanager
    def extra_passes(self, moved: Sequence[Tensor] = ()) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """For passes over :attr:`batch`, as it was before ``training_step``, which leave no trace in the run.

        Args:
            moved: parameters whose values the caller changes, and puts back.

        Returns:
            a function that makes a context for one pass; what it changed of the module, the batch and the random
            streams is undone when it ends.
        """
        changed = Snapshot(nn.Module(), self.batch)
        if self._given is not None:
            self._given.restore()
        snapshot = Snapshot(self.run.module, self.batch, moved=moved)
        try:
            yield partial(isolated, snapshot, self.run)
        finally:
            changed.restore()

    def training_loss(self) -> Any:
        """The loss that ``training_step`` returns for :attr:`batch`, within :meth:`extra_passes`."""
        return loss_of(self.run.training_step(self.batch, self.batch_idx))

    def keep_batch(self, batch: Any, batch_idx: int, copied: bool) -> None:
        """Take in a micro-batch, copied if an extra pass is to see it as it is before ``training_step`` changes it."""
        self.batch, self.batch_idx = batch, batch_idx
        self._given = Snapshot(nn.Module(), batch) if copied else None

    def drop_batch(self) -> None:
        """Let go of a micro-batch that has ended."""
        self.batch = self._given = self.loss = None

    def of(self, optimizer: Optimizer, index: int) -> Step:
        """The step of one optimizer, of which several may be made with this batch."""
        step = copy.copy(self)
        step.optimizer, step.index, step.memory, step.number = optimizer, index, {}, self.run.step
        return step


class Sample:
    """What :meth:`Measurement.rows` is told of a step that was measured.

    Attributes:
        step: optimizer steps that had been made when it was measured.
        optimizer: index of the optimizer whose step it was.
        about: what :meth:`Measurement.send` was given beside the values.
    """

    def __init__(self, step: Step, about: dict[str, Any]) -> None:
        self.step, self.optimizer, self.about = step.number, step.index, about


class Measurement(LightningDriver):
    """Base of all measurements, ours and anybody's: a Lightning callback, which :func:`normzoo.watch` takes as well.

    A subclass says what it is in class attributes, what it measures in :meth:`measure`, and what the record is to hold
    of that in :meth:`rows`. The rest is done here: hooks, sampling, isolation of extra passes, one reduction over
    ranks, reading a step late, the record, log keys, figures, refusals and resuming.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the measurement apart from others of its class: the record goes to a folder of this name in that
            one, and log keys begin with it.

    Attributes:
        name: of the record, and the first part of its log keys.
        row: what a row is.
        columns: what a row holds, beside the ``step``.
        figures: what is drawn of the record.
        key: the rest of the log key, in which ``{stat}`` is the statistic and other names in braces are columns.
        needs: what it needs of a step, of ``loss``, ``batch``, ``gradients``, ``applied`` (gradients after clipping),
            ``backward`` (gradients of single backward passes), ``update``, ``activations`` and ``extra_pass``; what is
            not asked for costs nothing.
        unit: what a sample is of: ``"step"``, a step of one optimizer; ``"batch"``, all micro-batches that one or more
            steps are made of; or ``"micro-batch"``.
        reduce: how the values of ranks are put together: ``"sum"``, ``"max"``, ``"min"``; ``"gather"``, in a new first
            dimension; or None, which leaves each rank its own.
        shards: whether gradients and parameters may be DTensors.
        by_default: whether :func:`normzoo.watch` measures it unless told otherwise.
        steps_again: whether it measures steps that are made again at an alarm.

    Raises:
        TypeError: for a subclass without a name or rows, and for a schedule that is none.
        ValueError: for an interval below 1, a label that names no folder, or a need that there is not. At setup if the
            run has not what is needed.

    Example:
        >>> class WeightNorm(Measurement):
        ...     name = "weight_norm"
        ...     row = "one sampled step and parameter"
        ...     columns = (
        ...         Column("layer", "text", "name of the parameter"),
        ...         Column("norm", "float", "its Euclidean norm", logged=True),
        ...     )
        ...     figures = (Figure("Norms of weights", "line", x="step", y="norm", lines=("layer",)),)
        ...     reduce = None  # all ranks hold the same
        ...
        ...     def measure(self, step):
        ...         return {name: p.norm() for name, p in step.parameters.items()}
        ...
        ...     def rows(self, sample, values):
        ...         return [{"layer": name, "norm": norm.item()} for name, norm in values.items()]
        >>> WeightNorm(every_n_steps=10).schema.columns[1].name
        'layer'
    """

    name: ClassVar[str] = ""
    row: ClassVar[str] = "one sampled step"
    columns: ClassVar[tuple[Column, ...]] = ()
    figures: ClassVar[tuple[Figure, ...]] = ()
    key: ClassVar[str] = ""
    earlier_key: ClassVar[str] = ""  # what log keys were in the version before, under which scalars are sent as well
    needs: frozenset[str] | set[str] = frozenset()
    unit: ClassVar[str] = "step"
    reduce: ClassVar[str | None] = "sum"
    shards: ClassVar[bool] = False
    by_default: ClassVar[bool] = False
    steps_again: ClassVar[bool] = True
    ends_the_run_by: Exception | None = None  # the error that an action has raised to end the run
    _owner: weakref.ref[Any] | None = None  # Trainer or run of which the state is
    schema: ClassVar[Schema]
    key_in_use: ClassVar[str]  # ``key``, or what it is by default
    _logged_columns: ClassVar[tuple[str, ...]]  # names of the columns that are logged
    _statistics: ClassVar[tuple[str, ...]]  # for each of them what log keys call it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            cls.schema = Schema(cls.name, cls.row, tuple(cls.columns), tuple(cls.figures))
            logged = [c for c in cls.schema.columns if c.statistic]
            cls._statistics, cls._logged_columns = tuple(c.statistic for c in logged), tuple(c.name for c in logged)
            names = {column.name for column in cls.schema.columns}
            cls.key_in_use = cls.key or ("{stat}/{layer}" if "layer" in names else "{stat}")
            for _, part, _, _ in string.Formatter().parse(cls.key_in_use):
                if part is not None and part not in {"stat", *names}:
                    raise ValueError(
                        f"key of {cls.__name__} must be made of {{stat}} and columns ({', '.join(sorted(names))}) in "
                        f"braces; it has {{{part}}}"
                    )

    def __init__(
        self, every_n_steps: int | Schedule = 50, *, dirpath: str | None = None, label: str | None = None
    ) -> None:
        kind = type(self)
        if not kind.name or kind.rows is Measurement.rows:
            raise TypeError(f"{kind.__name__} must have a name, and define rows(sample, values)")
        if isinstance(self.needs, str):
            raise TypeError(f"needs of {kind.__name__} must be a set of names, such as {{'loss'}}, not {self.needs!r}")
        for need in self.needs:
            if need not in NEEDS:
                raise ValueError(unknown_name("need of a measurement", need, NEEDS))
        if "extra_pass" in self.needs:
            self.needs = {*self.needs, "batch"}
        if kind.unit not in UNITS:
            raise ValueError(unknown_name("unit of a measurement", kind.unit, UNITS))
        if kind.unit != "step" and (of_a_step := sorted({"gradients", "applied", "update"} & {*self.needs})):
            raise ValueError(
                f"{kind.__name__} needs {NEEDS[of_a_step[0]]}, and its unit is {kind.unit!r}, which belongs to no "
                "optimizer; leave out the unit, or the need"
            )
        for method, need in (("sites", "activations"), ("activation", "activations"), ("measure_applied", "applied")):
            defined, needed = getattr(kind, method) is not getattr(Measurement, method), need in self.needs
            if defined and not needed and need not in kind.needs:
                raise TypeError(f"{kind.__name__} defines {method}, and {need!r} is not among its needs; add it there")
            if needed and not defined:
                raise TypeError(f"{kind.__name__} needs {need!r}, and does not define {method}; define it")
        if kind.reduce is not None and kind.reduce not in REDUCTIONS:
            raise ValueError(unknown_name("way to reduce over ranks", kind.reduce, REDUCTIONS))
        self.schedule = as_schedule(every_n_steps)
        self.dirpath, self.label = checked_dirpath(dirpath), checked_label(label)
        self._due = BatchesDue(self.schedule)
        self._column_names = {column.name for column in self.schema.columns}
        self._unchecked = False  # whether the run had not all its layers when it was checked
        self._steps = OptimizerSteps()
        self._step: Step | None = None
        self._listener: Listener | None = None
        self._heard: dict[Site, Any] = {}  # in this micro-batch
        self._backward: BackwardHooks | None = None
        self._post_hook: Any = None
        self._applying: Step | None = None  # whose gradients have been measured, and not yet those that are applied
        self._announced: dict[Optimizer, tuple[Step | None, list[Any]]] = {}  # measured before a plain loop clips
        self._applied_hooks: list[Any] = []
        self._pending: list[tuple[Sample, Any]] = []
        self._record: Record | None = None

    # What a measurement may define

    def check(self, run: Run) -> None:
        """Refuse, with a ValueError of one sentence, a run of which the figures would be wrong; at setup."""

    def start(self, run: Run) -> None:
        """Training starts, or goes on; the module is complete, and nothing has been written yet."""

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """The parameters that are followed, by name; by default all trainable ones of the optimizer."""
        return dict(trainable_parameters(run, optimizer))

    def sites(self, run: Run) -> dict[Site, nn.Module]:
        """The modules to listen to, by (name, ``"input"`` or ``"output"``), if ``"activations"`` are needed."""
        return {}

    def samples(self, run: Run, index: int, made: int) -> bool:
        """Whether to sample a step of the optimizer of this index, which has made so many steps."""
        return self.schedule(made)

    def activation(self, step: Step, site: Site, module: nn.Module, x: Any) -> Any:
        """What to keep in :attr:`Step.seen` of the first tensor that a module is given, or of what it returns.

        Called in the first call of the module for each micro-batch; of an extra pass if the module is compiled.
        """
        raise NotImplementedError

    def before_batch(self, step: Step) -> None:
        """A micro-batch of a sampled step is about to be trained on."""

    def gradient(self, step: Step, name: Any, g: Tensor) -> None:
        """A backward pass brings this gradient of a parameter on this rank, if ``"backward"`` is needed."""

    def after_backward(self, step: Step) -> None:
        """A backward pass of a sampled step has ended."""

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        """Measure, before the optimizer makes its step; at the end of the batch for other units than ``"step"``.

        Returns:
            small tensors of the same names, shapes and dtypes on all ranks, on the device, without waiting for them; or
            None, on all ranks, for no sample. A rank that has nothing returns zeros of these shapes.
        """

    def measure_applied(self, step: Step) -> Mapping[str, Tensor] | None:
        """Measure once gradients are clipped, which :meth:`Step.gradients` tells; called if ``"applied"`` is needed.

        Not called for a step that a GradScaler skips, unless a fused optimizer skips it inside of its step.
        """

    def measure_update(self, step: Step) -> Mapping[str, Tensor] | None:
        """Measure after the step, which :meth:`Step.update` tells; called if ``"update"`` is needed."""

    def rows(self, sample: Sample, values: Any) -> Sequence[dict[str, Any]]:
        """The rows of the record, of the values on the host, put together over ranks; each a dict of all columns.

        Called a step later, on all ranks. ``step`` is filled in.
        """
        raise NotImplementedError

    def scalars(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What is logged of a row, by the part of the key after the record's name."""
        return {key + self.suffix(row): value for key, value in self._logged(row, self.key_in_use).items()}

    def suffix(self, row: Mapping[str, Any]) -> str:
        """What the log keys of a row end in, if other rows of the step would have the same."""
        return ""

    def act(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do what the rows of a sample ask for; called on all ranks alike."""

    def reschedule(self, schedule: Schedule) -> None:
        """Sample by another schedule from now on; a measurement with several schedules takes it for all of them."""
        self.schedule, self._due = schedule, BatchesDue(schedule)

    def told(self, run: Run, measurement: Measurement, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> None:
        """Another measurement of the run has made the rows of a sample; called on all ranks."""

    # What it may use

    def send(self, step: Step, values: Mapping[str, Tensor] | Any, **about: Any) -> None:
        """Send values on their way to :meth:`rows`, with what it is to know beside them.

        For those measurements to which the values that :meth:`measure` returns are not enough.

        Args:
            step: that was measured.
            values: tensors by name; or anything whose ``read()`` returns them on the host.
            **about: host values, for ``sample.about``.

        Raises:
            TypeError: for values that are neither.
        """
        tensors = isinstance(values, Mapping) and all(isinstance(v, Tensor) for v in values.values())
        if not tensors and not hasattr(values, "read"):
            raise TypeError(
                f"{type(self).__name__} must measure tensors by name, such as {{'norm': tensor}}, or None for no "
                f"sample, not {shown(values)}"
            )
        reading = values if hasattr(values, "read") else NamedReading(values, self.reduce)
        self._pending.append((Sample(step, about), reading))

    @property
    def folder(self) -> Path | None:
        """Where the record of the last fit is; None before one, and under ``fast_dev_run``."""
        return self._record.folder if self._record is not None else None

    @property
    def writes(self) -> bool:
        """Whether this process writes the record."""
        return self._record is not None and self._record.writes

    # What the drivers call, in this order

    def adopt(self, owner: object, goes_on: bool) -> None:
        """Keep the state if it is of the run of this owner that goes on, or was loaded for it; else forget it."""
        same = goes_on and self._owner is not None and self._owner() is owner
        if not (self._given_state or same):
            self.forget()
        self._given_state, self._owner = False, weakref.ref(owner)

    def admit(self, run: Run) -> None:
        """Refuse a run that cannot be measured."""
        name = type(self).__name__
        layouts = {"whole", "sharded"} if self.shards else {"whole"}
        if run.layout not in layouts:
            supported = "one device, DDP and ModelParallelStrategy" if self.shards else "one device and DDP"
            raise ValueError(
                f"{name} supports {supported}; under {run.strategy} a rank does not hold whole parameters and "
                "gradients, and its figures could be wrong"
            )
        if missing := sorted(set(self.needs) - run.tells):
            raise ValueError(f"{name} needs {NEEDS[missing[0]]}; {run.untold(missing[0])}")
        if run.complete and "activations" in self.needs:
            self._listener = Listener(run, self.sites(run), name)
        self.check(run)
        self._unchecked = not run.complete

    def prepare(self, run: Run) -> None:
        """A run is set up: refuse what cannot be measured, and what would write the same record."""
        self.admit(run)
        self._record = Record(run, self.schema, self.dirpath, self.label, self._prefix(run))

    def check_optimizers(self, run: Run) -> None:
        """A fit starts: refuse one without an optimizer, if its steps are what is measured."""
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        if self.unit == "step" and not any(group["params"] for group in groups):
            name = type(self).__name__
            raise ValueError(
                f"{name} measures the steps of an optimizer, and configure_optimizers returned none that has "
                f"parameters; return an optimizer from it, or leave {name} out"
            )

    def check_complete(self, run: Run) -> None:
        """The module has all its layers now: refuse what could not be seen when the run was set up."""
        if "activations" in self.needs:
            self._listener = Listener(run, self.sites(run), type(self).__name__)
        if self._unchecked:
            self.check(run)

    def begin(self, run: Run) -> None:
        """Training starts, or goes on: open a segment of the record, in the place of earlier ones from here on."""
        assert self._record is not None
        self._pending = []  # left by a run that was cut short
        self.check_complete(run)
        self.start(run)
        self._record.locate(run)
        places = [m.folder.resolve() for m in self._alike(run) if m.folder is not None]
        if self.folder is not None and places.count(self.folder.resolve()) > 1:
            raise self._same_record(str(self.folder))
        self._events._open(run.step)
        if self.unit == "step":
            self._steps.start(run)
        self._due.start(run)
        self._step = None

    def batch_begins(self, run: Run, batch: Any, batch_idx: int) -> None:
        """A micro-batch is about to be trained on."""
        self._let_go()  # of one that was skipped
        if "applied" in self.needs and run.changes_steps and (run.shares_batches or self.is_due(run, 0)):
            self._applied_hooks = run.before_update(self._events.applies)
        self.hold_batch(run, batch, batch_idx)
        self.listen(run, batch, batch_idx)

    def hold_batch(self, run: Run, batch: Any, batch_idx: int) -> None:
        """Keep a micro-batch for the step, if it is needed and the step is to be sampled."""
        step = self._sampled_step(run)
        if step is not None:
            step.keep_batch(batch, batch_idx, copied="extra_pass" in self.needs)
            self.before_batch(step)

    def batch_told(self, run: Run, batch: Any) -> None:
        """A plain loop tells the micro-batch that it trains on; it has to if that is needed."""
        if "batch" in self.needs:
            self.hold_batch(run, batch, run.step)

    def hold_loss(self, run: Run, loss: Tensor) -> None:
        """Keep the detached loss of the micro-batch for the step, if it is needed and the step is to be sampled."""
        step = self._sampled_step(run) if "loss" in self.needs else None
        if step is not None:
            step.loss = loss

    def listen(self, run: Run, batch: Any, batch_idx: int) -> None:
        """Listen to what modules are given and return in this micro-batch, if it is needed."""
        step = self._sampled_step(run) if self._listener is not None else None
        if step is not None and self._listener is not None:
            self._keep_heard(step)  # of the micro-batch before, in a loop that does not tell when one ends
            self._listener.listen(run, batch, batch_idx, partial(self._events._hear, step))

    def backward_begins(self, run: Run, loss: Tensor) -> None:
        """A backward pass of a loss begins, which is divided and scaled as the run asks for."""
        if "loss" in self.needs and self.unit != "micro-batch" and (step := self._sampled_step(run)) is not None:
            step.loss = loss.detach() / loss_factor(run, loss.detach())
        if self._step is not None and "backward" in self.needs:
            params = self.parameters(run, run.optimizers[0])
            self._backward = BackwardHooks(params.items(), partial(self._events.gradient, self._step))

    def backward_ended(self, run: Run) -> None:
        """A backward pass has ended."""
        self._remove_backward_hooks()
        if self._step is not None:
            self._step.passes += 1
            self.after_backward(self._step)

    def step_begins(self, run: Run, optimizer: Optimizer) -> None:
        """An optimizer is about to make a step: measure, if due, without waiting for the result."""
        made = self._steps.begin(run, optimizer) if self.unit == "step" else None
        if made is None:
            return
        self._remove_post_hook()  # of an earlier step in this batch
        self.flush(run)
        announced = optimizer in self._announced
        if announced:
            step, samples = self._announced.pop(optimizer)
            for sample, _ in samples:
                sample.step = run.step  # other optimizers may have made steps since
            self._pending += samples
        else:
            step = self._measured(run, optimizer, made)
        if step is None:
            return
        step.number = run.step
        if step.wants_update or "update" in self.needs:
            self._follow(step)
        if "applied" in self.needs:
            step.may_be_clipped = announced or run.changes_steps
            self._applying = step
            if not step.may_be_clipped:  # the optimizer may run no hooks, or step where there are none
                self.applies(optimizer)

    def gradients_complete(self, run: Run, optimizer: Optimizer) -> None:
        """A plain loop is about to clip the gradients of the step that an optimizer makes next: measure, if due.

        The rows are written once the step is made. If it is not, as when a GradScaler skips it, or if this is called
        once more before it, there are none.
        """
        index = next(i for i, other in enumerate(run.optimizers) if other is optimizer)
        count = len(self._pending)
        step = self._measured(run, optimizer, self._steps.next(run, index))
        self._announced[optimizer] = step, self._pending[count:]
        del self._pending[count:]

    def applies(self, optimizer: Optimizer) -> None:
        """An optimizer is about to apply its gradients, as they are now."""
        step = self._applying
        if step is not None and step.optimizer is optimizer:
            self._applying = None
            with torch.no_grad():
                self._take(step, self.measure_applied(step))

    def loss_is_missing(self, run: Run) -> None:
        """``training_step`` returned no loss: refuse that if it is needed, and the run cannot tell it otherwise."""
        if self.unit == "micro-batch" and "loss" in self.needs and not run.automatic:
            raise ValueError(
                f"{type(self).__name__} reads the loss that training_step returns; under manual optimization return "
                "{'loss': loss} from it"
            )

    def batch_ended(self, run: Run, loss: Tensor | None = None, divided: int = 1) -> None:
        """A micro-batch has been trained on, and the steps have been made to which it was the last.

        Args:
            run: that goes on.
            loss: of the micro-batch, if there is one.
            divided: what it was divided by.
        """
        if self._listener is not None:
            self._listener.close()
        if self.unit != "step":
            self.flush(run)
        step = self._step
        if step is not None:
            self._keep_heard(step)
            if loss is not None and "loss" in self.needs:
                step.loss = (loss.detach() if loss.requires_grad else loss) * divided
            ended = self.unit == "micro-batch" or (self.unit == "batch" and run.step != step.number)
            if ended:
                self._take(step, self.measure(step))
            step.drop_batch()
            if ended or (run.shares_batches and self.unit == "step"):
                self._step = None
        self._heard = {}
        self._remove_applied_hooks()
        self._steps.end_batch()
        self._remove_post_hook()

    def epoch_ended(self, run: Run) -> None:
        """An epoch has ended, perhaps by a batch that was skipped."""
        self._let_go()

    def end(self, run: Run) -> None:
        """Training has ended: write what was measured last."""
        self.flush(run)
        self._let_go()
        self._step = None

    def interrupted(self, run: Run, error: BaseException) -> None:
        """Training was cut short: write what was measured last, if no other rank has to take part in that."""
        self.abandon()
        if run.ranks == 1:
            with suppress(Exception):  # the error that ended training is the one to see
                self.flush(run)

    def abandon(self) -> None:
        """Training was cut short: remove all hooks."""
        self._let_go()
        self._step = None

    def flush(self, run: Run) -> None:
        """Read and write what was measured last, if it has not been."""
        pending, self._pending = self._pending, []
        for sample, reading in pending:
            self._hand_out(run, sample, self.rows(sample, reading.read()))

    def flush_alone(self, run: Run) -> None:
        """As :meth:`flush`, for a state that is to be saved, of which one rank of several may ask alone."""
        self.flush(run)

    def is_due(self, run: Run, index: int) -> bool:
        """Whether the next step of the optimizer of this index is sampled."""
        return self.samples(run, index, self._steps.next(run, index).made if self.unit == "step" else run.step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: by default the steps that each optimizer has made, if there are several."""
        return self._steps.state_dict()

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._steps.load_state_dict(state_dict)

    def forget(self) -> None:
        """Drop all that :meth:`state_dict` saves, for another run."""
        self._steps = OptimizerSteps()

    def _hand_out(self, run: Run, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a sample, tell the other measurements, and act."""
        if rows:
            rows = [{"step": sample.step, **row} for row in rows]
            self._check_columns(rows)
            self._events._write(sample, rows)
            for other in run.measurements:
                if other is not self:
                    other._events.told(run, self, sample, rows)
        self.act(run, rows)

    def _check_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if row.keys() != self._column_names:
                missing, unknown = self._column_names - row.keys(), row.keys() - self._column_names
                wrong = [
                    f"{what} {', '.join(map(repr, sorted(names)))}"
                    for what, names in (("has no", missing), ("has undeclared", unknown))
                    if names
                ]
                raise ValueError(
                    f"a row of {type(self).__name__} {' and '.join(wrong)}; its columns are "
                    f"{', '.join(c.name for c in self.columns)}, with None for what is undefined"
                )

    def _measured(self, run: Run, optimizer: Optimizer, made: OptimizerStep) -> Step | None:
        """Measure the gradients of a step; None unless it is sampled."""
        if not self.samples(run, made.optimizer, made.made) or (self._step is None and "batch" in self.needs):
            return None
        if self._step is not None:
            self._keep_heard(self._step)
        step = (self._step or self._new_step(run)).of(optimizer, made.optimizer)
        if not run.shares_batches:
            step.memory = self._step.memory if self._step is not None else {}
            self._step = None
        step.parameters = self.parameters(run, optimizer)
        self._take(step, self.measure(step))
        return step

    def _new_step(self, run: Run) -> Step:
        step = Step(run, run.step)
        step.seen = {site: [] for site in self._listener.sites} if self._listener is not None else {}
        return step

    def _sampled_step(self, run: Run) -> Step | None:
        """The step that the micro-batch belongs to, if it is sampled, or may be."""
        if self.unit == "step" and run.shares_batches:
            self._step = self._step or self._new_step(run)  # whose steps it brings is not known yet
        elif not self._samples_batch(run):
            self._step = None
        elif self._step is None or self._step.number != run.step:
            self._step = self._new_step(run)
        return self._step

    def _samples_batch(self, run: Run) -> bool:
        """Whether to sample the micro-batch that begins, or that has begun."""
        return self._due(run) if self.unit == "batch" else self.schedule(run.step)

    def _keep_heard(self, step: Step) -> None:
        for site, value in self._heard.items():
            step.seen[site].append(value)
        self._heard = {}

    def _hear(self, step: Step, site: Site, module: nn.Module, x: Any) -> None:
        with torch.no_grad():
            self._heard[site] = self.activation(step, site, module, x)

    def _follow(self, step: Step) -> None:
        """Measure once the step has been made, unless it is skipped, or the optimizer runs no hooks."""
        if not runs_step_hooks(step.optimizer):
            return
        step.before = {name: p.detach().clone() for name, p in step.parameters.items() if p.numel()}

        # The hook stays until the batch ends: taken away from within, it would disturb those that come after it
        self._post_hook = step.optimizer.register_step_post_hook(partial(self._events._updated, step))

    def _updated(self, step: Step, *_: Any) -> None:
        """The optimizer has made a step that is measured by what it changes."""
        if step.before:
            with torch.no_grad():
                self._take(step, self.measure_update(step))
            step.before = {}

    def _take(self, step: Step, values: Mapping[str, Tensor] | None) -> None:
        if values:
            self.send(step, values)

    def _open(self, step: int) -> None:
        """Open a segment of the record; no other rank waits for this one while it does."""
        assert self._record is not None
        self._record.start(step)

    def _write(self, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._record is None:
            return
        self._record.append(rows)
        if self._record.loggers:
            scalars = {f"{self.name}/{key}": value for row in rows for key, value in self.scalars(row).items()}
            if self.earlier_key and self._record.writes:
                for row in rows:
                    scalars |= self._logged(row, self.earlier_key)
                warn_of_earlier_keys()
            self._record.log(scalars, sample.step)
        for column in (c for c in self.schema.columns if c.kind == "histogram"):
            self._record.log_histograms(partial(self._tensorboard_histograms, column.name, rows), sample.step)
        for figure in (f for f in self.figures if f.samples):
            tag = f"{self.name}/{figure.title.lower().replace(' ', '_')}{self.suffix(rows[0])}"
            self._record.log_figure(tag, partial(_drawn, figure, rows), sample.step)

    def _logged(self, row: Mapping[str, Any], template: str) -> dict[str, float]:
        """The values of a row whose columns are logged, by keys of this template."""
        keys = self._keys_of(row, template, self._statistics)
        return {key: value for key, c in zip(keys, self._logged_columns, strict=True) if (value := row[c]) is not None}

    @staticmethod
    def _keys_of(row: Mapping[str, Any], template: str, statistics: tuple[str, ...]) -> tuple[str, ...]:
        """The log key of a row for each of these statistics."""
        return _keys(template, statistics, *map(row.__getitem__, _fields(template)))

    def _tensorboard_histograms(self, column: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        bits = rows[0]["mantissa_bits"]
        dense = from_pairs([row[column] for row in rows], bits)
        return {
            f"{self.name}/{self._keys_of(row, self.key_in_use, (column,))[0]}": tensorboard_histogram(counts, bits)
            for row, counts in zip(rows, dense, strict=True)
        }

    def _let_go(self) -> None:
        """Remove all hooks, and let go of a micro-batch that was not trained on."""
        if self._listener is not None:
            self._listener.close()
        self._heard = {}
        self._remove_backward_hooks()
        self._remove_applied_hooks()
        self._remove_post_hook()
        self._announced = {}

    def _remove_backward_hooks(self) -> None:
        if self._backward is not None:
            self._backward.remove()
            self._backward = None

    def _remove_applied_hooks(self) -> None:
        for handle in self._applied_hooks:
            handle.remove()
        self._applied_hooks, self._applying = [], None

    def _remove_post_hook(self) -> None:
        if self._post_hook is not None:
            self._post_hook.remove()
            self._post_hook = None

    def _others(self, run: Run, kind: type[_Kind]) -> list[_Kind]:
        """The measurements of a class that this one may rely on.

        One that the script made relies on none that an environment variable asked for, so that it measures the same
        whether the variable is set or not.
        """
        found = (m for m in run.measurements if isinstance(m, kind))
        return [m for m in found if self.asked_by or not m.asked_by]

    def _alike(self, run: Run) -> list[Measurement]:
        """The measurements of the run that write a record of this name."""
        found = [m for m in run.measurements if m.name == self.name]
        return found if self in found else [*found, self]  # another callback may hand its hooks on to this one

    def _prefix(self, run: Run) -> str:
        """What the log keys begin with: the label; else nothing, or for all but one measurement the folder's name.

        Raises:
            ValueError: if another measurement would write the same record, or log under the same keys.
        """
        alike = self._alike(run)
        places = [(m.label, m.dirpath and Path(m.dirpath).resolve()) for m in alike]
        if places.count((self.label, self.dirpath and Path(self.dirpath).resolve())) > 1:
            raise self._same_record(str(self.dirpath or "the folder of the run"))
        unnamed = sorted((m for m in alike if m.label is None), key=lambda m: bool(m.dirpath))
        prefixes = [m.label or ("" if m is unnamed[0] else Path(m.dirpath or "").resolve().name) for m in alike]
        own = prefixes[alike.index(self)]
        if run.loggers and prefixes.count(own) > 1:
            raise ValueError(
                f"two {type(self).__name__} would log under the same keys; give one of them a label, which its keys "
                "then begin with"
            )
        return own

    def _same_record(self, folder: str) -> ValueError:
        return ValueError(
            f"two {type(self).__name__} would write the same record in {folder}, the one hiding the other; give one of "
            "them a label or a dirpath"
        )


@cache
def warn_of_earlier_keys() -> None:
    """Warn that log keys have changed: once in a process, unless the cache is cleared."""
    rank_zero_warn(
        "log keys begin with the name of the measurement from this version on, as gradient_tails/gradient/max/LAYER "
        "does; earlier ones, such as gradient/max/LAYER, are logged as well until the next version: read the new ones, "
        "which docs/log-keys.md lists beside the earlier"
    )


@cache
def _fields(template: str) -> tuple[str, ...]:
    """The columns that a template for log keys takes values from."""
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field and field != "stat")


@lru_cache(maxsize=2**14, typed=True)
def _keys(template: str, statistics: tuple[str, ...], *values: Any) -> tuple[str, ...]:
    """A log key for each statistic, without the parts that are empty, of rows whose fields have these values."""
    named = dict(zip(_fields(template), values, strict=True))
    keys = (template.format(stat=statistic, **named) for statistic in statistics)
    return tuple("/".join(filter(None, key.split("/"))) for key in keys)


def _drawn(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> Any:
    from normzoo.report.drawing import draw_figure
    from normzoo.report.export import pixels

    chart = draw_figure(figure, {"": pd.DataFrame(rows)})
    return None if chart is None else pixels(chart)
