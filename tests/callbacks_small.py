"""A small module and data that every callback test trains; importable in processes that tests start."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class SmallNet(pl.LightningModule):
    """Convolution, batch norm, dropout and a linear layer, with metrics and a plain counter of its own."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.seen: list[float] = []
        self.calls = 0
        self.optimizer_name, self.lr = optimizer, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.calls += 1
        self.seen.append(float(x.sum()))
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr / 100)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class TwoOptimizers(SmallNet):
    """Manual optimization: a step of each of two optimizers, on parts of the network, for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net[:2], self.net[6])]


class Ops(TorchDispatchMode):
    """Names of the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def images(count: int = 160, seed: int = 0) -> TensorDataset:
    """Random 8x8 images whose label depends on where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    x[torch.arange(count), 0, :2] += 2 * y[:, None, None].float()
    return TensorDataset(x, y)


def loader(count: int = 160, batch_size: int = 8) -> DataLoader:
    return DataLoader(images(count), batch_size=batch_size)


def trainer(folder: str, **options: object) -> pl.Trainer:
    """A quiet Trainer that logs every step into ``folder``."""
    from lightning.pytorch.loggers import CSVLogger

    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 20,
        "max_epochs": -1,
        "logger": CSVLogger(folder, name="", version="log"),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **options})  # type: ignore[arg-type]
