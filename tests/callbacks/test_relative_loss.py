"""RelativeLoss against the loss computed by hand along the same step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader, trainer
from torch import nn

from normzoo import load_run
from normzoo.callbacks import RelativeLoss


class Plain(pl.LightningModule):
    """No random draws, so that the curve can be computed from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
        self.log_calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss, "extra": 1}

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[1].parameters(), "lr": 0.5},
            {"params": [*self.net[2].parameters(), *self.net[4].parameters()], "lr": 0.05},
        ]
        return torch.optim.SGD(groups)


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["relative_loss"].to_dict("records")


def test_the_curve_is_the_loss_along_the_step(tmp_path: Path) -> None:
    multiples = (-1.0, 0.0, 0.5, 1.0, 3.0)

    class ByHand(pl.Callback):
        def __init__(self) -> None:
            self.curves: list[list[float]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.batch = batch

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            x, y = self.batch
            start = F.cross_entropy(copy.deepcopy(pl_module.net)(x), y).item()
            curve = []
            for s in multiples:
                moved = copy.deepcopy(pl_module.net)
                with torch.no_grad():
                    for (name, p), q in zip(moved.named_parameters(), pl_module.net.parameters(), strict=True):
                        p -= s * (0.5 if name.startswith("1.") else 0.05) * q.grad
                curve.append(F.cross_entropy(moved(x), y).item() / start)
            self.curves.append(curve)

    by_hand = ByHand()
    callbacks = [by_hand, RelativeLoss(1, multiples=multiples)]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=5).fit(Plain(), loader())
    found = rows(tmp_path)
    assert len(found) == len(by_hand.curves) == 5
    for row, curve in zip(found, by_hand.curves, strict=True):
        assert row["multiples"].tolist() == list(multiples)
        assert row["relative"] == pytest.approx(curve, rel=1e-5)
        assert row["relative"][1] == 1.0
        assert row["lr"] == 0.5


def test_dropout_draws_are_the_same_for_every_multiple(tmp_path: Path) -> None:
    callbacks = [RelativeLoss(1, multiples=(0.0, 1.0))]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=5).fit(SmallNet(), loader())
    assert [row["relative"][0] for row in rows(tmp_path)] == [1.0] * 5


def test_a_loss_that_is_not_finite_is_written_as_it_is_with_headroom_below(tmp_path: Path) -> None:
    def loss(module: Plain, batch: Any) -> torch.Tensor:
        return module.net[4].weight.sum() * 0 + (torch.inf if module.moved() else 1.0)

    module = Plain()
    start: list[torch.Tensor] = []
    module.moved = lambda: bool(start) and not torch.equal(start[0], module.net[4].weight)  # type: ignore[attr-defined]
    start.append(module.net[4].weight.detach().clone())
    trainer(str(tmp_path), callbacks=[RelativeLoss(1, loss=loss)], max_steps=1).fit(module, loader())
    row = rows(tmp_path)[0]
    assert set(row["relative"]) == {torch.inf}
    assert row["headroom"] == 0.0


def test_manual_optimization_is_refused_without_a_loss(tmp_path: Path) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="pass loss=, a function of"):
        trainer(str(tmp_path), callbacks=[RelativeLoss()]).fit(Manual(), loader())


@pytest.mark.parametrize("multiples", [(), (0.0, -1.0)])
def test_a_grid_needs_a_positive_multiple(multiples: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="at least one value above 0"):
        RelativeLoss(multiples=multiples)
