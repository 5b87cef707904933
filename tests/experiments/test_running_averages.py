"""The ways to train and to evaluate, against slow twins with torch's own layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from experiments_small import FewImages, SmallTask
from lightning.pytorch import seed_everything
from torch import nn

from normzoo.experiments import RunningAverages
from normzoo.experiments.running_averages import batch_norms
from normzoo.functional import batch_norm
from normzoo.statistics import reestimate_statistics


def small(**options: object) -> RunningAverages:
    seed_everything(0, verbose=False)
    options = {"steps": 4, "batch_sizes": (1, 8, 64), "draws": 2, "reestimate_batches": 3, **options}
    return RunningAverages(FewImages(), SmallTask(), **options)  # type: ignore[arg-type]


def rows(of: RunningAverages, **part: object) -> pd.DataFrame:
    seed_everything(9, verbose=False)
    return pd.DataFrame(of.rows(part))


@pytest.fixture(scope="module")
def prepared() -> RunningAverages:
    of = small()
    of.prepare()
    return of


def test_training_is_that_of_a_plain_loop(prepared: RunningAverages) -> None:
    twin = copy.deepcopy(prepared.task).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step, (images, labels) in zip(range(4), prepared._batches(), strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
        loss = F.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = rows(prepared, training="batch statistics")
    assert found["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert found["training_step"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(twin.state_dict(), prepared.trained.state_dict())


def test_accuracies_by_the_batch_are_those_of_the_formula(prepared: RunningAverages) -> None:
    found = rows(prepared, draw=1).set_index("evaluation")
    seed_everything(9, verbose=False)
    order = torch.randperm(64)

    class Formula(nn.Module):
        def __init__(self, layer: nn.BatchNorm2d) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return batch_norm(x, None, None, self.layer.weight, self.layer.bias, training=True)

    twin = copy.deepcopy(prepared.trained)
    for i, layer in enumerate(twin.net):
        if isinstance(layer, nn.BatchNorm2d):
            twin.net[i] = Formula(layer)
    with torch.no_grad():
        brute = [
            sum(
                (twin(prepared.images[chosen]).argmax(1) == prepared.labels[chosen]).sum().item()
                for chosen in order.split(b)
            )
            / 64
            for b in (1, 8, 64)
        ]
    assert found.loc["tested on batch statistics", "batch_size"] == [1.0, 8.0, 64.0]
    assert found.loc["tested on batch statistics", "accuracy"] == pytest.approx(brute)


def test_the_other_accuracies_are_those_of_evaluation(prepared: RunningAverages) -> None:
    found = rows(prepared, draw=1).set_index("evaluation")
    network = copy.deepcopy(prepared.trained).eval()
    for by in ("running averages", "re-estimated averages"):
        if by == "re-estimated averages":
            reestimate_statistics(network, prepared._batches(1_000_001), num_batches=3)
        with torch.no_grad():
            accuracy = (network(prepared.images).argmax(1) == prepared.labels).double().mean().item()
        assert found.loc[f"tested on {by}", "accuracy"] == [accuracy] * 2
        assert found.loc[f"tested on {by}", "batch_size"] == [1.0, 64.0]


def test_a_draw_leaves_the_trained_network_as_it_was(prepared: RunningAverages) -> None:
    before = copy.deepcopy(prepared.trained.state_dict())
    rows(prepared, draw=0)
    rows(prepared, training="running averages")
    torch.testing.assert_close(prepared.trained.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["running averages", "frozen averages"])
def test_training_on_averages_takes_them_as_constants(prepared: RunningAverages, way: str) -> None:
    """The twin normalizes by hand, with averages that have no gradient."""
    start = copy.deepcopy(prepared.task)
    reestimate_statistics(start, prepared._batches(999_999), num_batches=3)
    twin = copy.deepcopy(start)

    class ByHand(nn.Module):
        def __init__(self, layer: nn.BatchNorm2d) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
            self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if way == "running averages":
                channels = x.detach().transpose(0, 1).flatten(1)
                self.mean = 0.9 * self.mean + 0.1 * channels.mean(1)
                self.var = 0.9 * self.var + 0.1 * channels.var(1)
            scale = self.weight / (self.var + self.eps).sqrt()
            return (x - self.mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]

    for i, layer in enumerate(twin.net):
        if isinstance(layer, nn.BatchNorm2d):
            twin.net[i] = ByHand(layer)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step, (images, labels) in zip(range(4), prepared._batches(), strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
        loss = F.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = rows(prepared, training=way)
    assert found["loss"].dropna().tolist() == pytest.approx(losses, rel=1e-3)
    assert found["evaluation"].dropna().tolist() == [f"tested on {way}"]


def test_a_diverged_training_ends_and_says_when() -> None:
    of = small()
    of.task.lr = 1e4  # type: ignore[assignment]
    of.prepare()
    found = rows(of, training="frozen averages")
    [diverged] = found["diverged"].dropna()
    assert found.loc[found["diverged"] == diverged, "training_step"].tolist() == [diverged]
    assert 0 < diverged < 4
    assert found["training_step"].max() == diverged


def test_a_resumed_run_reads_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small()
    first.folder = tmp_path
    first.prepare()
    again = small()
    again.folder = tmp_path
    monkeypatch.setattr(again, "_train", lambda *_: pytest.fail("it was trained again"))
    again.prepare()
    torch.testing.assert_close(again.trained.state_dict(), first.trained.state_dict(), rtol=0, atol=0)
    assert again.losses == first.losses
    pd.testing.assert_frame_equal(rows(again, draw=0), rows(first, draw=0))
    assert [path.name for path in tmp_path.iterdir()] == ["trained.pt"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no batch normalization; give it some, as by model\.norm=batch"):
        RunningAverages(FewImages(), SmallTask(norm=False))
    assert len(batch_norms(SmallTask())) == 2
    with pytest.raises(ValueError, match="batch_sizes must divide the 64 test images, which 3 does not"):
        small(batch_sizes=(1, 3)).prepare()
    for option in ("steps", "draws", "reestimate_batches"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, not 0"):
            small(**{option: 0})
    with pytest.raises(ValueError, match="batch_sizes must be at least 1"):
        small(batch_sizes=())
