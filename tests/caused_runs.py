"""Small runs, each of which diverges, seems to, or fails for one known cause, and leaves a capsule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normzoo.callbacks import Divergence, GradientNorm, LossSpike, Stop
from normzoo.testing import FaultInjector

BATCH, INPUTS, CLASSES, AT = 32, 16, 10, 80  # AT: the step of what is planted in one batch
Data = tuple[Tensor, Tensor]


class Fit(pl.LightningModule):
    """A network that is fitted by the optimizer that a function makes of it."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any], schedule: Any = None) -> None:
        super().__init__()
        self.net, self.make, self.schedule = net, optimizer, schedule

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x).float()
        return F.mse_loss(output.squeeze(-1), y) if y.is_floating_point() else F.cross_entropy(output, y)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.net)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule or (lambda step: 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Failing(Fit):
    """A fit whose ``training_step`` raises once a buffer has counted to ``AT``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        self.count += 1
        if self.count > AT:
            raise RuntimeError("the counter is full")
        return super().training_step(batch, batch_idx)


def mlp(outputs: int, depth: int = 3, scale: float = 1.0) -> nn.Module:
    sizes = [INPUTS, *[64] * depth]
    layers = [layer for i in range(depth) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(64, outputs))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


class Gained(nn.Module):
    """A network times a scalar, whose learning rate is 30,000 times that of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gain = mlp(1), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.net(x)


class Bags(nn.Module):
    """Bags of tokens, of which one has an embedding of zeros, before a layer norm with a tiny eps beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, INPUTS), nn.LayerNorm(INPUTS, eps=1e-10)
        self.body, self.head = mlp(INPUTS, depth=2), nn.Linear(INPUTS, CLASSES)
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head((x + self.body(self.norm(x))).mean(1))


def classes() -> Data:
    g = torch.Generator().manual_seed(0)
    centres, y = 2 * torch.randn(CLASSES, INPUTS, generator=g), torch.randint(CLASSES, (128 * BATCH,), generator=g)
    return centres[y] + 0.5 * torch.randn(len(y), INPUTS, generator=g), y


def regression() -> Data:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128 * BATCH, INPUTS, generator=g)
    return x, (x @ torch.randn(INPUTS, generator=g)) / 4 + 0.1 * torch.randn(len(x), generator=g)


def bags() -> Data:
    g = torch.Generator().manual_seed(0)
    tokens, weight = torch.randint(1, 32, (128 * BATCH, 8), generator=g), torch.randn(32, CLASSES, generator=g)
    y = weight[tokens].mean(1).argmax(1)
    tokens[AT * BATCH + 5, 3] = 0
    return tokens, y


def with_large_samples(data: Data) -> Data:
    g = torch.Generator().manual_seed(3)
    for row in (3, 7):
        data[0][AT * BATCH + row] = 1e4 * torch.randn(INPUTS, generator=g)
    return data


def with_a_hard_batch(data: Data) -> Data:
    data[1][AT * BATCH : (AT + 1) * BATCH] += torch.randn(BATCH, generator=torch.Generator().manual_seed(2))
    return data


def of_halves(data: Data) -> Data:
    return data[0].half(), data[1]


def sgd(rate: float, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda net: torch.optim.SGD(net.parameters(), rate, **options)


def adam(rate: float) -> Callable[[nn.Module], Any]:
    return lambda net: torch.optim.Adam(net.parameters(), rate)


def gained(net: nn.Module) -> Any:
    others = [p for name, p in net.named_parameters() if name != "gain"]
    return torch.optim.SGD([{"params": others}, {"params": [net.gain], "lr": 150.0}], 0.005, momentum=0.9)


class Plant(NamedTuple):
    """What is planted: how module and data are made, a fault, options of the Trainer."""

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Data]
    fault: str = ""
    options: dict[str, Any] = {}  # noqa: RUF012


CAUSED = {
    "data": Plant(lambda: Fit(mlp(1), sgd(0.05)), lambda: with_large_samples(regression())),
    "learning_rate": Plant(lambda: Fit(mlp(CLASSES), sgd(0.05), lambda step: 60.0 if step >= AT else 1.0), classes),
    "warm_up": Plant(lambda: Fit(mlp(1, scale=2.5), sgd(0.1)), regression),
    "normalization": Plant(lambda: Fit(Bags(), sgd(0.1)), bags),
    "precision": Plant(
        lambda: Fit(mlp(CLASSES), adam(3e-3)), lambda: of_halves(classes()), options={"precision": "16-true"}
    ),
    "parameter": Plant(lambda: Fit(Gained(), gained), regression),
    "hardware": Plant(lambda: Fit(mlp(CLASSES), sgd(0.05)), classes, fault="weight_bit"),
    "innocent": Plant(lambda: Fit(mlp(1), adam(1e-3)), lambda: with_a_hard_batch(regression())),
    "error": Plant(lambda: Failing(mlp(CLASSES), sgd(0.05)), classes),
}


def run(folder: Path, cause: str) -> Path:
    """Make the run of a cause; the folder that its capsules are in."""
    plant = CAUSED[cause]
    pl.seed_everything(10, verbose=False)
    module, data = plant.module(), plant.data()
    rules = [LossSpike(deviations=8.0, window=30)] if cause == "innocent" else None
    callbacks: list[Any] = [GradientNorm(), Divergence(action=Stop(), **({} if rules is None else {"rules": rules}))]
    if plant.fault:
        callbacks.insert(0, FaultInjector(plant.fault, step=AT, point="batch end"))
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=128,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **plant.options,
    )
    with contextlib.suppress(SystemExit, RuntimeError):  # of Stop, and of Failing
        trainer.fit(module, DataLoader(TensorDataset(*data), BATCH))
    [manifest] = folder.rglob("manifest.json")
    return manifest.parent
