"""A stage of a plain module and some batches, without a capsule, a Trainer or ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.callbacks._run.facts import Run


class Task(nn.Module):
    """A network with a loss; the network's output may be anything that the loss takes."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        super().__init__()
        self.net = net
        self.loss = loss or (lambda output, batch: output.square().mean())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch), batch)


class FakeRun(Run):
    device = torch.device("cpu")
    optimizers = ()
    layout = "whole"

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class FakeStage:
    """Steps of SGD; ``batches[step]`` are the micro-batches of a step."""

    def __init__(self, module: nn.Module, batches: Sequence[Sequence[Any]], rate: float = 0.1) -> None:
        self.module, self.run, self.batches, self.rate = module, FakeRun(module), batches, rate
        self.steps, self.notes, self.ranks, self.rank = list(range(len(batches))), [], 1, 0
        self.capsule = SimpleNamespace(about={"kind": "divergence"})
        self.first = copy.deepcopy(module.state_dict())
        self.at: dict[int, Any] = {}  # weights before a step, where tests have planted something

    def go_to(self, step: int) -> None:
        self.module.load_state_dict(self.at.get(step, self.first))

    def plant(self, step: int, change: Callable[[nn.Module], Any]) -> None:
        with torch.no_grad():
            self.go_to(step)
            change(self.module)
        self.at[step] = copy.deepcopy(self.module.state_dict())
        self.go_to(0)

    def state(self) -> Any:
        return copy.deepcopy(self.module.state_dict())

    def put(self, state: Any, step: int | None = None) -> None:
        self.module.load_state_dict(state)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    @torch.no_grad()
    def set_parameters(self, values: dict[str, Tensor]) -> None:
        for name, p in self.module.named_parameters():
            p.copy_(values[name])

    def train(self, step: int) -> float:
        loss, gradients = self._passes(step)
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p -= self.rate * gradients[name] if name in gradients else 0.0
        return loss

    def loss(self, step: int) -> float:
        with torch.no_grad(), self._isolated():
            losses = [float(self.module.training_step(batch, i)) for i, batch in enumerate(self.batches[step])]
        return math.fsum(losses) / len(losses)

    def backward(self, step: int) -> tuple[float, dict[str, Tensor]]:
        with self._isolated():
            return self._passes(step)

    def _passes(self, step: int) -> tuple[float, dict[str, Tensor]]:
        batches, losses = self.batches[step], []
        for i, batch in enumerate(batches):
            loss = self.module.training_step(batch, i)
            losses.append(float(loss.detach()))
            loss.backward()
        gradients = {n: p.grad / len(batches) for n, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad()
        return sum(losses) / len(losses), gradients

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        yield
        with torch.no_grad():
            for name, b in self.module.named_buffers():
                b.copy_(buffers[name])

    @contextmanager
    def float32(self) -> Iterator[None]:
        from normzoo.replaying.widening import widened

        with widened(self.module):
            yield

    def gather(self, value: Any) -> list[Any]:
        return [value]
