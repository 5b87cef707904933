"""Small runs that diverge for a known cause, or seem to, and leave a capsule."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normzoo.callbacks import Divergence, GradientNorm, LossSpike, Recorder
from normzoo.testing import FaultInjector

STEP = 22  # at which the cause is planted
WIDTH = 16


class Planted(pl.LightningModule):
    """A network with batch norm that fits a smooth function; what is planted is one of ``KINDS``."""

    def __init__(self, kind: str = "", rate: float = 0.05) -> None:
        super().__init__()
        self.kind, self.rate = kind, rate
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if not bool((y.abs() < 1e8).all()):
            raise ValueError(f"the targets are between -1e8 and 1e8, and the largest is {float(y.abs().max()):g}")
        output = self.net(x)
        if self.kind == "race":
            noise = int.from_bytes(os.urandom(2), "little") / 2**16
            output = output * (1 + 1e-5 * noise)
        return nn.functional.mse_loss(output, y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        jumps = self.kind == "rate"
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 200.0 if jumps and step >= STEP else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


KINDS = {
    "rate": "the learning rate is 200 times as large from a step on",
    "batch": "the targets of one batch are 3000 times as large",
    "nan": "one value of a batch is NaN",
    "bit": "one bit of a weight is flipped between two steps",
    "hard": "the targets of one batch are 2.5 times as large, which the run survives",
    "race": "each pass has noise that no generator knows, and one batch is bad",
    "error": "the targets of one batch are so large that training_step raises",
}


def data(kind: str, samples: int = 16 * 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, WIDTH, generator=generator)
    y = x[:, :2].sin().sum(dim=1, keepdim=True) + 0.05 * torch.randn(samples, 1, generator=generator)
    bad = slice(16 * STEP, 16 * (STEP + 1))
    factor = {"batch": 3e3, "race": 3e3, "hard": 2.5, "error": 1e9}.get(kind)
    y[bad] *= factor or 1.0
    if kind == "nan":
        x[16 * STEP + 3, 2] = torch.nan
    return TensorDataset(x, y)


def plant(folder: Path, kind: str, **options: Any) -> Path:
    """Train until some steps after the alarm, or until the error; the first capsule."""
    pl.seed_everything(3)
    rules: Any = {"rules": [LossSpike(6.0, window=16)]} if kind == "hard" else {}
    callbacks: list[pl.Callback] = [GradientNorm(), Divergence(recorder=Recorder(steps=8), **rules)]
    if kind == "bit":
        callbacks.insert(0, FaultInjector("weight_bit", step=STEP, point="batch start", parameter="net.0.weight"))
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=STEP + 6,
        logger=pl.loggers.CSVLogger(folder, version=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **({"devices": 1} | options),
    )
    loader = DataLoader(data(kind), batch_size=16)
    with contextlib.suppress(ValueError):
        trainer.fit(Planted(kind), loader)
    return min((folder / "lightning_logs" / "version_0" / "capsules").iterdir())
