"""configure_optimizers may return None: what can be measured is, and all else says so before training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, loader, trainer

from normzoo import load_run
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    GradientNoise,
    GradientPredictiveness,
    GradientTails,
    LossAbove,
    RelativeLoss,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")


class WithoutOptimizer(SmallNet):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch_idx < 3, "training went on"
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return None


def test_what_needs_no_optimizer_is_measured(tmp_path: Path) -> None:
    callbacks = [Divergence(rules=[LossAbove(1e-9)]), ChannelMoments(1)]
    made = trainer(str(tmp_path), callbacks=callbacks, max_steps=3)
    made.fit(WithoutOptimizer(), loader())
    frames = load_run(tmp_path / "log")
    assert made.global_step == 3
    assert frames["divergence"]["step"].tolist() == [0]
    assert frames["channel_moments"]["step"].tolist() == [0, 1, 2]


def no_loss(module: Any, batch: Any) -> torch.Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("callback", "manual"),
    [
        (lambda: GradientTails(1), False),
        (lambda: GradientTails(1), True),
        (lambda: GradientTails(1, of="update"), False),
        (lambda: GradientTails(1, of="noise"), False),
        (lambda: GradientNoise(1), False),
        (lambda: GradientNoise(1, split=2), False),
        (lambda: RelativeLoss(1), False),
        (lambda: RelativeLoss(1, loss=no_loss), True),
        (lambda: RelativeLoss(1, along="update"), False),
        (lambda: GradientPredictiveness(1), False),
    ],
)
def test_what_measures_steps_says_that_there_are_none(tmp_path: Path, callback: Any, manual: bool) -> None:
    made = callback()
    name = type(made).__name__
    message = f"{name} measures the steps of an optimizer, and configure_optimizers returned none that has parameters"
    fitter = trainer(str(tmp_path), callbacks=[made], max_steps=3, accumulate_grad_batches=1 if manual else 2)
    with pytest.raises(ValueError, match=f"^{message}; return an optimizer from it, or leave {name} out$"):
        fitter.fit(WithoutOptimizer(manual), loader())
    assert fitter.global_step == 0
