"""What tests compare of two fits, bit for bit, and the cells of their matrix; importable in processes they start."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from callbacks_small import images, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from normzoo import create_norm, load_run
from normzoo.callbacks import ChannelMoments, Divergence, GradientNoise, GradientTails, RelativeLoss, Stop
from normzoo.testing.measurements._perturbation import pairwise
from normzoo.testing.measurements._snapshot import differences as each_difference
from normzoo.testing.measurements._snapshot import snapshot

__all__ = ["snapshot"]
STEPS = 8  # of the optimizer, in each cell
FEW = (-0.5, 0.0, 1.0, 4.0)  # multiples: each is a forward pass of its own, and all are undone alike
AXES = {
    "optimizer": ["sgd", "adamw"],
    "layer": ["dropout", "batch", "ghost"],
    "accumulation": [1, 3],
    "clipping": [None, 0.05],
    "precision": ["32-true", "bf16-mixed"],
}
CELLS = pairwise([dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())])
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.3),
    "batch": lambda: nn.BatchNorm2d(4),
    "ghost": lambda: create_norm("ghost_batch", 4, ghost_size=2),
}


def cell_id(cell: dict[str, Any]) -> str:
    clipping = "clip" if cell["clipping"] else "free"
    return f"{cell['optimizer']}-{cell['layer']}-{cell['accumulation']}-{clipping}-{cell['precision']}"


class CellNet(pl.LightningModule):
    """A network of a few layers that keeps metrics, a list, a counter and a tensor of its own."""

    def __init__(self, optimizer: str = "sgd", layer: str = "dropout") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            LAYERS[layer](),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.register_buffer("examples", torch.zeros((), dtype=torch.int64), persistent=False)
        self.losses: list[float] = []
        self.calls = 0
        self.mean = torch.zeros(8, 8)
        self.optimizer_name = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.calls += 1
        self.examples += len(x)
        self.losses.append(loss.item())
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        random.random(), np.random.rand(), torch.rand(1)
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        if self.optimizer_name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def every_callback(several: bool, loss: Callable[..., Tensor] | None = None) -> list[pl.Callback]:
    """All callbacks, sampling every step.

    GradientNoise compares the gradients of a step if there are several, and parts of its batch if not. Under manual
    optimization, for which RelativeLoss needs a loss, it cannot be.
    """
    relative_loss = RelativeLoss(1, multiples=FEW, loss=loss)
    callbacks = [GradientTails(1), relative_loss, Divergence(action=Stop(None))]
    callbacks.append(ChannelMoments(1, sites=["norms", "net*"], where="both"))
    return callbacks + ([GradientNoise(1, split=None if several else 2)] if loss is None else [])


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two snapshots differ in a bit, a type or a key."""
    return [*each_difference(a, b, where)]


def assert_unperturbed(without: Any, with_all: Any) -> None:
    assert not (found := differences(without, with_all)), "\n".join(found)


def fit(
    folder: Path,
    make: Callable[[], pl.LightningModule],
    callbacks: list[Any],
    data: Callable[[], Any] = lambda: DataLoader(images(24), batch_size=4, shuffle=True),
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One seeded fit, in epochs of 6 batches if nothing else is said, and all that it leaves; options are Trainer's."""
    pl.seed_everything(3, verbose=False)
    module = make()
    run = trainer(str(folder), callbacks=callbacks, **{"max_steps": STEPS, **options})
    run.fit(module, data(), ckpt_path=ckpt_path, weights_only=False)
    return snapshot(run, module)


def fit_cell(folder: Path, cell: dict[str, Any], callbacks: list[Any], **options: Any) -> dict[str, Any]:
    """One fit of a cell, in epochs of 6 steps on one rank and of 3 on two."""
    return fit(
        folder,
        lambda: CellNet(cell["optimizer"], cell["layer"]),
        callbacks,
        lambda: DataLoader(images(4 * 6 * cell["accumulation"]), batch_size=4, shuffle=True),
        accumulate_grad_batches=cell["accumulation"],
        gradient_clip_val=cell["clipping"],
        precision=cell["precision"],
        **options,
    )


def assert_sampled(folder: Path, callbacks: list[Any], steps: list[int], losses: int | None = None) -> None:
    """Every callback has measured each step; a comparison that measured nothing would say nothing."""
    record = load_run(folder / "log")
    names = {
        GradientTails: "gradient_tails",
        RelativeLoss: "relative_loss",
        ChannelMoments: "channel_moments",
        GradientNoise: "gradient_noise",
    }
    for callback in callbacks:
        if isinstance(callback, Divergence):
            assert callback.step is None
            assert losses is None or len(callback.state_dict()["recent"]) == losses
        else:
            found = record[names[type(callback)]]["step"]
            assert sorted(set(found)) == steps, type(callback)
