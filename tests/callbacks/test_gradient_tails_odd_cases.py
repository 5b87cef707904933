"""GradientTails of models and steps that are out of the ordinary."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from torch import nn

from normzoo import load_run
from normzoo.callbacks import GradientTails

ALL = ["gradient", "update", "noise"]


class Plain(pl.LightningModule):
    """Squares of what a network makes of the images."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0].flatten(1)).abs().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: pl.LightningModule, callback: GradientTails, **options: Any) -> list[dict[str, Any]]:
    options = {"max_steps": 4, "accumulate_grad_batches": 2, **options}
    trainer(str(folder), callbacks=[callback], **options).fit(module, loader())
    return load_run(folder / "log")["gradient_tails"].to_dict("records")


@pytest.mark.parametrize("bits", [0, 1, 7])
def test_one_parameter_at_any_number_of_mantissa_bits(tmp_path: Path, bits: int) -> None:
    found = fit(tmp_path, Plain(nn.Linear(64, 1, bias=False)), GradientTails(1, mantissa_bits=bits))
    assert [r["step"] for r in found] == [0, 1, 2, 3]
    assert all(r["counted"] == 64 and r["max"] > 0 for r in found)


def test_a_model_that_is_made_in_configure_model(tmp_path: Path) -> None:
    class Late(Plain):
        def configure_model(self) -> None:
            self.net = nn.Linear(64, 1) if self.net is None else self.net

    assert {r["layer"] for r in fit(tmp_path, Late(), GradientTails(1))} == {"net.weight", "net.bias"}


def test_a_layer_that_is_thawed_later(tmp_path: Path) -> None:
    class Thaws(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx >= 4)

    module = Thaws(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 1)))
    module.net[0].requires_grad_(False)
    assert {r["step"] for r in fit(tmp_path, module, GradientTails(1, parameters="net.0.*"))} == {2, 3}


def test_a_layer_that_joins_and_one_that_leaves(tmp_path: Path) -> None:
    class Grows(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            if batch_idx == 4:  # the first layer from now on, after the other in the optimizer
                self.net = nn.Sequential(nn.Linear(64, 64, bias=False), *self.net)
                optimizer.add_param_group({"params": [*self.net[0].parameters()]})
            if batch_idx == 6:
                del optimizer.param_groups[0]

    found = fit(tmp_path, Grows(nn.Sequential(nn.Linear(64, 1))), GradientTails(1))
    of_steps = [[r["layer"] for r in found if r["step"] == step] for step in range(4)]
    old, new = ["net.0.weight", "net.0.bias"], ["net.0.weight", "net.1.weight", "net.1.bias"]
    assert of_steps == [old, old, new, ["net.0.weight"]]


def test_complex_parameters_are_measured_in_both_parts(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 3, dtype=torch.cfloat))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.cfloat) @ self.weight

    class Keeps(GradientTails):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients.append(pl_module.net.weight.grad.clone())
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    gradients: list[torch.Tensor] = []
    found = fit(tmp_path, Plain(Complex()), Keeps(1, of=ALL))
    assert {r["size"] for r in found} == {2 * 64 * 3}
    for row in (r for r in found if r["of"] == "gradient"):
        assert row["l2"] == pytest.approx(float(gradients[row["step"]].norm()), rel=1e-5)


def test_sparse_gradients_and_parameters_without_values(tmp_path: Path) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)
            self.empty = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table((x.abs() * 10).long().clamp(max=49)) + self.empty.sum()

    found = fit(tmp_path, Plain(Looks()), GradientTails(1, of=ALL))
    assert {(r["of"], r["layer"]) for r in found} == {(of, "net.table.weight") for of in ALL}
    assert all(math.isfinite(r["max"]) and r["l2"] > 0 for r in found)


def test_noise_of_a_parameter_that_the_last_micro_batch_does_not_use_is_minus_the_mean(tmp_path: Path) -> None:
    class Sometimes(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = self.net[0](batch[0].flatten(1))
            return (x if batch_idx % 2 else self.net[1](x)).square().mean()

    module = Sometimes(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 1)))
    rows = {(r["of"], r["layer"], r["step"]): r for r in fit(tmp_path, module, GradientTails(1, of=ALL))}
    for step in range(4):
        noise, mean = (rows[of, "net.1.weight", step] for of in ("noise", "gradient"))
        assert noise["l2"] == pytest.approx(mean["l2"], rel=1e-5)


def test_a_step_of_one_micro_batch_has_no_noise(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 3}
    found = fit(tmp_path, SmallNet(), GradientTails(1, of=["gradient", "noise"]), **options)
    assert {r["step"] for r in found if r["of"] == "gradient"} == {0, 1}
    assert {r["step"] for r in found if r["of"] == "noise"} == {0}


def test_all_optimizers_are_sampled_and_their_hooks_removed(tmp_path: Path) -> None:
    module, options = TwoOptimizers(), {"max_steps": 12, "accumulate_grad_batches": 1}
    found = fit(tmp_path, module, GradientTails(2, of=["gradient", "update"]), **options)
    assert {r["layer"].split(".")[1] for r in found if r["of"] == "update"} == {"0", "1", "6"}
    for optimizer in module.optimizers():
        assert not optimizer.optimizer._optimizer_step_post_hooks


def test_nothing_is_kept_after_training(tmp_path: Path) -> None:
    class Stops(SmallNet):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = batch_idx == 2

    callback = GradientTails(1, of=ALL)
    fit(tmp_path, Stops(), callback, max_steps=50)
    kept = (callback._step, callback._backward, callback._post_hook, callback._pending)
    assert kept == (None, None, None, [])


def test_a_module_that_its_parameters_refer_to_is_freed_after_training(tmp_path: Path) -> None:
    module = SmallNet()
    for p in module.parameters():
        p.owner = module
    fit(tmp_path, module, GradientTails(1))
    alive = weakref.ref(module)
    del module, p
    gc.collect()
    assert alive() is None


def test_a_dry_run_leaves_the_record_of_the_run_before(tmp_path: Path) -> None:
    """Under fast_dev_run Lightning logs nothing, and its steps would hide those on record."""
    options: dict[str, Any] = {"logger": False, "max_steps": 3}
    trainer(str(tmp_path), callbacks=[GradientTails(1)], **options).fit(SmallNet(), loader())
    trainer(str(tmp_path), callbacks=[GradientTails(1)], **options, fast_dev_run=2).fit(SmallNet(), loader())
    assert sorted(set(load_run(tmp_path)["gradient_tails"]["step"])) == [0, 1, 2]


@pytest.mark.parametrize("size", [100, 10_000])
def test_infinite_gradients_have_an_infinite_norm(tmp_path: Path, size: int) -> None:
    class Spoils(Plain):
        def on_after_backward(self) -> None:
            self.net.weight.grad[0, 0] = -math.inf

    (row,) = fit(tmp_path, Spoils(nn.Linear(64, size // 64 + 1, bias=False)), GradientTails(1), max_steps=1)
    assert row["l2"] == row["max"] == math.inf
    assert row["nonfinite"] == 1
    assert np.isnan(row["kurtosis"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 16.5}, "budget must be a whole number of at least 16 values, or None for all, not 16.5"),
        ({"budget": "x"}, "budget must be a whole number"),
        ({"mantissa_bits": 2.0}, "mantissa_bits must be a whole number, not 2.0"),
        ({"by": True}, "by must be 'parameter', 'module' or a number of parts of the name, not True"),
        ({"parameters": []}, "parameters must be one or more patterns of names"),
        ({"budget": 100, "by": "module"}, "a budget takes as much of a small parameter as of a large one"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientTails(**options)
