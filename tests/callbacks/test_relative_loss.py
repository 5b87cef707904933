"""RelativeLoss against the loss computed by hand along the same step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
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


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_dropout_draws_are_the_same_for_every_multiple(tmp_path: Path, along: str) -> None:
    callbacks = [RelativeLoss(1, multiples=(1e-12, 1.0), along=along)]  # too small to change a parameter
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
    assert row["relative"][row["multiples"] != 0].tolist() == [torch.inf] * 12
    assert (row["headroom"], row["headroom_bound"]) == (1 / 64, "below")


def test_manual_optimization_is_refused_without_a_loss(tmp_path: Path) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="pass loss=, a function of"):
        trainer(str(tmp_path), callbacks=[RelativeLoss()]).fit(Manual(), loader())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_an_iterator_is_refused(tmp_path: Path) -> None:
    class Draws(SmallNet):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match="cannot know the batch of one that draws it from dataloader_iter"):
        trainer(str(tmp_path), callbacks=[RelativeLoss()]).fit(Draws(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiples": ()}, r"at least one value above 0, got \[\]"),
        ({"multiples": (0.0, -1.0)}, r"at least one value above 0, got \[0.0, -1.0\]"),
        ({"multiples": (1.0, float("nan"))}, r"must be finite, got \[1.0, nan\]"),
        ({"multiples": (1.0, float("inf"))}, r"must be finite, got \[1.0, inf\]"),
        ({"multiples": (1.0, 2, 2.0)}, r"must all be different, got \[1.0, 2, 2.0\]"),
        ({"multiples": (1.0, 0, -0.0)}, "must all be different"),
        ({"step_sizes": (-1.0,)}, r"step_sizes must hold at least one value above 0, got \[-1.0\]"),
        ({"multiples": [1.0], "step_sizes": [1.0]}, "as multiples of the step or as step_sizes, not both"),
        ({"quantile": "0.1"}, "quantile must be between 0 and 1, not '0.1'"),
        ({"along": "step"}, "along must be one of 'gradient', 'update', not 'step'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiples": 2}, "multiples must be a list of numbers, not 2"),
        ({"multiples": "12"}, "multiples must be a list of numbers, not '12'"),
        ({"step_sizes": 0.1}, "step_sizes must be a list of numbers, not 0.1"),
        *(({"loss": loss}, "loss must be a function of") for loss in ("mse", 3, [], [None], {"G": min}, [min, 3])),
    ],
)
def test_arguments_of_other_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RelativeLoss(**options)


@pytest.mark.parametrize("returned", [1.0, torch.ones(2), None])
def test_a_loss_is_a_tensor_of_one_value(tmp_path: Path, returned: Any) -> None:
    found = r"one of shape \(2,\)" if isinstance(returned, torch.Tensor) else f"a {type(returned).__name__}"
    with pytest.raises(TypeError, match=f"needs a loss that is a tensor of one value, not {found}"):
        trainer(str(tmp_path), callbacks=[RelativeLoss(loss=lambda *_: returned)]).fit(Plain(), loader())


# The grid and what is logged


def test_the_default_grid_has_zero_and_both_signs_and_costs_13_passes(tmp_path: Path) -> None:
    calls = []

    def loss(module: Plain, batch: Any) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(module.net(batch[0]), batch[1])

    trainer(str(tmp_path), callbacks=[RelativeLoss(2, loss=loss)], max_steps=4).fit(Plain(), loader())
    found = rows(tmp_path)
    assert len(calls) == 13 * len(found) == 26
    for row in found:
        positive = [1 / 64, 1 / 32, 1 / 16, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
        assert row["multiples"].tolist() == [-1.0, -0.125, 0.0, *positive]
        assert row["relative"][2] == 1.0
        assert row["relative"][0] > row["relative"][1] > 1.0 > row["relative"][3]  # along the gradient


def test_the_grid_is_sorted_and_the_curve_is_logged_under_its_multiples(tmp_path: Path) -> None:
    callbacks = [RelativeLoss(1, multiples=[2, -0.5, 0, 1 / 3, 0.123456789])]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=3).fit(Plain(), loader())
    logged = pd.read_csv(tmp_path / "log" / "metrics.csv").dropna(subset="relative_loss/headroom")
    names = ["-0.5", "0", "0.123456789", "0.3333333333333333", "2"]
    assert [c for c in sorted(logged) if c.startswith("relative_loss/")] == [
        *(f"relative_loss/at/{name}" for name in names),
        "relative_loss/headroom",
        "relative_loss/headroom_low",
    ]
    for (_, line), row in zip(logged.iterrows(), rows(tmp_path), strict=True):
        assert row["multiples"].tolist() == [-0.5, 0.0, 0.123456789, 1 / 3, 2.0]
        assert [line[f"relative_loss/at/{name}"] for name in names] == pytest.approx(row["relative"].tolist())
        assert line["relative_loss/headroom"] == pytest.approx(row["headroom"])
        assert line["step"] == row["step"]


@pytest.mark.parametrize("start", [0.0, float("nan"), float("inf")])
def test_a_loss_that_no_other_can_be_relative_to_gives_nan(tmp_path: Path, start: float) -> None:
    losses = iter([start, 1.0, 2.0])
    callback = RelativeLoss(1, multiples=[0, 1, 2], loss=lambda *_: torch.tensor(next(losses)))
    trainer(str(tmp_path), callbacks=[callback], max_steps=1).fit(Plain(), loader())
    [row] = rows(tmp_path)
    assert np.isnan(row["relative"]).all()
    assert np.isnan([row["headroom"], row["headroom_low"]]).all()
    assert pd.isna([row["headroom_bound"], row["headroom_low_bound"]]).all()


def test_a_loss_below_zero_has_the_headroom_of_its_rise(tmp_path: Path) -> None:
    losses = iter([-1.0, -2.0, -1.5, -0.5])
    callback = RelativeLoss(1, multiples=[1, 2, 4], loss=lambda *_: torch.tensor(next(losses)))
    trainer(str(tmp_path), callbacks=[callback], max_steps=1).fit(Plain(), loader())
    [row] = rows(tmp_path)
    assert row["relative"].tolist() == [2.0, 1.5, 0.5]
    assert row["headroom"] == 3.0


# Steps that are not simple


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_a_step_that_moves_nothing_leaves_no_row(tmp_path: Path, along: str) -> None:
    class WarmsUp(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step // 2))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer(str(tmp_path), callbacks=[RelativeLoss(1, along=along)], max_steps=5).fit(WarmsUp(), loader())
    assert [(row["step"], row["lr"]) for row in rows(tmp_path)] == [(2, 0.1), (3, 0.1), (4, 0.2)]


@pytest.mark.parametrize("steps", [2, 16])  # in the first two, all are skipped
def test_a_step_that_the_scaler_skips_is_not_an_update(tmp_path: Path, steps: int) -> None:
    moved: list[int] = []

    class Watches(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.step, self.before = trainer.global_step, [p.detach().clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if any(not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True)):
                moved.append(self.step)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    options: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "max_steps": steps}
    run = trainer(str(tmp_path), callbacks=[RelativeLoss(1, along="update"), Watches()], **options)
    run.fit(Plain(), loader())
    assert (len(moved) > 0) == (steps == 16)
    assert len(moved) < steps
    assert [row["step"] for row in rows(tmp_path)] == moved
    assert not run.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_an_optimizer_that_evaluates_again_is_measured_once_for_each_step(tmp_path: Path, along: str) -> None:
    class Lbfgs(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    trainer(str(tmp_path), callbacks=[RelativeLoss(1, along=along)], max_steps=3).fit(Lbfgs(), loader())
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_each_of_several_optimizers_is_measured_by_itself(tmp_path: Path, along: str) -> None:
    """Where one has made its step, the other's curve starts; the weights end as without the callback."""

    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[1].parameters(), 0.5), torch.optim.SGD(self.net[4].parameters(), 0.05)]

    def loss(module: Two, batch: Any) -> torch.Tensor:
        return F.cross_entropy(module.net(batch[0]), batch[1])

    ends = []
    for folder, callbacks in (("a", []), ("b", [RelativeLoss(1, multiples=[0.5, 1.0], loss=loss, along=along)])):
        torch.manual_seed(0)
        module = Two()
        trainer(str(tmp_path / folder), callbacks=callbacks, max_steps=6).fit(module, loader())
        ends.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
    found = rows(tmp_path / "b")
    assert [(row["step"], row["lr"]) for row in found] == [(i, 0.05 if i % 2 else 0.5) for i in range(6)]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["loss"] * first["relative"][1] == pytest.approx(second["loss"], rel=1e-5)


def test_a_learning_rate_that_is_a_tensor_is_recorded_as_it_was(tmp_path: Path) -> None:
    class Capturable(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.5))
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer(str(tmp_path), callbacks=[RelativeLoss(1, along="update")], max_steps=3).fit(Capturable(), loader())
    assert [row["lr"] for row in rows(tmp_path)] == [0.5, 0.25, 0.125]
