"""The small task that measurements are tried on: network, data, module and logger."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from normzoo.testing.measurements._snapshot import count_hooks

EPOCH = 4  # optimizer steps
BATCH = 4  # samples
CLASSES = 4
ACCUMULATION = 2  # so that measurements that compare gradients have several
FAILS_AT = 5  # index of a micro-batch, the last of a step
PLACES = ("forward", "backward", "step")  # where a fit can fail


class Residual(nn.Module):
    """x plus a branch of normalization, ReLU and convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip = nn.Identity()
        self.branch = nn.Sequential(
            nn.GroupNorm(2, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.skip(x) + self.branch(x)


def small_net() -> nn.Module:
    """Two residual blocks, normalization and a linear head: (N, 3, 6, 6) to (N, 4), without dropout or batch norm."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3, padding=1),
            block1=Residual(4),
            block2=Residual(4),
            norm=nn.GroupNorm(2, 4),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            head=nn.Linear(16, CLASSES),
        )
    )


@dataclass(frozen=True)
class Setting:
    """What fits differ in.

    Attributes:
        optimizer: ``"sgd"``, ``"momentum"`` or ``"adamw"``.
        extra: what the logits go through: ``"none"``, ``"dropout"`` or ``"batch"``, a batch norm.
        accumulation: micro-batches of a step.
        clipping: largest norm of the gradient; or None.
        precision: of the Trainer.
        mode: ``"automatic"``, ``"manual"``, or ``"several"``, two optimizers by turns under manual optimization.
        dtype: of network and data.
        batch: samples of a micro-batch.
        shuffled: whether the order is drawn from torch's random stream.
        omitted: indices of micro-batches that are left out of each epoch.
        overflow: index of the micro-batch whose gradients become infinite; or None.
        fails_in: one of :data:`PLACES`, in which micro-batch :data:`FAILS_AT` fails; or nothing.
        interrupted: whether it fails by KeyboardInterrupt.
    """

    optimizer: str = "sgd"
    extra: str = "none"
    accumulation: int = ACCUMULATION
    clipping: float | None = None
    precision: str = "32-true"
    mode: str = "automatic"
    dtype: torch.dtype = torch.float32
    batch: int = BATCH
    shuffled: bool = False
    omitted: tuple[int, ...] = ()
    overflow: int | None = None
    fails_in: str = ""
    interrupted: bool = False

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(BASE, name)}
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "plain SGD"


BASE = Setting()


class PlantedError(Exception):
    """By which a fit is made to fail."""


class Notes:
    """What a fit notes of itself; an object, as its values are not compared in snapshots.

    Attributes:
        hooks: how many there are of modules and parameters before each backward pass, and of optimizers at the end of
            the step that follows it.
        trains: whether the pass that comes next is one of the run, not one that a measurement makes beside it.
    """

    def __init__(self) -> None:
        self.hooks: list[dict[str, int]] = []
        self.trains = False


class Task(pl.LightningModule):
    """Classifies small images; keeps a metric, a counter, a list and a buffer, and draws from all random streams.

    Args:
        net: makes the network.
        setting: of the fit.
    """

    def __init__(self, net: Callable[[], nn.Module], setting: Setting) -> None:
        super().__init__()
        self.setting, self.automatic_optimization = setting, setting.mode == "automatic"
        self.net = net().to(setting.dtype)
        layers: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "dropout": lambda: nn.Dropout(0.3),
            "batch": lambda: nn.BatchNorm1d(CLASSES),
        }
        self.extra = layers[setting.extra]()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro", validate_args=False)
        self.examples: Tensor
        self.register_buffer("examples", torch.zeros((), dtype=torch.int64), persistent=False)
        self.calls = 0
        self.sizes: list[int] = []
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to logits (N, 4)."""
        return self.extra(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """The loss; under manual optimization with the steps."""
        x, y = batch
        self.calls += 1
        self.sizes.append(len(x))
        self.examples += len(x)
        random.random(), np.random.rand(), torch.rand(1)
        if self.automatic_optimization:
            return self._loss(x, y)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            loss = self._loss(x, y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss}

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        self._plant(logits)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def _plant(self, logits: Tensor) -> None:
        """The overflow that the setting asks for; and the failure, in a pass of the run alone."""
        micro_batch = len(self.notes.hooks)
        trains, self.notes.trains = self.notes.trains, False
        if micro_batch == self.setting.overflow and logits.requires_grad:
            logits.register_hook(lambda g: g * torch.inf)
        if micro_batch == FAILS_AT and trains and self.setting.fails_in == "forward":
            self._fail()
        if micro_batch == FAILS_AT and trains and self.setting.fails_in == "backward":
            logits.register_hook(lambda g: self._fail())

    def _fail(self) -> None:
        raise KeyboardInterrupt if self.setting.interrupted else PlantedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A pass of the run comes next; those of measurements that come before it have been made."""
        self.notes.trains = True

    def on_before_backward(self, loss: Tensor) -> None:
        """Count hooks."""
        self.notes.hooks.append(count_hooks(self, ()))

    def configure_optimizers(self) -> Any:
        """The optimizer that the setting names; or two, each of half of the parameters."""
        parameters = [*self.parameters()]
        half = len(parameters) // 2
        groups = [parameters[:half], parameters[half:]] if self.setting.mode == "several" else [parameters]
        made: list[torch.optim.Optimizer] = []
        for group in groups:
            if self.setting.optimizer == "adamw":
                made.append(torch.optim.AdamW(group, lr=1e-2))
            else:
                made.append(torch.optim.SGD(group, lr=0.1, momentum=0.9 * (self.setting.optimizer == "momentum")))
            made[-1].register_step_post_hook(self._after_step)
        return made if len(made) > 1 else made[0]

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.notes.hooks[-1] |= count_hooks(nn.Module(), [optimizer])
        if len(self.notes.hooks) == FAILS_AT + 1 and self.setting.fails_in == "step":
            self._fail()


def data(count: int, dtype: torch.dtype) -> TensorDataset:
    """Images whose label depends on where they are bright."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    x = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    x[torch.arange(count), 0, y] += 2
    return TensorDataset(x.to(dtype), y)


def loader(setting: Setting, rank: int = 0, world: int = 1) -> DataLoader[Any]:
    """An epoch. Of several ranks each has a part of every batch of the union: the ranks' parts follow one another."""
    samples = data(EPOCH * setting.accumulation * setting.batch * world, setting.dtype)
    if setting.shuffled:
        return DataLoader(samples, setting.batch, shuffle=True)
    starts = range(rank * setting.batch, len(samples), world * setting.batch)
    kept = [start for i, start in enumerate(starts) if i not in setting.omitted]
    return DataLoader(samples, batch_sampler=[[*range(start, start + setting.batch)] for start in kept])


class Memory(Logger):
    """A logger that keeps scalars, and whose folder that of the records is."""

    name, version = "", 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)
        self.logged: dict[str, list[tuple[int | None, float]]] = defaultdict(list)

    @property
    def save_dir(self) -> str:
        """The folder."""
        return self.folder

    log_dir = save_dir

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep scalars."""
        for key, value in metrics.items():
            self.logged[key].append((step, value))
