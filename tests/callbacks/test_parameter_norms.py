"""Norms of parameters, gradients and updates against their definitions in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from torch import Tensor

from normzoo import load_run
from normzoo.callbacks import ParameterNorms


class Kept(SmallNet):
    """Keeps parameters and gradients before each step."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.kept: list[dict[str, tuple[Tensor, Tensor]]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        both = {name: (p.detach(), p.grad) for name, p in self.named_parameters()}
        self.kept.append({name: (p.double().clone(), g.double().clone()) for name, (p, g) in both.items()})


def test_norms_are_those_of_the_definition(tmp_path: Path) -> None:
    module = Kept()
    trainer(str(tmp_path), callbacks=[ParameterNorms(1)], max_steps=5).fit(module, loader())
    record = load_run(tmp_path / "log")["parameter_norms"].set_index(["step", "layer"])
    names = [name for name, _ in module.named_parameters()]
    assert record.index.tolist() == [(step, name) for step in range(5) for name in names]
    for step, (now, after) in enumerate(zip(module.kept[:-1], module.kept[1:], strict=True)):
        for depth, (name, (weight, gradient)) in enumerate(now.items()):
            row = record.loc[step, name]
            assert row["depth"] == depth
            assert row["weight"] == pytest.approx(weight.norm().item(), rel=1e-6)
            assert row["gradient"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert row["update"] == pytest.approx((after[name][0] - weight).norm().item(), rel=1e-5)
            zero = name == "net.1.bias" and step == 0
            relative = math.nan if zero else row["update"] / row["weight"]
            assert row["relative_update"] == pytest.approx(relative, nan_ok=True)
            assert row["nonfinite"] == 0


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    module = SmallNet()
    bias = module.net[6].bias
    bias.register_hook(lambda g: torch.cat([torch.tensor([torch.nan, torch.inf]), g[2:]]))
    trainer(str(tmp_path), callbacks=[ParameterNorms(1)], max_steps=1).fit(module, loader())
    record = load_run(tmp_path / "log")["parameter_norms"].set_index("layer")
    assert record["nonfinite"]["net.6.bias"] == 2
    assert record["nonfinite"].sum() == 2
    assert record["gradient"].isna()["net.6.bias"]
