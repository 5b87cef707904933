"""The run of a capsule, set up again in a Trainer of its own, to try things on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import plain_name, rank_and_ranks
from normzoo.callbacks._run.frames import beside_the_module, hooks_of_optimizers, leaves_with_gradients, module_tensors
from normzoo.callbacks._run.gradients import gradients, local_values
from normzoo.callbacks._run.isolation import HostCopies, Snapshot, isolated, loss_of
from normzoo.callbacks._run.lightning import LightningRun
from normzoo.callbacks._run.lightning_steps import set_place
from normzoo.callbacks._run.modules import overrides
from normzoo.callbacks._run.ranks import is_sharded
from normzoo.callbacks._run.streams import set_random_streams
from normzoo.capsules import Capsule
from normzoo.replaying.restoring import fit_of_optimizers, load_module, load_optimizers, load_scaler
from normzoo.replaying.steps import RecordedStep, ReplayError, on_device, recorded_steps, why_no_batches
from normzoo.replaying.widening import widened

State = Snapshot
PLACE = ("batch_idx", "epoch", "is_last", "accumulation")  # where in the loop a micro-batch stood


class Stage:
    """The run of a capsule in this process, which is one of as many ranks as the capsule's or stands for several.

    A stage lives inside of the fit of a Trainer. All ranks call the same methods in the same order; what methods return
    is the same on all ranks, unless they say otherwise.

    Args:
        capsule: to replay.
        trainer: in whose fit, before its first batch.
        module: that it trains, of the same class as in the capsule's run.
        batches: makes a batch from the ids of its samples, for a capsule that holds these in its place.

    Attributes:
        steps: those that can be made again, in order; the first one has a snapshot.
        alarm: the step of the alarm, the error or the signal.
        snapshots: those of the steps that have a snapshot.
        recorded_ranks: how many ranks the capsule's run had.
        notes: sentences on what this replay cannot do or compare.
        passes: how many micro-batches went through a ``"forward"`` or a ``"backward"`` pass, and how many through
            ``"steps"``, which have both.
        last_losses: of the last step that was made, for each micro-batch the losses of all ranks.
        last_norm: the norm of the gradient of the first optimizer in that step, unscaled and not clipped.

    Raises:
        ReplayError: if the capsule has no snapshot or no batches, or module or optimizers do not fit it.
    """

    def __init__(
        self,
        capsule: Capsule,
        trainer: Trainer,
        module: LightningModule,
        batches: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.capsule, self.trainer, self.module = capsule, trainer, module
        self.run = LightningRun(trainer, module)
        self.rank, self.ranks = rank_and_ranks()
        self.recorded_ranks = int(capsule.about["ranks"])
        self.alarm = int(capsule.about["step"])
        self.notes: list[str] = []
        self.passes: Counter[str] = Counter({"steps": 0, "forward": 0, "backward": 0})
        self.last_losses: list[list[float]] = []
        self.last_norm = math.nan
        self._kept: dict[int, State] = {}
        self._recorded: set[int] = set()
        self._at: int | None = None  # the step that the present state comes before; None if it is of no step
        self._own_ranks = [self.rank] if self.ranks == self.recorded_ranks else capsule.ranks
        if self.ranks not in (1, self.recorded_ranks):
            raise ReplayError(
                f"the capsule is of {self.recorded_ranks} ranks, and this job has {self.ranks}; replay it in as many "
                "processes, or in one"
            )
        frames = recorded_steps(capsule, self._own_ranks, batches)
        snapshots = [snapshot["step"] for snapshot in capsule.tree(self._own_ranks[0])["snapshots"]]
        self._frames = {frame.step: frame for frame in _usable(frames, snapshots, self.alarm)}
        if not self._frames:
            raise ReplayError(_why_none(capsule, frames, snapshots))
        self.steps = list(self._frames)
        self.snapshots = [step for step in snapshots if step in self._frames]
        last = self.frame(self.steps[-1])
        if not last.complete and capsule.about["kind"] == "divergence":
            self.notes.append(
                f"The capsule was written before step {last.step} had all of its micro-batches; its update is made of "
                f"the {len(last.losses)} that are there."
            )

    @contextmanager
    def set_up(self) -> Iterator[Stage]:
        """In which the state is that of the capsule; after which all is as it was before."""
        run = self.run
        before = self._snapshot()
        with ExitStack() as stack:
            stack.callback(self._drop_gradients)
            stack.enter_context(isolated(before, run))
            # No measurement has a part in these steps
            self._train_on = stack.enter_context(run.steps_again({}, [], self.steps[0]))
            for step in self.snapshots:
                self._load(step)
                self._kept[step] = self.state()
                self._recorded.add(step)
            self.go_to(self.steps[0])
            yield self

    def frame(self, step: int) -> RecordedStep:
        """What the capsule has of a step."""
        return self._frames[step]

    # The state

    def state(self) -> State:
        """All that a step may move, as it is now, in host memory."""
        return self._snapshot()

    def put(self, state: State, step: int | None = None) -> None:
        """Put a state back; ``step`` is the one that it comes before, if it is of the run."""
        state.restore()
        self._drop_gradients()
        self._at = step

    def keep(self, step: int | None = None) -> None:
        """Keep the present state, which is that before a step, so that :meth:`go_to` need not make it again."""
        step = self._at if step is None else step
        if step is not None and step not in self._kept:
            self._kept[step] = self.state()

    def go_to(self, step: int) -> None:
        """The state before a step: a kept one, or the nearest earlier one and the steps from there on."""
        if self._at == step:
            return
        nearest = max(kept for kept in self._kept if kept <= step)
        if self._at is None or not nearest < self._at <= step:
            self.put(self._kept[nearest], nearest)
        while self._at != step:
            assert self._at is not None
            self.train(self._at)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are: of a sharded module this rank's parts are their local values."""
        return {name: t.detach() for name, t in module_tensors(self.run).items()}

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters by name, with the layout of each."""
        named = dict(self.run.module.named_parameters())
        return {name: p.detach().clone() for name, p in self.tensors().items() if name in _plain(named)}

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write values into some of the parameters; the state is then of no step."""
        own = self.tensors()
        for name, value in values.items():
            local_values(own[name]).copy_(local_values(value))
        self._at = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Whatever happens inside, the state is put back."""
        state, at = self.state(), self._at
        try:
            yield
        finally:
            self.put(state, at)

    # Steps

    def train(self, step: int, *, rate: float = 1.0, clip: float | None = None, batch_of: int | None = None) -> float:
        """Make one optimizer step, by the Trainer's own loop, from the present state.

        Args:
            step: whose hyperparameters, batches and random streams are used.
            rate: what the learning rates of all groups are multiplied by.
            clip: the norm at which the gradient is clipped, in the place of the run's own clipping.
            batch_of: the step whose batches are used in the place of its own.

        Returns:
            the loss before the update, the mean over micro-batches and ranks.

        Raises:
            ReplayError: for ``clip`` under manual optimization, where ``training_step`` clips by itself.
        """
        if clip is not None and not self.run.automatic:
            raise ReplayError("gradients are clipped by training_step itself under manual optimization")
        frame, source = self.frame(step), self.frame(step if batch_of is None else batch_of)
        went_on = self._at == step and rate == 1 and clip is None and batch_of in (None, step)
        self._set_hyperparameters(frame, rate)
        losses = []
        with self._clipped(clip), torch.enable_grad():
            for place, micro in enumerate(source.micro_batches):
                set_random_streams(frame.micro_batches[place % len(frame.micro_batches)]["random"], self.run.device)
                batch = on_device(micro["batch"], self.run.device)
                loss = self._train_on(step, self._place(source, place), batch)
                losses.append(math.nan if loss is None else float(loss))
        self.passes["steps"] += len(source.micro_batches)
        self._at = self._after(step) if went_on else None
        self.last_losses = self._of_all_ranks(losses)
        return _mean(self.last_losses)

    def gradients_arrive(self, optimizer: Optimizer) -> None:
        """An optimizer is about to clip and apply its gradients; what the private callback of :func:`replay` calls."""
        if optimizer is self.run.optimizers[0] or getattr(optimizer, "optimizer", None) is self.run.optimizers[0]:
            own = gradients((id(p), p) for group in optimizer.param_groups for p in group["params"])
            total = sum((_square(g) for g in own.values()), torch.zeros((), dtype=torch.float64))
            sharded = any(is_sharded(g) for g in own.values())
            self.last_norm = math.sqrt(float(self._sum(total) if sharded else total))

    # Passes, after which nothing has moved

    def loss(self, step: int) -> float:
        """The loss of the batches of a step at the present weights, the mean over micro-batches and ranks."""
        return _mean(self.losses(step))

    def losses(self, step: int) -> list[list[float]]:
        """The losses of the batches of a step at the present weights: for each micro-batch those of all ranks.

        Under manual optimization the optimizers make no steps meanwhile, so that a loss which ``training_step`` makes
        after a step of its own is another one than in the run.
        """
        frame = self.frame(step)
        batches = [micro["batch"] for micro in frame.micro_batches]
        return self._of_all_ranks([float(self.loss_of_batch(b, step, i)) for i, b in enumerate(batches)])

    def loss_of_batch(self, batch: Any, step: int, micro: int = 0) -> Tensor:
        """The loss of any batch at the present weights, of this rank alone: (), on the device.

        Args:
            batch: of the same structure as those of the run.
            step: in whose random streams it is evaluated.
            micro: the micro-batch of that step.
        """
        self.passes["forward"] += 1
        state, device = self._light(), self.run.device
        at = self.frame(step).micro_batches[micro]
        # Under manual optimization training_step has a backward pass and steps of its own
        gradient = torch.no_grad() if self.run.automatic else torch.enable_grad()
        with isolated(state, self.run), gradient, self._for_passes():
            loss = self._pass(batch, step, at)
            value = loss.detach().clone() if isinstance(loss, Tensor) else torch.tensor(math.nan, device=device)
        self._drop_gradients()
        return value

    def gradient_of_batch(self, batch: Any, step: int, micro: int = 0) -> dict[str, Tensor]:
        """The gradient of the loss of any batch at the present weights, of this rank alone, by parameters' names.

        Args:
            batch: of the same structure as those of the run.
            step: in whose random streams it is evaluated.
            micro: the micro-batch of that step.

        Raises:
            ReplayError: under manual optimization, and for sharded parameters, whose gradients all ranks make together.
        """
        if not self.run.automatic or self.run.layout == "sharded":
            raise ReplayError("gradients of single batches are taken of whole parameters under automatic optimization")
        self.passes["backward"] += 1
        at, named = self.frame(step).micro_batches[micro], dict(self.run.module.named_parameters())
        named = {name: p for name, p in named.items() if p.requires_grad}
        with isolated(self._light(), self.run), torch.enable_grad():
            loss = self._pass(batch, step, at)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {plain_name(name): g for name, g in zip(named, found, strict=True) if g is not None}

    def backward(self, step: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of the batches of a step at the present weights.

        Returns:
            the loss, and the gradient of each parameter that has one, neither scaled nor clipped: means over
            micro-batches and ranks; of a sharded parameter this rank's part.
        """
        frame, losses = self.frame(step), []
        self._drop_gradients()
        taken: dict[str, Tensor] = {}
        for micro in frame.micro_batches:
            self.passes["backward"] += 1
            with isolated(self._light(), self.run), torch.enable_grad(), self._for_passes(taken):
                loss = self._pass(micro["batch"], step, micro)
                losses.append(float(loss.detach()) if isinstance(loss, Tensor) else math.nan)
                if self.run.automatic and isinstance(loss, Tensor):
                    loss.backward()
                    self._take_gradients(taken, self.run.module.named_parameters())
            self._drop_gradients()
        count = len(frame.micro_batches)
        reduced = {name: self._averaged(g / count) for name, g in taken.items()}
        return _mean(self._of_all_ranks(losses)), reduced

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Inside, passes compute in float32 what the run computes in half precision; the state is put back after."""
        with self.aside(), widened(self.run.module):
            yield

    # Ranks

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, which ask together."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def reduce_max(self, value: float) -> float:
        """The largest value over ranks, NaN if any is."""
        values = self.gather(value)
        return math.nan if any(math.isnan(v) for v in values) else max(values)

    def reduce_mean(self, value: float) -> float:
        """The mean over ranks."""
        return math.fsum(values) / len(values) if all(map(math.isfinite, values := self.gather(value))) else sum(values)

    # How

    def _pass(self, batch: Any, step: int, micro: Mapping[str, Any]) -> Any:
        """The loss that ``training_step`` returns for a batch, in the place of a micro-batch of a step.

        What the module does at the start of a batch comes before, such as a mask that changes with the step.
        """
        place = {key: micro[key] for key in PLACE}
        set_random_streams(micro["random"], self.run.device)
        set_place(self.trainer, step, place)
        batch = on_device(batch, self.run.device)
        self.module.on_train_batch_start(batch, place["batch_idx"])
        return loss_of(self.run.training_step(batch, place["batch_idx"]))

    def _load(self, step: int) -> None:
        own = self._own_ranks[0]
        snapshot = self.capsule.state(own, step)
        load_module(module_tensors(self.run), snapshot["module"])
        load_optimizers(self.run.optimizers, snapshot["optimizers"])
        load_scaler(self.run.scaler, snapshot["trainer"])
        fit_of_optimizers(self.run.optimizers, self.frame(step).hyperparameters)
        self._drop_gradients()

    def _snapshot(self) -> State:
        run = self.run
        return Snapshot(
            run.module, beside_the_module(run), copies=HostCopies(), gradients=False, apart=hooks_of_optimizers(run)
        )

    def _light(self) -> State:
        """What a pass may move; with steps or a hook of the module's own that is everything."""
        if not self.run.automatic or overrides(self.module, "on_train_batch_start"):
            return self._snapshot()
        return Snapshot(self.run.module, moved=self.run.module.parameters(), gradients=False)

    def _drop_gradients(self) -> None:
        for p in leaves_with_gradients(self.run):
            p.grad = None

    def _set_hyperparameters(self, frame: RecordedStep, rate: float) -> None:
        for optimizer, groups in zip(self.run.optimizers, frame.hyperparameters, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()})
                group["lr"] = group["lr"] * rate

    def _place(self, frame: RecordedStep, place: int) -> dict[str, Any]:
        """Where a micro-batch stands in the loop; those of several ranks are accumulated."""
        micro = frame.micro_batches[place]
        own = {key: micro[key] for key in PLACE}
        several, last = len(self._own_ranks), place == len(frame.micro_batches) - 1
        if several > 1:
            own |= {"batch_idx": place, "accumulation": own["accumulation"] * several, "is_last": last}
        elif last and not frame.complete:
            own["is_last"] = True  # so that the loop makes the update
        return own

    @contextmanager
    def _clipped(self, clip: float | None) -> Iterator[None]:
        trainer = self.trainer
        before = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if clip is not None:
            trainer.gradient_clip_val, trainer.gradient_clip_algorithm = clip, GradClipAlgorithmType.NORM
        try:
            yield
        finally:
            trainer.gradient_clip_val, trainer.gradient_clip_algorithm = before

    def _for_passes(self, taken: dict[str, Tensor] | None = None) -> Any:
        return nullcontext() if self.run.automatic else self._optimizers_stand(taken if taken is not None else {})

    @contextmanager
    def _optimizers_stand(self, taken: dict[str, Tensor]) -> Iterator[None]:
        """Under manual optimization: steps of the optimizers take their gradients, and change nothing."""
        names = {id(p): name for name, p in self.run.module.named_parameters()}
        steps = [optimizer.step for optimizer in self.run.optimizers]

        def standing(optimizer: Optimizer) -> Callable[..., Any]:
            def step(closure: Callable[[], Any] | None = None) -> Any:
                result = closure() if closure is not None else None
                own = [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
                self._take_gradients(taken, own)
                return result

            return step

        for optimizer in self.run.optimizers:
            optimizer.step = standing(optimizer)
        try:
            yield
        finally:
            for optimizer, step in zip(self.run.optimizers, steps, strict=True):
                vars(optimizer).pop("step", None)
                if optimizer.step != step:  # a scheduler's or an AMP wrapper's, which stood in its attributes
                    optimizer.step = step

    def _take_gradients(self, taken: dict[str, Tensor], named: Iterable[tuple[str, Tensor]]) -> None:
        for name, g in gradients(named).items():
            g = local_values(g).float() if g.dtype in (torch.float16, torch.bfloat16) else local_values(g)
            taken[name] = taken[name] + g if name in taken else g.clone()

    def _averaged(self, gradient: Tensor) -> Tensor:
        if self.ranks == 1 or self.run.layout == "sharded":  # which its own hooks have averaged
            return gradient
        dist.all_reduce(gradient)
        return gradient / self.ranks

    def _sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def _of_all_ranks(self, losses: Sequence[float]) -> list[list[float]]:
        """For each micro-batch of the run the losses of all of its ranks."""
        several = len(self._own_ranks)
        if several > 1:
            return [list(losses[at : at + several]) for at in range(0, len(losses), several)]
        return [list(of_ranks) for of_ranks in zip(*self.gather(list(losses)), strict=True)]

    def _after(self, step: int) -> int:
        later = self.steps[self.steps.index(step) + 1 :]
        return later[0] if later else step + 1


def _usable(frames: Sequence[RecordedStep], snapshots: Sequence[int], alarm: int) -> list[RecordedStep]:
    """The longest run of steps up to the last that begins with a snapshot and has all batches."""
    known = [f for f in frames if f.micro_batches and (f.step <= alarm or f.complete)]
    for place, frame in enumerate(known):
        if frame.step in snapshots and not why_no_batches(known[place:]) and _same_groups(known[place:]):
            return known[place:]
    return []


def _same_groups(frames: Sequence[RecordedStep]) -> bool:
    sizes = [[len(groups) for groups in frame.hyperparameters] for frame in frames]
    return all(size == sizes[0] for size in sizes)


def _why_none(capsule: Capsule, frames: Sequence[RecordedStep], snapshots: Sequence[int]) -> str:
    why = why_no_batches(frames)
    if not snapshots:
        why = "it has no snapshot of the run's state; give the Recorder more max_memory"
    return f"{capsule.path} cannot be replayed: {why or 'no step with a snapshot is among those that it holds'}"


def _square(gradient: Tensor) -> Tensor:
    local = local_values(gradient)
    wide = torch.promote_types(local.dtype, torch.float32)
    return torch.linalg.vector_norm(local, dtype=wide).double().square().cpu()


def _mean(losses: Sequence[Sequence[float]]) -> float:
    values = [loss for of_ranks in losses for loss in of_ranks]
    return sum(values) / len(values) if values else math.nan


def _plain(named: Mapping[str, Tensor]) -> set[str]:
    return {f"{name}.".replace("_orig_mod.", "")[:-1] for name in named}
