"""With every callback on, a run is bit for bit the run without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer

from normzoo.callbacks import ChannelMoments, Divergence, GradientNoise, GradientTails, RelativeLoss


def fit(folder: Path, callbacks: list[Any], optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module = SmallNet(optimizer)
    run = trainer(str(folder), callbacks=callbacks, **options)
    run.fit(module, loader())
    return {
        "weights and buffers": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": run.optimizers[0].state_dict(),
        "logged": dict(run.callback_metrics),
        "plain attributes": (module.calls, list(module.seen)),
        "random streams": (torch.rand(3), random.random(), np.random.rand()),
        "steps": run.global_step,
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_equal(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def all_callbacks(options: dict[str, Any]) -> list[Any]:
    moments = ChannelMoments(1, sites=["norms", "net.*"], where="both")
    noise = [GradientNoise(1)] if "accumulate_grad_batches" in options else []
    return [GradientTails(1), RelativeLoss(1), Divergence(stop=True), moments, *noise]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulate", "clip", "bf16"],
)
def test_a_run_is_the_same_with_all_callbacks(tmp_path: Path, optimizer: str, options: dict[str, Any]) -> None:
    without = fit(tmp_path / "a", [], optimizer, options)
    with_all = fit(tmp_path / "b", all_callbacks(options), optimizer, options)
    assert_equal(without, with_all)
    assert without["steps"] == 20
    written = {p.name for p in (tmp_path / "b" / "log").iterdir()}
    names = ["gradient_tails", "relative_loss", "divergence", "channel_moments"]
    names += ["gradient_noise"] if "accumulate_grad_batches" in options else []
    assert {f"{name}-000.arrows" for name in names} <= written


def test_the_comparison_notices_a_perturbation(tmp_path: Path) -> None:
    class Draws(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.rand(1)

    without = fit(tmp_path / "a", [], "sgd", {})
    with_draws = fit(tmp_path / "b", [Draws()], "sgd", {})
    with pytest.raises(AssertionError):
        assert_equal(without, with_draws)


def test_a_user_function_that_raises_leaves_the_parameters(tmp_path: Path) -> None:
    calls = []

    def loss(module: pl.LightningModule, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("from the user's loss")
        module.net[1].running_mean.add_(1.0)
        return module.net(batch[0]).square().mean()

    class Remember(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}

    remember, module = Remember(), SmallNet()
    run = trainer(str(tmp_path), callbacks=[remember, RelativeLoss(1, loss=loss)])
    with pytest.raises(RuntimeError, match="from the user's loss"):
        run.fit(module, loader())
    assert_equal(remember.state, dict(module.state_dict()))
    assert "log" not in vars(module)
