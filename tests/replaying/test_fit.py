"""Modules of many kinds are set up again in a Trainer of their own, and make the same steps."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from replays_small import Net, run
from torch import nn
from torch.utils.data import DataLoader

from normzoo import load_capsule
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage


class Lazy(Net):
    """Its layers have no shapes before the first batch."""

    def __init__(self) -> None:
        super().__init__("SGD")
        self.net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


class Logs(Net):
    """Calls its logger in a step, and knows whether there is one."""

    def on_train_start(self) -> None:
        self.logger.log_metrics({"started": 1.0})

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        assert self.trainer.loggers
        self.logger.experiment.log_metrics({"batch": batch_idx}, step=self.global_step)
        return super().training_step(batch, batch_idx)


class Cycle(Net):
    """Its schedule has as many steps as the run, and refuses more."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(pl.LightningDataModule):
    """Knows of its classes when it is set up."""

    classes: list[int]

    def setup(self, stage: str) -> None:
        self.classes = [0, 1, 2]

    def train_dataloader(self) -> Any:
        return DataLoader([(torch.randn(1, 6, 6), k % 3) for k in range(160)], 8)


class AsksData(Net):
    """Makes a layer for as many classes as the data has, and asks again in each step."""

    def setup(self, stage: str) -> None:
        self.net[-1] = nn.Linear(4 * 36, len(self.trainer.datamodule.classes))  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        x, y = batch
        return super().training_step((x, y % len(self.trainer.datamodule.classes)), batch_idx)  # type: ignore[attr-defined]


def test_a_module_can_ask_the_data_module_that_a_replay_is_given(tmp_path: Path) -> None:
    capsule = load_capsule(run(tmp_path, module=AsksData(), data=Data()))
    assert capsule.about["settings"]["datamodule"] == f"{__name__}:Data"
    assert len(in_a_fit(capsule, AsksData(), same_steps, datamodule=Data())) > 4


def test_a_module_of_the_other_package_of_lightning_is_trained_by_its_trainer(tmp_path: Path) -> None:
    def ask(stage: Stage) -> list[str]:
        same_steps(stage)
        return [type(stage.trainer).__module__.split(".")[0]]

    capsule = load_capsule(run(tmp_path, gradient_clip_val=0.5))
    assert in_a_fit(capsule, OfTheOtherPackage(), ask) == ["pytorch_lightning"]


class OfTheOtherPackage(pytorch_lightning.LightningModule):
    """The network of the runs."""

    def __init__(self) -> None:
        super().__init__()
        own = Net()
        self.net, self.scale = own.net, own.scale
        self.optimizer, self.rate = own.optimizer, own.rate

    forward, training_step, configure_optimizers = Net.forward, Net.training_step, Net.configure_optimizers


def test_signals_do_what_they_did_before(tmp_path: Path) -> None:
    """Under a Trainer SIGTERM waits for the end of a batch, which a replay comes to after minutes."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    capsule = load_capsule(run(tmp_path))
    assert in_a_fit(capsule, Net(), lambda stage: [signal.getsignal(number) for number in signals]) == before
    assert [signal.getsignal(number) for number in signals] == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [Lazy, Logs, Cycle])
def test_steps_of_modules_of_many_kinds_are_made_again_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    assert len(in_a_fit(load_capsule(run(tmp_path, module=kind())), kind(), same_steps)) > 4


def same_steps(stage: Stage) -> list[int]:
    """Make all steps again, twice, and compare the losses."""
    for _ in range(2):  # the second time from a state that was kept
        stage.go_to(stage.steps[0])
        for step in stage.steps[:-1]:
            stage.train(step)
            assert np.float32(stage.last_losses).tobytes() == np.float32(stage.frame(step).losses).tobytes()  # type: ignore[arg-type]
    stage.loss(stage.steps[0])
    return stage.steps
