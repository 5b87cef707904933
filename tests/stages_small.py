"""A stage in memory, of a plain module with ``training_step`` and SGD, for tests of the questions of a replay."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from normzoo.callbacks._run.facts import rank_and_ranks

ABOUT = {"kind": "divergence", "step": 0, "sentence": "The loss was large."}


class SmallStage:
    """Steps of SGD on batches; see :class:`normzoo.replaying.stage.Stage` for what its methods do.

    Args:
        module: with a ``training_step(batch)`` that returns a loss.
        steps: for each step its micro-batches of this process.
        ids: for each step and micro-batch the ids of the samples.
        rank_of: the rank of each micro-batch; by default this process's.
        disturb: called with the module before some steps, to plant a change from outside.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: Sequence[Sequence[Any]],
        *,
        lr: float = 0.1,
        first: int = 0,
        alarm: int | None = None,
        ids: Any = None,
        rank_of: Sequence[int] | None = None,
        disturb: Mapping[int, Callable[[nn.Module], None]] | None = None,
    ) -> None:
        self.module, self.lr, self.disturb = module, lr, disturb or {}
        self.rank, self.ranks = rank_and_ranks()
        self.recorded_ranks = self.ranks
        self.steps = list(range(first, first + len(steps)))
        self.alarm = self.steps[-1] if alarm is None else alarm
        self.snapshots, self.notes, self.passes = self.steps[:1], [], Counter[str]()
        self.run = SimpleNamespace(module=module, device=torch.device("cpu"), layout="whole", automatic=True)
        self._at = self.steps[0]
        self._kept = {self._at: copy.deepcopy(module.state_dict())}
        self._frames = {}
        for place, (step, micros) in enumerate(zip(self.steps, steps, strict=True)):
            own = [self._micro(batch, step, n, ids and ids[place][n]) for n, batch in enumerate(micros)]
            ranks = list(rank_of or [self.rank] * len(own))
            self._frames[step] = SimpleNamespace(step=step, losses=[[1.0]] * len(own), micro_batches=own, rank_of=ranks)

    @staticmethod
    def _micro(batch: Any, step: int, number: int, ids: Any) -> dict[str, Any]:
        return {"batch": batch, "batch_idx": step, "ids": ids, "hash": None, "seed": 100 * step + number}

    def frame(self, step: int) -> Any:
        return self._frames[step]

    def go_to(self, step: int) -> None:
        nearest = max(kept for kept in self._kept if kept <= step)
        if self._at is None or not nearest < self._at <= step:
            self.module.load_state_dict(self._kept[nearest])
            self._at = nearest
        while self._at != step:
            self.train(self._at)

    def keep(self) -> None:
        if self._at is not None:
            self._kept[self._at] = copy.deepcopy(self.module.state_dict())

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.module.state_dict(keep_vars=True).items()}

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        own = dict(self.module.named_parameters())
        for name, value in values.items():
            own[name].copy_(value)
        self._at = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        state, at = copy.deepcopy(self.module.state_dict()), self._at
        try:
            yield
        finally:
            self.module.load_state_dict(state)
            self._at = at

    def train(self, step: int) -> float:
        if step in self.disturb:
            self.disturb[step](self.module)
        loss, gradient = self.backward(step)
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, g in gradient.items():
                own[name].sub_(self.lr * g)
        self.passes["steps"] += len(self.frame(step).micro_batches)
        self._at = step + 1 if self._at == step else None
        return loss

    def loss(self, step: int) -> float:
        losses = [float(self.loss_of_batch(m["batch"], step, i)) for i, m in enumerate(self.frame(step).micro_batches)]
        everything = [loss for of_rank in self.gather(losses) for loss in of_rank]
        return sum(everything) / len(everything)

    def loss_of_batch(self, batch: Any, step: int, micro: int = 0) -> Tensor:
        self.passes["forward"] += 1
        with self._pass(step, micro), torch.no_grad():
            return self.module.training_step(copy.deepcopy(batch)).detach()

    def gradient_of_batch(self, batch: Any, step: int, micro: int = 0) -> dict[str, Tensor]:
        self.passes["backward"] += 1
        own = dict(self.module.named_parameters())
        with self._pass(step, micro), torch.enable_grad():
            loss = self.module.training_step(copy.deepcopy(batch))
            found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        return {name: g for name, g in zip(own, found, strict=True) if g is not None}

    def backward(self, step: int) -> tuple[float, dict[str, Tensor]]:
        micros = self.frame(step).micro_batches
        gradients = [self.gradient_of_batch(m["batch"], step, i) for i, m in enumerate(micros)]
        gathered = [g for of_rank in self.gather(gradients) for g in of_rank]
        return self.loss(step), {name: sum(g[name] for g in gathered) / len(gathered) for name in gathered[0]}

    @contextmanager
    def _pass(self, step: int, micro: int) -> Iterator[None]:
        state = copy.deepcopy(self.module.state_dict())
        streams = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.manual_seed(self.frame(step).micro_batches[micro]["seed"])
        try:
            yield
        finally:
            self.module.load_state_dict(state)
            torch.set_rng_state(streams[0])
            np.random.set_state(streams[1])
            random.setstate(streams[2])

    def gather(self, value: Any) -> list[Any]:
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def reduce_max(self, value: float) -> float:
        return max(self.gather(value))


class Classifier(nn.Module):
    """Cross entropy of a network on batches ``(x, y)``."""

    def __init__(self, net: nn.Module, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.loss = net, loss or nn.CrossEntropyLoss()

    def training_step(self, batch: Any) -> Tensor:
        x, y, *_ = batch
        return self.loss(self.net(x), y)


def evidence_of(stage: SmallStage, onset: int, kind: str = "divergence") -> dict[str, Any]:
    """The evidence that the questions before have added."""
    return {
        "about": {**ABOUT, "kind": kind, "step": stage.alarm},
        "course": {"steps": stage.steps, "loss": [1.0] * len(stage.steps), "onset": onset},
    }


def blobs(count: int, seed: int, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Points around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=generator)
    x = torch.randn(count, features, generator=generator)
    x[:, :classes] += 2 * nn.functional.one_hot(y, classes)
    return x, y
