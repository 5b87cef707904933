"""The gradient at the logits against (softmax - target) / B, and what the measurement refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normzoo import load_run, watch
from normzoo.callbacks import ClassGradients


class Logits(SmallNet):
    """A linear classifier, which keeps the logits of what it trains on, in float64, and the labels."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        self.kept: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        weight, bias = self.net[1].weight.detach().double(), self.net[1].bias.detach().double()
        self.kept.append((F.linear(x.flatten(1).double(), weight, bias), y))
        return super().training_step(batch, batch_idx)


def recorded(folder: Path, module: pl.LightningModule, *given: ClassGradients, **options: Any) -> pd.DataFrame:
    options = {"max_steps": 1} | options
    data = options.pop("data", None) or loader()
    trainer(str(folder), callbacks=[*given], **options).fit(module, data)
    return load_run(folder / "log")["class_gradients"]


def expected(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(logits)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_are_those_of_cross_entropy(tmp_path: Path, accumulated: int) -> None:
    module = Logits()
    record = recorded(
        tmp_path, module, ClassGradients(2), max_steps=3, accumulate_grad_batches=accumulated, gradient_clip_val=1e-3
    )
    assert record["step"].unique().tolist() == [0, 2]
    for step in (0, 2):
        logits, labels = module.kept[(step + 1) * accumulated - 1]  # the last micro-batch of the step
        rows = record[record["step"] == step]
        assert rows["image"].tolist() == [image for image in range(8) for _ in range(4)]
        assert rows["class"].tolist() == [*range(4)] * 8
        found = torch.tensor(rows["gradient"].to_numpy()).view(8, 4)
        torch.testing.assert_close(found, expected(logits, labels), atol=1e-7, rtol=1e-5)
        assert rows["true"].tolist() == F.one_hot(labels, 4).bool().flatten().tolist()


def test_the_largest_share_of_images_led_by_one_class_stands_in_the_first_row(tmp_path: Path) -> None:
    module = Logits()
    with torch.no_grad():
        module.net[1].weight.zero_()
        module.net[1].bias.copy_(torch.tensor([0.0, 40.0, 0.0, 0.0]))
    record = recorded(tmp_path, module, ClassGradients(1, images=3))
    [labels] = [labels for _, labels in module.kept]
    assert record["led"].tolist()[:1] == [1 - (labels == 1).double().mean().item()]  # of all eight images
    assert record["led"].isna().tolist() == [False, *[True] * 11]
    assert record["image"].max() == 2


def test_a_class_leads_from_near_on(tmp_path: Path) -> None:
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0])  # softmax 0.71
    for near, led in ((0.7, 1.0), (0.72, 0.0)):
        module = Logits()
        with torch.no_grad():
            module.net[1].weight.zero_()
            module.net[1].bias.copy_(logits)
        data = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.full((8,), 1)), 8)
        record = recorded(tmp_path / str(near), module, ClassGradients(1, near=near), data=data)
        assert record["led"][0] == led


class Unlabelled(SmallNet):
    """Trained on batches of another form."""

    def __init__(self, of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.of = of

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.of(batch), batch_idx)


@pytest.mark.parametrize("kind", ["soft", "alone", "of another length"])
def test_without_labels_nothing_is_known_of_the_true_class(tmp_path: Path, kind: str) -> None:
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))
    sets: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "soft": (TensorDataset(x, F.one_hot(y, 4).float()), lambda batch: (batch[0], batch[1].argmax(1))),
        "alone": (x, lambda batch: (batch, torch.zeros(len(batch), dtype=torch.int64))),
        "of another length": (TensorDataset(x, torch.stack([y, y], 1)), lambda batch: (batch[0], batch[1][:, 0])),
    }
    data, of = sets[kind]
    record = recorded(tmp_path, Unlabelled(of), ClassGradients(1), data=DataLoader(data, 8))
    assert len(record) == 32
    assert record["true"].isna().all()


class InPlace(SmallNet):
    """Divides the logits in place by a temperature."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        logits /= 2
        return F.cross_entropy(logits, batch[1])


def test_logits_may_be_changed_in_place(tmp_path: Path) -> None:
    record = recorded(tmp_path, InPlace(), ClassGradients(1))
    sums = record.groupby("image")["gradient"].sum().abs()
    assert (sums < 1e-7).all()
    assert record["gradient"].abs().max() <= 0.5 / 8


def test_a_compiled_network_is_listened_to(tmp_path: Path) -> None:
    frames = []
    for compiled in (False, True):
        module = Logits()
        torch.manual_seed(0)
        nn.init.normal_(module.net[1].weight)
        nn.init.zeros_(module.net[1].bias)
        if compiled:
            module.net.compile(backend="eager")
        frames.append(recorded(tmp_path / str(compiled), module, ClassGradients(1)))
    pd.testing.assert_frame_equal(*frames)


def test_a_plain_loop_gives_its_loss(tmp_path: Path) -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(6, 3), torch.randint(0, 5, (6,))
    start = model(x).detach().double()
    measurement = ClassGradients(1, loss=lambda model, batch: F.cross_entropy(model[0](batch[0]), batch[1]))
    whole = nn.Sequential(model)
    with watch(whole, optimizer, measurement, dirpath=tmp_path) as watching:
        watching.batch((x, y))
        F.cross_entropy(whole(x), y).backward()
        optimizer.step()
    found = load_run(tmp_path)["class_gradients"]["gradient"].to_numpy().reshape(6, 5)
    assert found == pytest.approx(expected(start, y).numpy(), abs=1e-7)


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": 0}, ValueError, "images must be a whole number of at least 1, not 0"),
        ({"images": 2.5}, ValueError, "images must be a whole number"),
        ({"near": 0.5}, ValueError, "near must be above 0.5 and at most 1, not 0.5"),
        ({"near": 1.5}, ValueError, "near must be above 0.5"),
        ({"loss": 3}, TypeError, r"loss must be a function of \(module, batch\), or None, not 3"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClassGradients(1, **options)


class NoLinear(SmallNet):
    """Ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())


class Unused(SmallNet):
    """Has a linear layer last that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(2, 2)


class Beside(SmallNet):
    """Calls a linear layer whose output the loss does not depend on."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.net(batch[0])
        return self.net[0].weight.square().sum()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (NoLinear, {}, r"the last torch\.nn\.Linear returns .* the model has none; pass logits="),
        (SmallNet, {"logits": "head"}, r"logits names the module 'head', and there is none; there are net, net\.0"),
        (SmallNet, {"logits": "net.0"}, r"net\.0 returns a torch\.float32 of shape \(8, 8, 8, 8\); pass logits="),
        (Unused, {}, r"takes what auxiliary returns .* the loss was computed without it; pass logits="),
        (Beside, {}, r"takes what net\.6 returns .* the loss does not depend on it; pass logits="),
        (TwoOptimizers, {}, "pass loss=, a function of"),
    ],
)
def test_runs_without_such_logits_are_refused(
    tmp_path: Path, module: type[pl.LightningModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path, module(), ClassGradients(1, **options))


def test_logits_are_named(tmp_path: Path) -> None:
    record = recorded(tmp_path, NoLinear(), ClassGradients(1, logits="net.1"))
    assert len(record) == 32
