"""A layer as a user writes it: registered, held to the suite, trained from a recipe."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

import normzoo
from normzoo import registry
from normzoo.cli.main import main
from normzoo.report import load_runs
from normzoo.testing import CHECKS, NormCheckError, check_norm

SOURCE = '''\
import torch
from torch import nn

import normzoo


@normzoo.register_norm("mean_abs", family="sample", paper="yours")
class MeanAbsNorm(nn.Module):
    """Each sample by the mean of its absolute values: ``y = x / (mean(|x|) + eps) * weight + bias``."""

    def __init__(self, num_features, *, eps=1e-5, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__()
        self.num_features, self.eps, self.channel_dim = num_features, eps, channel_dim
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)

    def forward(self, x):
        return _normalized(self, x)


@torch.fx.wrap  # symbolic tracing records the call: it cannot look inside, where Python asks for shapes
def _normalized(layer, x):
    if x.ndim < 2 or x.shape[layer.channel_dim] != layer.num_features or not x.is_floating_point():
        raise ValueError(f"MeanAbsNorm({layer.num_features}) cannot take {tuple(x.shape)} {x.dtype}")
    wide = x.movedim(layer.channel_dim, 1).to(torch.promote_types(x.dtype, torch.float32))
    total = wide.abs().sum(tuple(range(1, x.ndim)), keepdim=True)
    scale = 1 / (total / max(x[:1].numel(), 1) + layer.eps)  # a sample may be empty
    if layer.weight is None:
        y = wide * scale
    else:
        weight, bias = (p.view(-1, *[1] * (x.ndim - 2)) for p in (layer.weight, layer.bias))
        y = wide * (scale * weight) + bias  # x * scale alone would be kept for backward
    return y.to(x.dtype).movedim(1, layer.channel_dim)
'''
RECIPE = """
seed: 3
model: {arch: resnet20_cifar, norm: {class_path: own_norm.MeanAbsNorm, init_args: {eps: 1.0e-3}}}
data: {name: fashion_mnist, batch_size: 16}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 3, accelerator: cpu, log_every_n_steps: 1, limit_val_batches: 1, num_sanity_val_steps: 0,
          val_check_interval: 3, enable_checkpointing: false, enable_model_summary: false}
"""
SLOW = [name for name, check in CHECKS.items() if check.slow]
FAST = [name for name in CHECKS if name not in SLOW]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the user's module; what importing it does to the process is undone."""
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    monkeypatch.setattr(registry, "_BY_TARGET", dict(registry._BY_TARGET))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    Path("own_norm.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("own_norm", None)


def _formula(layer, x):
    samples = [v / (v.abs().mean() + layer.eps) for v in x]
    return (torch.stack(samples).movedim(1, -1) * layer.weight + layer.bias).movedim(-1, 1)


def test_it_keeps_every_promise(folder):
    importlib.import_module("own_norm")
    results = check_norm("mean_abs", checks=FAST, reference=_formula)
    not_held = {r.name for r in results if r.status != "passed"}
    assert not_held - {"no_host_sync"} == {
        "activation",
        "running_statistics",
        "num_batches_tracked",
        "momentum_none",
        "sync",
    }


@pytest.mark.slow
def test_compilers_and_exporters_take_it(folder):
    importlib.import_module("own_norm")
    results = check_norm("mean_abs", checks=SLOW)
    assert [(r.name, r.status) for r in results] == [(name, "passed") for name in SLOW]


@pytest.mark.parametrize(
    ("line", "plain", "broken"),
    [
        ("wide * (scale * weight)", "wide * scale * weight", "saved_memory"),
        ("total / max(x[:1].numel(), 1)", "total / x[:1].numel()", "empty"),
    ],
)
def test_what_its_comments_warn_of_is_reported(folder, line, plain, broken):
    assert line in SOURCE
    Path("own_norm.py").write_text(SOURCE.replace(line, plain))
    importlib.import_module("own_norm")
    with pytest.raises(NormCheckError, match=rf"MeanAbsNorm\(6\) breaks 1 promise .*\n\n  {broken}: "):
        check_norm("mean_abs", checks=FAST)


def test_it_trains_from_a_recipe(folder):
    Path("own.yaml").write_text(RECIPE)
    assert main(["run", "own.yaml", "--out", "run"]) == 0
    [run] = load_runs(folder / "run")
    steps, losses = run.curve("train/loss")
    assert (run.state, list(steps)) == ("finished", [0, 1, 2])
    assert all(map(math.isfinite, losses))
    assert normzoo.norm_info("mean_abs").summary.startswith("Each sample by the mean of its absolute values")


def test_the_docs_show_this_layer():
    assert SOURCE in (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
