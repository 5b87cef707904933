"""With every callback on, a run is bit for bit the run without: the matrix, in one process."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from perturbation import (
    AXES,
    CELLS,
    STEPS,
    assert_sampled,
    assert_unperturbed,
    cell_id,
    differences,
    every_callback,
    fit_cell,
)
from sweeps import slow

from normzoo.callbacks import RelativeLoss
from normzoo.testing.measurements._perturbation import pairs_of

FAST = next(c for c in CELLS if c["layer"] == "ghost" and c["accumulation"] == 3)  # check_measurement has the others


def test_the_matrix_has_every_pair_of_values() -> None:
    every = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    assert set().union(*map(pairs_of, CELLS)) == set().union(*map(pairs_of, every))
    assert len(CELLS) == len({cell_id(c) for c in CELLS}) <= 10
    assert sum(c["layer"] == "ghost" and c["accumulation"] == 3 for c in CELLS) > 0


@pytest.mark.parametrize("cell", [(slow if c is not FAST else pytest.param)(c, id=cell_id(c)) for c in CELLS])
def test_a_run_is_the_same_with_all_callbacks(tmp_path: Path, cell: dict[str, Any]) -> None:
    callbacks = every_callback(several=cell["accumulation"] > 1)
    without = fit_cell(tmp_path / "a", cell, [])
    with_all = fit_cell(tmp_path / "b", cell, callbacks)
    assert_unperturbed(without, with_all)
    assert without["steps"][0] == STEPS
    assert_sampled(tmp_path / "b", callbacks, list(range(STEPS)), losses=STEPS * cell["accumulation"])


def last_bit(t: torch.Tensor) -> None:
    with torch.no_grad():
        first = t.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor(torch.inf)))


def steps_of(run: pl.Trainer) -> Any:
    return run.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step


PLANTS: dict[str, Callable[[pl.Trainer, Any], object]] = {
    "weights": lambda run, net: last_bit(net.net[5].bias.data),
    "gradients": lambda run, net: last_bit(net.net[0].weight.grad),
    "buffers": lambda run, net: net.examples.add_(1),
    "optimizer state": lambda run, net: last_bit(run.optimizers[0].state[net.net[0].weight]["momentum_buffer"]),
    "schedulers": lambda run, net: run.lr_scheduler_configs[0].scheduler.step(),
    "logged metrics": lambda run, net: last_bit(run.callback_metrics["loss_epoch"]),
    "plain attributes": lambda run, net: net.losses.pop(),
    "hooks": lambda run, net: net.register_forward_hook(lambda *_: None),
    "modes": lambda run, net: net.net[5].bias.requires_grad_(False),
    "python stream": lambda run, net: random.random(),
    "numpy stream": lambda run, net: np.random.rand(),
    "torch stream": lambda run, net: torch.rand(1),
    "steps": lambda run, net: (
        run.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_completed()
    ),
    "stopped": lambda run, net: setattr(run, "should_stop", True),
}


class Plant(pl.Callback):
    """Does something to the run once, as training ends."""

    def __init__(self, act: Callable[[pl.Trainer, Any], object]) -> None:
        self.act = act

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.act(trainer, pl_module)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit_cell(tmp_path_factory.mktemp("undisturbed"), CELLS[0], [])


@pytest.mark.parametrize("part", PLANTS)
def test_the_comparison_notices_a_perturbation(tmp_path: Path, undisturbed: dict[str, Any], part: str) -> None:
    assert PLANTS.keys() == undisturbed.keys()
    perturbed = fit_cell(tmp_path, CELLS[0], [Plant(PLANTS[part])])
    found = differences(undisturbed, perturbed)
    assert any(d.startswith(f".{part}") for d in found), found
    with pytest.raises(AssertionError, match=part):
        assert_unperturbed(undisturbed, perturbed)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_the_comparison_notices_a_draw_during_training(tmp_path: Path, undisturbed: dict[str, Any], hook: str) -> None:
    draws = pl.Callback()
    setattr(draws, hook, lambda *args: torch.rand(1))
    found = differences(undisturbed, fit_cell(tmp_path, CELLS[0], [draws]))
    for part in ("weights", "gradients", "optimizer state", "logged metrics", "plain attributes", "torch stream"):
        assert any(d.startswith(f".{part}") for d in found), part


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor([1.0]), torch.tensor(1.0)),
        (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)),
        ({"x": None}, {}),
        ([1, 2], [1]),
        (1, 1.0),
        (np.zeros(2, dtype=np.uint32), np.ones(2, dtype=np.uint32)),
    ],
)
def test_the_comparison_tells_bits_types_and_keys(a: Any, b: Any) -> None:
    assert differences(a, b)
    assert not differences(a, a)
    assert not differences(torch.tensor(torch.nan), torch.tensor(torch.nan))


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
    run = trainer(str(tmp_path), callbacks=[remember, RelativeLoss(1, loss=loss, along="gradient")])
    with pytest.raises(RuntimeError, match="from the user's loss"):
        run.fit(module, loader())
    assert_unperturbed(remember.state, dict(module.state_dict()))
    assert "log" not in vars(module)
