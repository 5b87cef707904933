"""The loop that a user would write, with the network of callbacks_small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader
from torch import Tensor, nn

STEPS = 20


def small_net() -> nn.Sequential:
    return SmallNet().net


def compiled_in_place() -> nn.Sequential:
    model = small_net()
    model.compile(backend="eager")
    return model


def batch_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watching: Any = None,
    *,
    steps: int = STEPS,
    accumulate: int = 1,
    before_step: Callable[[int], None] = lambda step: None,
    losses: dict[int, float] | None = None,
) -> None:
    """The loop that a user would write; ``watching`` is told all there is to tell."""
    micro = 0
    batches = [b for _ in range(accumulate) for b in loader()]
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            batch = batches[micro]
            micro += 1
            loss = batch_loss(model, batch)
            if watching is not None:
                watching.batch(batch)
                watching.loss((losses or {}).get(step, loss))
            (loss / accumulate).backward()
        before_step(step)
        optimizer.step()


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        a, b = list(a.items()), list(b.items())
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
