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
