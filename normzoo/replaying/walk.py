"""All steps of a capsule made once more, each measured and compared with that of the run."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normzoo.callbacks._run.gradients import gradients_in_use, trainable_parameters
from normzoo.callbacks._run.ranks import own_parts
from normzoo.replaying.against_the_run import Compared, trainable
from normzoo.replaying.comparison import Losses
from normzoo.replaying.stage import Stage


@dataclass
class Walk:
    """What came of the steps; lists have a value for each step that was made, None where it is not known.

    Attributes:
        losses: before the updates, means over micro-batches and ranks.
        after: on the same batches after the updates.
        norms: of the gradients of the first optimizer, before clipping.
        relative_updates: medians over weight matrices.
        rows: of the record ``replay_parameters``.
        seconds: that each step took.
        compared: their comparison with those of the run.
        raises: the error that a step has raised, which ends the walk.
        raises_step: the step that has.
    """

    compared: Compared
    losses: list[float | None] = field(default_factory=list)
    after: list[float | None] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    relative_updates: list[float | None] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    raises: str | None = None
    raises_step: int | None = None

    def updates(self, before: int) -> dict[str, Any]:
        """Of each parameter the sum of the norms of its updates before a step, and that of their squares."""
        of: dict[str, list[float]] = {}
        for row in self.rows:
            if row["step"] < before and math.isfinite(row["update"]):
                sums = of.setdefault(row["layer"], [0.0, 0.0])
                sums[0] += row["update"]
                sums[1] += row["update"] ** 2
        return {"before": before, "of": of}


def made_again(stage: Stage, keep: Collection[int]) -> Walk:
    """Make all steps of a stage from the first snapshot.

    Args:
        stage: whose steps; afterwards it is behind the last one.
        keep: steps, the states before which are kept, as is that behind the last one.

    Raises:
        Exception: what a step has raised, unless the capsule is of an error.
    """
    compared = Compared(stage)
    walk = Walk(compared)
    stage.go_to(stage.steps[0])
    for step in stage.steps:
        compared.weights(step)
        if step in keep:
            stage.keep()
        if not _make(stage, step, walk):
            return walk
        compared.step(step, walk.norms[-1])
    compared.weights(stage.steps[-1] + 1)
    stage.keep()
    return walk


def recorded_losses(stage: Stage) -> list[float | None]:
    """The loss of each step in the run, the mean over micro-batches and ranks; None where it is not known.

    A loss that is NaN may also be none: ``training_step`` may leave a batch out by returning None.
    """
    return [_mean(stage.frame(step).losses) for step in stage.steps]


def _mean(losses: Losses) -> float | None:
    known = [loss for of_ranks in losses for loss in of_ranks if loss is not None]
    return sum(known) / len(known) if known else None


def _make(stage: Stage, step: int, walk: Walk) -> bool:
    """Make a step and measure it; whether it has not raised."""
    may_raise = stage.capsule.about["kind"] == "exception"
    before = stage.parameters()
    state = stage.state() if may_raise else None
    began = time.monotonic()
    try:
        with _gradients(stage) as found:
            loss = stage.train(step)
    except Exception as error:  # that of the run, of the user's code or of the machine, made again
        if state is None:
            raise
        stage.put(state, step)
        walk.raises, walk.raises_step = f"{type(error).__name__}: {error}", step
        return False
    walk.seconds.append(time.monotonic() - began)
    walk.norms.append(stage.last_norm if found.calls == 1 else None)  # before further passes, which may set it
    walk.losses.append(None if math.isnan(loss) and not found.norms else loss)
    walk.after.append(None if walk.losses[-1] is None else loss_or_none(stage, step))
    rows = _rows(stage, step, before, found.norms)
    walk.rows += rows
    relative = [row["relative_update"] for row in rows if row["dimensions"] > 1] or [r["relative_update"] for r in rows]
    known = [x for x in relative if x is not None]
    walk.relative_updates.append(statistics.median(known) if known else None)
    return True


def loss_or_none(stage: Stage, step: int) -> float | None:
    """The loss of a step's batches at the present weights; None if they raise, as in the run of an exception."""
    try:
        return stage.loss(step)
    except Exception:  # that of the run, of the user's code, which weights or a counter of the module may bring about
        if stage.capsule.about["kind"] != "exception":
            raise
        return None


def _rows(
    stage: Stage, step: int, before: Mapping[str, Tensor], gradients: Mapping[str, float]
) -> list[dict[str, Any]]:
    now = stage.tensors()
    trained = [name for name, p in trainable(stage).items() if name in before]
    weights = norms(stage, [before[name] for name in trained])
    updates = norms(stage, [now[name] - before[name] for name in trained])
    places = {name: place for place, name in enumerate(before)}
    return [
        {
            "step": step,
            "layer": name,
            "depth": places[name],
            "dimensions": before[name].dim(),
            "weight": weight,
            "gradient": gradients.get(name),
            "update": update,
            "relative_update": update / weight if weight else None,
        }
        for name, weight, update in zip(trained, weights, updates, strict=True)
    ]


def norms(stage: Stage, tensors: Sequence[Tensor]) -> list[float]:
    """The Euclidean norms of tensors that all ranks hold, whole or sharded, in float32 or wider."""
    zero = torch.zeros((), dtype=torch.float64, device=stage.run.device)
    squares = torch.stack([zero, *(zero if x is None else _square(x) for x in own_parts(tensors))]).tolist()[1:]
    return [math.sqrt(sum(of_ranks)) for of_ranks in zip(*stage.gather(squares), strict=True)]


def _square(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dtype=wide).double().square()


@dataclass
class _Gradients:
    """The norms of the gradients of one step by the parameters' names, and how often its first optimizer had them."""

    norms: dict[str, float] = field(default_factory=dict)
    calls: int = 0  # more than one if a step makes several passes, as that of LBFGS does


@contextmanager
def _gradients(stage: Stage) -> Iterator[_Gradients]:
    """Inside, optimizers that step leave the norms of their gradients before clipping."""
    found = _Gradients()
    module: Any = stage.module
    original, own = module.on_before_optimizer_step, vars(module).get("on_before_optimizer_step")

    @functools.wraps(original)
    def hook(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        plain = getattr(optimizer, "optimizer", optimizer)
        grads = gradients_in_use(stage.run, plain, trainable_parameters(stage.run, plain).items())
        found.norms.update(zip(grads, norms(stage, list(grads.values())), strict=True))
        found.calls += plain is stage.run.optimizers[0]
        return original(optimizer, *args, **kwargs)

    vars(module)["on_before_optimizer_step"] = hook
    try:
        yield found
    finally:
        vars(module).pop("on_before_optimizer_step")
        if own is not None:
            vars(module)["on_before_optimizer_step"] = own
