"""GradientTails of updates and noise, by groups of layers, and from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.stats
import torch
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normzoo import load_run
from normzoo.callbacks import GradientTails, RelativeLoss


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["gradient_tails"].to_dict("records")


class Steps(pl.Callback):
    """Keeps the parameters around each batch, and each backward pass's own gradient."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, torch.Tensor]] = {}
        self.updates: dict[int, dict[str, torch.Tensor]] = {}
        self.passes: dict[int, list[dict[str, torch.Tensor]]] = {}
        self.held: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        self.before.setdefault(self.step, {n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.held = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        own = {n: p.grad - self.held.get(n, 0) for n, p in pl_module.named_parameters()}
        self.passes.setdefault(self.step, []).append(own)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            now = dict(pl_module.named_parameters())
            self.updates[self.step] = {n: now[n].detach() - p for n, p in self.before[self.step].items()}


def agrees(row: dict[str, Any], values: torch.Tensor, rel: float = 1e-5) -> None:
    x = values.double().numpy().ravel()
    assert row["size"] == x.size
    assert row["max"] == pytest.approx(np.abs(x).max(), rel=rel)
    assert row["l2"] == pytest.approx(np.linalg.norm(x), rel=rel)
    assert row["kurtosis"] == pytest.approx(scipy.stats.kurtosis(x), rel=1e-3, abs=1e-3)
    assert row["q50"] == pytest.approx(np.quantile(np.abs(x), 0.5, method="inverted_cdf"), rel=2**-4 + 100 * rel)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_update_is_what_the_step_adds_to_the_parameters(tmp_path: Path, optimizer: str) -> None:
    steps = Steps()
    options = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_steps": 6}
    trainer(str(tmp_path), callbacks=[steps, GradientTails(2, of="update")], **options).fit(
        SmallNet(optimizer), loader()
    )
    found = rows(tmp_path)
    assert {r["of"] for r in found} == {"update"}
    assert sorted({r["step"] for r in found}) == [0, 2, 4]
    assert len(found) == 3 * len(steps.updates[0])
    for row in found:
        agrees(row, steps.updates[row["step"]][row["layer"]])


@pytest.mark.parametrize("first", [True, False])
def test_updates_are_followed_beside_the_relative_loss_along_them(tmp_path: Path, first: bool) -> None:
    callbacks = [GradientTails(1, of="update"), RelativeLoss(1, along="update")]
    trainer(str(tmp_path), callbacks=callbacks if first else callbacks[::-1], max_steps=3).fit(SmallNet(), loader())
    records = load_run(tmp_path / "log")
    assert records["gradient_tails"]["step"].unique().tolist() == records["relative_loss"]["step"].tolist() == [0, 1, 2]


def test_noise_is_what_the_last_micro_batch_is_off_the_mean(tmp_path: Path) -> None:
    steps, several = Steps(), 4
    options = {"accumulate_grad_batches": several, "max_steps": 4}
    trainer(str(tmp_path), callbacks=[steps, GradientTails(1, of=["noise", "gradient"])], **options).fit(
        SmallNet(), loader()
    )
    found = rows(tmp_path)
    assert {r["of"] for r in found} == {"noise", "gradient"}
    for row in found:
        own = [g[row["layer"]] for g in steps.passes[row["step"]]]  # divided by the number of them
        assert len(own) == several
        if row["of"] == "noise":
            agrees(row, several * own[-1] - sum(own), rel=1e-3)
        else:
            agrees(row, sum(own), rel=1e-4)


def test_noise_of_an_epochs_short_last_step(tmp_path: Path) -> None:
    steps = Steps()
    options = {"accumulate_grad_batches": 3, "max_epochs": 1, "max_steps": -1}
    trainer(str(tmp_path), callbacks=[steps, GradientTails(1, of="noise")], **options).fit(SmallNet(), loader(40))
    row = next(r for r in rows(tmp_path) if r["step"] == 1 and r["layer"] == "net.0.weight")
    first, second = (g["net.0.weight"] for g in steps.passes[1])
    agrees(row, 3 * second - 3 * (first + second) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        ("noise", {}, "at least two micro-batches or ranks, and a step here has one"),
        ("gradients", {}, r"of must be one or more of gradient, update, noise, not 'gradients'"),
        ([], {}, r"of must be one or more of gradient, update, noise, not \[\]"),
    ],
)
def test_sources_that_cannot_be_followed_are_refused(tmp_path: Path, of: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=[GradientTails(of=of)], **options).fit(SmallNet(), loader())


def test_noise_under_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = SmallNet()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match='of="noise" supports automatic optimization only'):
        trainer(str(tmp_path), callbacks=[GradientTails(of="noise")]).fit(module, loader())


def test_a_step_that_a_grad_scaler_skips_has_no_update(tmp_path: Path) -> None:
    class Spoils(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:  # the scaler finds it, and makes no step
                trainer.precision_plugin.scaler._found_inf_per_device(optimizer)[torch.device("cpu")].fill_(1.0)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    run = trainer(str(tmp_path), callbacks=[GradientTails(1, of=["gradient", "update"]), Spoils()], max_steps=3)
    run.strategy.precision_plugin = plugin
    steps = Steps()
    run.callbacks.append(steps)
    run.fit(SmallNet(), loader())
    found = [(r["step"], r["of"]) for r in rows(tmp_path) if r["layer"] == "net.0.weight"]
    assert found == [(0, "gradient"), (0, "update"), (1, "gradient"), (2, "gradient"), (2, "update")]


@pytest.mark.parametrize(
    ("by", "layers"),
    [
        ("module", {"net.0": 72, "net.1": 16, "net.6": 516}),
        (1, {"net": 604}),
        (2, {"net.0": 72, "net.1": 16, "net.6": 516}),
    ],
)
def test_layers_are_grouped(tmp_path: Path, by: Any, layers: dict[str, int]) -> None:
    trainer(str(tmp_path / "a"), callbacks=[GradientTails(1)], max_steps=2).fit(SmallNet(), loader())
    pl.seed_everything(0, verbose=False)
    steps = Steps()
    trainer(str(tmp_path / "b"), callbacks=[steps, GradientTails(1, by=by)], max_steps=2).fit(SmallNet(), loader())
    found = [r for r in rows(tmp_path / "b") if r["step"] == 1]
    assert {r["layer"]: r["size"] for r in found} == layers
    for row in found:
        own = steps.passes[1][0]
        agrees(row, torch.cat([g.flatten() for n, g in own.items() if n.startswith(row["layer"])]), rel=1e-4)
        assert row["counted"] == row["size"] == row["histogram"][:, 1].sum()


def test_several_patterns_choose_parameters(tmp_path: Path) -> None:
    callback = GradientTails(1, parameters=["net.0.*", "*.bias"])
    trainer(str(tmp_path), callbacks=[callback], max_steps=1).fit(SmallNet(), loader())
    assert {r["layer"] for r in rows(tmp_path)} == {"net.0.weight", "net.1.bias", "net.6.bias"}


def test_a_budget_samples_large_parameters_and_keeps_max_and_l2_exact(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    steps = Steps()
    trainer(str(tmp_path), callbacks=[steps, GradientTails(1, budget=64)], max_steps=2).fit(SmallNet(), loader())
    for row in rows(tmp_path):
        g = steps.passes[row["step"]][0][row["layer"]]
        assert row["counted"] == row["histogram"][:, 1].sum() == (g.numel() if g.numel() <= 64 else row["counted"])
        assert row["counted"] <= 72
        assert row["size"] == g.numel()
        assert row["max"] == g.abs().max()
        assert row["l2"] == pytest.approx(float(g.double().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, "budget must be a whole number of at least 16 values, or None for all, not 8"),
        ({"by": "layer"}, "by must be 'parameter', 'module' or a number of parts of the name, not 'layer'"),
        ({"by": 0}, "by must be 'parameter', 'module'"),
        ({"mantissa_bits": 8}, "mantissa_bits must be from 0 to 7"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientTails(**options)


def test_tensorboard_gets_histograms(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="log")
    trainer(str(tmp_path), callbacks=[GradientTails(2)], max_steps=4, logger=logger).fit(SmallNet(), loader())
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"histograms": 0})
    events.Reload()
    written = events.Histograms("gradient_tails/gradient/histogram/net.6.weight")
    assert [e.step for e in written] == [0, 2]
    row = next(r for r in rows(tmp_path) if r["step"] == 2 and r["layer"] == "net.6.weight")
    value = written[1].histogram_value
    assert value.num == row["size"] == 512
    assert row["max"] <= max(-value.min, value.max) <= row["max"] * (1 + 2**-3)
    assert sum(value.bucket) == 512
