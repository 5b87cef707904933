"""Modules of many kinds are set up again in a Trainer of their own, and make the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replays_small import Net, run
from torch import nn

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


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [Lazy, Logs, Cycle])
def test_steps_of_modules_of_many_kinds_are_made_again_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    def ask(stage: Stage) -> list[int]:
        for _ in range(2):  # the second time from a state that was kept
            stage.go_to(stage.steps[0])
            for step in stage.steps[:-1]:
                stage.train(step)
                assert np.float32(stage.last_losses).tobytes() == np.float32(stage.frame(step).losses).tobytes()  # type: ignore[arg-type]
        stage.loss(stage.steps[0])
        return stage.steps

    assert len(in_a_fit(load_capsule(run(tmp_path, module=kind())), kind(), ask)) > 4
