"""The modules and data of the golden fits, which no other test uses, so that they stay as they are."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


def images(count: int) -> TensorDataset:
    """Random 6x6 images of four classes, whose first row is the brighter the larger the class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    x[torch.arange(count), 0, 0] += y[:, None].float()
    return TensorDataset(x, y)


def loader(count: int = 64, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(images(count), batch_size=batch_size)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def linear() -> nn.Sequential:
    """Neither batch norm nor dropout."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))


def batch_loss(module: Any, batch: Any) -> Tensor:
    """What ``loss=`` of RelativeLoss is given, for a module that holds ``net`` or a plain model."""
    return F.cross_entropy(getattr(module, "net", module)(batch[0]), batch[1])


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "still": lambda m: torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9),
    "fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.05, max_iter=3),
    "without_hooks": lambda m: WithoutHooks(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "sparse": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
}


class Net(pl.LightningModule):
    """A classifier; what else it does is told by its arguments.

    Args:
        optimizer: a key of ``OPTIMIZERS``, or ``"groups"`` or ``"cycle"``.
        net: the network.
        planted: added to the loss of a batch, by the number of the batch since the start; without a gradient.
        no_loss: batches, by number, for which ``training_step`` returns None.
        skipped: batches, by number in the epoch, that ``on_train_batch_start`` ends the epoch at.
    """

    def __init__(
        self,
        optimizer: str = "momentum",
        net: nn.Module | None = None,
        *,
        planted: Mapping[int, float] | None = None,
        no_loss: Sequence[int] = (),
        skipped: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.net = convolutional() if net is None else net
        self.optimizer, self.planted = optimizer, dict(planted or {})
        self.no_loss, self.skipped, self.batches = no_loss, skipped, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx in self.skipped else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch) + self.planted.get(self.batches, 0.0)
        self.log("loss", loss)
        self.batches += 1
        return None if self.batches - 1 in self.no_loss else loss

    def loss(self, batch: Any) -> Tensor:
        return batch_loss(self, batch)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "groups":
            groups = [{"params": list(m.parameters()), "lr": 0.1 / (i + 1)} for i, m in enumerate(self.net)]
            return torch.optim.SGD([g for g in groups if g["params"]], weight_decay=0.1)
        if self.optimizer == "cycle":
            adam = torch.optim.Adam(self.parameters(), lr=torch.tensor(1e-2))
            cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=20)
            return {"optimizer": adam, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        return OPTIMIZERS[self.optimizer](self)


class Squares(Net):
    """The mean square of what a network makes of the flat images."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0].flatten(1)).abs().square().mean()


class Negative(Net):
    """A loss below 0."""

    def loss(self, batch: Any) -> Tensor:
        return batch_loss(self, batch) - 5.0


class Nothing(Net):
    """A loss of exactly 0."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).sum() * 0.0


class Spoils(Net):
    """Gradients with zeros, an infinity and a NaN."""

    def on_after_backward(self) -> None:
        grad = self.net[6].weight.grad
        grad[0], grad[1, 0], grad[1, 1] = 0.0, -math.inf, math.nan


class Thaws(Net):
    """The first convolution is trained from the fifth batch on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(batch_idx >= 4)


class InPlace(Net):
    """Changes its batch where it is, so that each further pass over the same tensors would give another loss."""

    def loss(self, batch: Any) -> Tensor:
        batch[0].sub_(0.5).abs_()
        return batch_loss(self, batch)


@dataclass
class Tally:
    total: float = 0.0
    last: Tensor | None = None


class Keeps(Net):
    """Keeps state in a buffer, arrays, generators and containers, and has a loss that depends on all of it."""

    def __init__(self) -> None:
        super().__init__(net=linear())
        self.register_buffer("average", torch.zeros(4))
        self.torch_stream = torch.Generator().manual_seed(1)
        self.numpy_stream, self.python_stream = np.random.default_rng(1), random.Random(1)
        self.array, self.tally, self.queue = np.zeros(4), Tally(), deque([torch.zeros(4)], maxlen=3)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0] * self.numpy_stream.uniform(0.9, 1.1) + self.python_stream.random() / 10
        logits = self.net(x + 0.1 * torch.randn(x.shape, generator=self.torch_stream))
        mean = logits.detach().mean(0)
        self.average.mul_(0.9).add_(0.1 * mean)
        self.array += mean.numpy()
        self.queue.append(mean)
        self.tally.total += 1.0
        self.tally.last = mean
        target = self.average + 0.1 * torch.from_numpy(self.array).float() + sum(self.queue) + 0.1 * self.tally.total
        return F.cross_entropy(logits, batch[1]) + 0.1 * (logits.mean(0) - target).square().mean()


class Named(Net):
    """Its batches are dictionaries."""

    def loss(self, batch: Any) -> Tensor:
        assert len(batch["names"]) == len(batch["x"])
        return batch_loss(self, (batch["x"], batch["inside"][0])) * batch["weight"]


def named(samples: list[Any]) -> dict[str, Any]:
    """A batch for ``Named``, with tensors and strings of each sample, and a number that all samples share."""
    x, y = (torch.stack(values) for values in zip(*samples, strict=True))
    return {"x": x, "inside": [y], "names": [str(int(label)) for label in y], "weight": 0.5}


class Bypassed(Net):
    """Has a batch norm that is never called, and one that is called from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.later = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def loss(self, batch: Any) -> Tensor:
        return batch_loss(self, (self.later(batch[0]) if self.batches >= 2 else batch[0], batch[1]))


class WithoutHooks(torch.optim.Optimizer):
    """An optimizer around another, without the step hooks that ``Optimizer.__init__`` would add."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults, self.state = inner, inner.defaults, inner.state
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()


class Late(Net):
    """Makes its network in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(net=nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = convolutional()


class Sometimes(Squares):
    """The second layer takes part in every other batch."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(36, 8), nn.Linear(8, 1)))

    def loss(self, batch: Any) -> Tensor:
        x = self.net[0](batch[0].flatten(1))
        return (x if self.batches % 2 else self.net[1](x)).square().mean()


class Complex(nn.Module):
    """A complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.cfloat) @ self.weight


class Looks(nn.Module):
    """A table with sparse gradients, and a parameter without values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=True)
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs() * 10).long().clamp(max=49)) + self.empty.sum()


class Turns(Net):
    """Manual optimization of three layers by optimizers of their own, which make steps in a given order.

    Args:
        turns: the optimizers that make a step, by the number of the batch.
    """

    def __init__(self, turns: Callable[[int], Sequence[int]], planted: Mapping[int, float] | None = None) -> None:
        layers = (nn.Linear(36 if not i else 4, 4) for i in range(3))
        super().__init__(net=nn.Sequential(nn.Flatten(), *layers), planted=planted)
        self.automatic_optimization = False
        self.turns = turns

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        for i in self.turns(batch_idx):
            optimizer = self.optimizers()[i]
            optimizer.zero_grad()
            self.manual_backward(batch_loss(self, batch))
            optimizer.step()
        loss = batch_loss(self, batch).detach() + self.planted.get(batch_idx, 0.0)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i + 1].parameters(), lr=0.1 / (i + 1), momentum=0.5 * i) for i in range(3)]


class Gan(pl.LightningModule):
    """Manual optimization of a generator and a discriminator, with batch norm, dropout and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net_g = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 36))
        self.net_d = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        generator, discriminator = self.optimizers()
        d_loss = self.turn(discriminator, gan_discriminator_loss(self, batch))
        self.turn(generator, gan_generator_loss(self, batch))
        return {"loss": d_loss}

    def turn(self, optimizer: Any, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        generator = torch.optim.AdamW(self.net_g.parameters(), lr=1e-2)
        discriminator = torch.optim.SGD(self.net_d.parameters(), lr=1e-2, momentum=0.9)
        return [generator, discriminator]


def gan_generator_loss(module: Any, batch: Any) -> Tensor:
    return -module.net_d(module.net_g(torch.randn(len(batch[0]), 4))).mean()


def gan_discriminator_loss(module: Any, batch: Any) -> Tensor:
    real = batch[0].flatten(1)
    fake = module.net_g(torch.randn(len(real), 4)).detach()
    return F.softplus(module.net_d(fake)).mean() + F.softplus(-module.net_d(real)).mean()


class OwnNorm(nn.Module):
    """A layer norm of a class that nobody knows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gain * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


def own_norm() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), OwnNorm(8), nn.ReLU(), nn.Linear(8, 4))


def norms_of_many_packages() -> nn.Sequential:
    """Normalization layers of torch, the zoo, timm and torchvision, and layers that are none."""
    from timm.layers import LayerNorm2d, RmsNorm
    from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

    from normzoo import convert_norms, create_norm

    block = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    convert_norms(block, "group")
    return nn.Sequential(
        Conv2dNormActivation(1, 4),
        LayerNorm2d(4),
        create_norm("batch", 4),
        create_norm("rms", 4),
        FrozenBatchNorm2d(4),
        block,
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        RmsNorm(16),
        nn.Linear(16, 4),
    )


class SharedNorm(nn.Module):
    """One batch norm that is called twice, and a channel that is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
        x = self.norm(self.second(self.norm(x).relu())).relu()
        return self.last(x.mean((2, 3)))


class Checkpointed(nn.Module):
    """The convolutional network, whose first layers are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = convolutional(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.inner[:3], x.requires_grad_(), use_reentrant=self.reentrant)
        return self.inner[3:](x)
