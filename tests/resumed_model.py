"""A model whose training shows every seam: random streams, accumulated metrics, logs of each kind, a schedule."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Loose(pl.LightningDataModule):
    """Torch's own loaders, which do not tell their position."""

    def __init__(self, images: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(images, 1, 28, 28, generator=generator)
        self.set = torch.utils.data.TensorDataset(inputs, torch.arange(images) % 10)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.set, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.set, batch_size=8)


class Model(pl.LightningModule):
    """Small, with dropout, batch normalization and a step that draws from all streams."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 10)
        )
        self.accuracy, self.seen = MulticlassAccuracy(10), MulticlassAccuracy(10)
        self.automatic_optimization = not manual

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        logits = self.net(images * scale)
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/most", loss, on_step=False, on_epoch=True, reduce_fx=max)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        if batch_idx == 0:
            self.log("train/first", loss, on_step=False, on_epoch=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 3 == 2:
                self.optimizers().step()  # type: ignore[union-attr]
                self.optimizers().zero_grad()  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0]) + torch.randn(10)
        self.seen.update(logits, batch[1])
        self.log("test/loss", nn.functional.cross_entropy(logits, batch[1]), batch_size=len(batch[1]))
        self.log("test/accuracy", self.seen)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        watched = {"monitor": "train/loss"} if self.automatic_optimization else {}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **watched}}


class CutShort(pl.Callback):
    """Raises an error, or has the run interrupted, when it has been asked so many times since the run began."""

    def __init__(self, at: int = -1, how: str = "error") -> None:
        self.at, self.how, self.asked = at, how, 0

    def _ask(self) -> None:
        from normzoo.cli import _interrupts

        self.asked += 1
        if self.asked == self.at:
            if self.how == "error":
                raise RuntimeError("cut short")
            assert _interrupts._current is not None
            _interrupts._current.received = _interrupts.signal.SIGINT

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ask()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._ask()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._ask()

    def on_train_batch_end(self, *_: Any) -> None:
        self._ask()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._ask()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._ask()

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._ask()
