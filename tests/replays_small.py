"""Small runs that leave a capsule, to replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from normzoo.callbacks import Divergence, GradientNorm, Record, Recorder, Rule
from normzoo.callbacks.rules import Flag, Seen

ALARM = 11


class At(Rule):
    """Flags each micro-batch of a step."""

    def __init__(self, step: int = ALARM) -> None:
        self.step = step

    def judge(self, seen: Seen) -> Flag | None:
        return Flag("at", 0.0) if seen.step == self.step else None


class Net(pl.LightningModule):
    """A convolutional network with batch norm and dropout; its optimizers, precision and loop are arguments."""

    def __init__(
        self, optimizer: str = "AdamW", manual: bool = False, sharded: bool = False, rate: float = 0.01
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = not manual
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4) if sharded else nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )
        self.scale = nn.Parameter(torch.ones(()) if not sharded else torch.ones(4))
        self.optimizer, self.rate, self.sharded = optimizer, rate, sharded

    def configure_model(self) -> None:
        if self.sharded:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        for optimizer in [] if self.automatic_optimization else self.optimizers():
            loss = nn.functional.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return {"loss": loss}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) * self.scale.mean()
        return logits

    def configure_optimizers(self) -> Any:
        make = getattr(torch.optim, self.optimizer)
        if not self.automatic_optimization:
            return [make(self.net.parameters(), lr=self.rate), make([self.scale], lr=self.rate)]
        optimizer = make(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    folder: Path,
    *,
    net: dict[str, Any] | None = None,
    module: pl.LightningModule | None = None,
    alarm: int = ALARM,
    samples: int = 480,
    data: Any = None,
    **options: Any,
) -> Path:
    """Train for two steps beyond the alarm; the run's folder."""
    pl.seed_everything(3)
    generator = torch.Generator().manual_seed(1)
    images = TensorDataset(torch.randn(samples, 1, 6, 6, generator=generator), torch.arange(samples) % 3)
    recorder = Recorder(steps=4)
    callbacks = [GradientNorm(), Divergence(rules=[At(alarm)], action=Record(), recorder=recorder)]
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=alarm + 3,
        log_every_n_steps=1,
        logger=pl.loggers.CSVLogger(folder, version=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **({"devices": 1} | options),
    )
    trainer.fit(module or Net(**net or {}), data or DataLoader(images, batch_size=8, shuffle=True))
    return folder / "lightning_logs" / "version_0"


def run_ranks_of(folder: str, kind: str) -> None:
    """On each rank: train and leave a capsule."""
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if kind == "sharded":
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    run(Path(folder), net={"sharded": kind == "sharded"}, strategy=strategy, devices=2)


def replay_on(folder: str, kind: str) -> None:
    """On each rank: replay all steps of the capsule; rank 0 writes the losses, those of the capsule, and norms."""
    from normzoo import load_capsule
    from normzoo.callbacks._run.facts import rank_and_ranks
    from normzoo.replaying.fit import in_a_fit

    capsule = load_capsule(Path(folder) / "lightning_logs" / "version_0")

    def ask(stage: Any) -> None:
        rows = []
        for step in stage.steps:
            before = stage.losses(step)
            loss, gradients = stage.backward(step)
            trained = stage.train(step)
            squares = sum(float(g.double().square().sum()) for g in gradients.values())
            squares = sum(stage.gather(squares)) if kind == "sharded" else squares
            frame = stage.frame(step)
            rows.append(
                {
                    "step": step,
                    "before": before,
                    "mean": loss,
                    "trained": trained,
                    "losses": stage.last_losses,
                    "recorded": frame.losses,
                    "norm": stage.last_norm,
                    "recorded_norm": frame.norm,
                    "gradient": squares**0.5,
                }
            )
        if rank_and_ranks()[0] == 0:
            (Path(folder) / "replayed.json").write_text(json.dumps(rows))

    in_a_fit(capsule, Net(sharded=kind == "sharded"), ask)
