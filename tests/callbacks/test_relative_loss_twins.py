"""Both directions against a training loop of the test's own, in float64: the step, the curve, the headroom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import images, trainer
from sweeps import cells
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normzoo import load_run
from normzoo.callbacks import RelativeLoss
from normzoo.functional import bounded_headroom

MULTIPLES = [-2.0, -0.5, 0.0, 0.25, 1.0, 4.0, 32.0]
STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double()


def groups(net: nn.Module) -> list[dict[str, Any]]:
    weights, others = ([p for p in net.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    return [{"params": weights, "lr": 0.3}, {"params": others, "lr": 0.02, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda g: torch.optim.SGD(g, momentum=0.9, weight_decay=0.01),
    "adamw": lambda g: torch.optim.AdamW(g, weight_decay=0.1),
}


class Module(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = network(), optimizer

    def training_step(self, batch: Any) -> Tensor:  # Lightning lets the index be left out
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](groups(self.net))


def loader(micro: int) -> DataLoader:
    x, y = images(micro * STEPS * 8).tensors
    return DataLoader(TensorDataset(x.double(), y), batch_size=8)


def curve(net: nn.Module, batch: Any, origin: list[Tensor], step: list[Tensor]) -> list[float]:
    losses = []
    for s in [0.0, *MULTIPLES]:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, p0, u in zip(moved.parameters(), origin, step, strict=True):
                p.copy_(p0 - s * u)
            losses.append(F.cross_entropy(moved(batch[0]), batch[1]).item())
    return losses


def by_hand(optimizer: str, clip: float | None, micro: int, along: str) -> Iterator[tuple[nn.Module, list[float]]]:
    net = network()
    made = OPTIMIZERS[optimizer](groups(net))
    params = list(net.parameters())
    batches = iter(loader(micro))
    for _ in range(STEPS):
        made.zero_grad()
        for _ in range(micro):
            batch = next(batches)
            (F.cross_entropy(net(batch[0]), batch[1]) / micro).backward()
        origin = [p.detach().clone() for p in params]
        lr = {p: group["lr"] for group in made.param_groups for p in group["params"]}
        step = [lr[p] * p.grad for p in params]
        if along == "gradient":
            losses = curve(net, batch, origin, step)
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        made.step()
        if along == "update":
            losses = curve(net, batch, origin, [p0 - p.detach() for p0, p in zip(origin, params, strict=True)])
        yield net, losses


PAIRS = [  # each two values of two axes are in one of them
    ("sgd", None, 1, "gradient"),
    ("sgd", None, 1, "update"),
    ("sgd", 0.05, 3, "update"),
    ("adamw", None, 3, "update"),
    ("adamw", 0.05, 1, "gradient"),
    ("adamw", 0.05, 3, "gradient"),
]


@pytest.mark.parametrize(
    ("optimizer", "clip", "micro", "along"),
    cells(OPTIMIZERS, [None, 0.05], [1, 3], ["gradient", "update"], fast=PAIRS),
)
def test_the_curve_is_that_of_a_loop_by_hand(
    tmp_path: Path, optimizer: str, clip: float | None, micro: int, along: str
) -> None:
    module = Module(optimizer)
    callback = RelativeLoss(1, multiples=MULTIPLES, along=along)
    options: dict[str, Any] = {"max_steps": STEPS, "gradient_clip_val": clip, "accumulate_grad_batches": micro}
    trainer(str(tmp_path), callbacks=[callback], **options).fit(module, loader(micro))
    rows = load_run(tmp_path / "log")["relative_loss"].to_dict("records")
    assert len(rows) == STEPS
    for step, (net, losses) in enumerate(by_hand(optimizer, clip, micro, along)):  # noqa: B007 - the last is used
        row = rows[step]
        want = [loss / losses[0] for loss in losses[1:]]
        assert (row["step"], row["along"], row["lr"]) == (step, along, 0.3)
        assert row["multiples"].tolist() == MULTIPLES
        assert row["relative"].tolist() == pytest.approx(want, rel=2e-6), step
        assert row["relative"][2] == 1.0
        assert row["loss"] == pytest.approx(losses[0], rel=1e-6)
        assert row["headroom"] == pytest.approx(bounded_headroom(MULTIPLES, want).value, rel=1e-3)
    assert step == STEPS - 1
    torch.testing.assert_close(module.net.state_dict(), net.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("along", ["gradient", "update"])
@pytest.mark.parametrize("tensor", [False, True])
def test_step_sizes_are_multiples_in_units_of_the_learning_rate(tmp_path: Path, along: str, tensor: bool) -> None:
    """Of the first parameter group, in each step anew, here one that a schedule halves after each step."""

    class Halved(Module):
        def configure_optimizers(self) -> Any:
            first, second = groups(self.net)
            lr = torch.tensor(0.3) if tensor else 0.3
            optimizer = torch.optim.SGD([{**first, "lr": lr}, second], momentum=0.9)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    sizes, found = [-0.1, 0.0, 0.01, 0.2, 1.5], {}
    arguments: dict[str, dict[str, Any]] = {"sizes": {"step_sizes": sizes}, "plain": {"multiples": [-1.0, 0.0, 1.0]}}
    for name, options in arguments.items():
        callback = RelativeLoss(1, along=along, **options)
        trainer(str(tmp_path / name), callbacks=[callback], max_steps=3).fit(Halved("sgd"), loader(1))
        found[name] = load_run(tmp_path / name / "log")["relative_loss"]
    rows = found["sizes"].to_dict("records")
    assert [row["lr"] for row in rows] == pytest.approx([0.3, 0.15, 0.075], rel=1e-6)
    for row in rows:
        assert row["multiples"] * row["lr"] == pytest.approx(sizes, rel=1e-9)
        # The same points, asked for as multiples at that step
        same = RelativeLoss(1, along=along, multiples=row["multiples"].tolist())
        folder = tmp_path / f"same-{row['step']}"
        trainer(str(folder), callbacks=[same], max_steps=3).fit(Halved("sgd"), loader(1))
        other = load_run(folder / "log")["relative_loss"].to_dict("records")[row["step"]]
        assert row["relative"].tolist() == pytest.approx(other["relative"].tolist(), rel=1e-6)
        assert row["headroom"] == pytest.approx(other["headroom"], rel=1e-4)
        assert row["headroom_bound"] == other["headroom_bound"]
    assert found["sizes"]["loss"].tolist() == found["plain"]["loss"].tolist()  # the run is not changed


def test_step_sizes_without_a_unit_leave_no_row(tmp_path: Path) -> None:
    """The first group has a learning rate of 0, and the second one moves."""

    class Still(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            first, second = groups(self.net)
            return torch.optim.SGD([{**first, "lr": 0.0}, second])

    arguments: list[tuple[str, dict[str, Any], int]] = [
        ("sizes", {"step_sizes": [0.1]}, 0),
        ("multiples", {"multiples": [1.0]}, 2),
    ]
    for name, options, expected in arguments:
        callback = RelativeLoss(1, **options)
        trainer(str(tmp_path / name), callbacks=[callback], max_steps=2).fit(Still("sgd"), loader(1))
        record = load_run(tmp_path / name / "log").get("relative_loss")
        assert (0 if record is None else len(record)) == expected


def test_the_two_directions_agree_where_the_update_is_the_gradient(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    frames = {}
    for along in ("gradient", "update"):
        callbacks = [RelativeLoss(1, along=along)]
        trainer(str(tmp_path / along), callbacks=callbacks, max_steps=STEPS).fit(Plain("sgd"), loader(1))
        frames[along] = load_run(tmp_path / along / "log")["relative_loss"]
    assert len(frames["gradient"]) == STEPS
    for a, b in zip(frames["gradient"]["relative"], frames["update"]["relative"], strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-6)
    assert (frames["gradient"]["headroom"] - frames["update"]["headroom"]).abs().max() < 1e-3
