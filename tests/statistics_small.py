"""Layers, batches and networks whose statistics tests estimate, freeze or group."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

import normzoo

C = 6


SIZES = (8, 2, 5, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "ghost_batch": {"ghost_size": 4},
    "batch_group": {"groups": 3},
    "batch_renorm": {"r_max": 3.0, "d_max": 5.0},
    "power": {"warmup": 2},
    "iter_norm": {"groups": 2},
}


def batches(sizes=SIZES, shape=(C, 4, 3), seed=0, scale=1.0):
    """Images whose mean and spread drift from batch to batch."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *shape, generator=g, dtype=torch.float64) * (1 + i) + 3 * i) * scale
        for i, n in enumerate(sizes)
    ]


def layer_of(name, channels=C, **options):
    layer = normzoo.create_norm(name, channels, **OPTIONS.get(name, {}), **options).double()
    with torch.no_grad():
        for key, buffer in layer.named_buffers():
            if key.startswith("running_") and key != "running_whitening":
                buffer.uniform_(0.5, 2.0)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(100)
    return layer


def resnet(norm="batch"):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, drop_rate=0.5, drop_path_rate=0.2)
    if norm != "batch":
        options = {"groups": 8} if norm in ("iter_norm", "batch_group") else None
        normzoo.convert_norms(model, norm, options=options)
    return model


IMAGES = [(torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n)), torch.zeros(n)) for n in (4, 2)]


class Subclass(nn.BatchNorm2d):
    """A forward of its own, which uses the old statistics and moves them with new tensors."""

    def forward(self, x):
        assert not self.training or (self.running_var > 0.4).all()
        if not self.training:
            return super().forward(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
        self.running_var = self.momentum * var + (1 - self.momentum) * self.running_var
        return x


def with_statistics():
    """The zoo's layers that keep statistics of batches, found and not listed."""
    found = []
    for name in normzoo.list_norms():
        if name in ("frozen_batch", "online"):
            continue
        options = {"groups": 4} if name == "batch_group" else OPTIONS.get(name, {})
        if any(key.startswith("running_") for key, _ in normzoo.get_norm(name, **options)(32).named_buffers()):
            found.append(name)
    return found


ZOO = with_statistics()


def statistics(layer):
    return {k: b.clone() for k, b in layer.named_buffers(recurse=False) if k.startswith("running_")}


def everything(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "options": [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | tuple | None)} for m in model.modules()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "tensors": [id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())],
        "requires": [p.requires_grad for p in model.parameters()],
    }


def assert_same(before, after, but=()):
    for key in before:
        if key != "state":
            assert before[key] == after[key], key
    assert before["state"].keys() == after["state"].keys()
    for k, v in before["state"].items():
        if not any(k.endswith(b) for b in but):
            assert torch.equal(v, after["state"][k]), k


RUNNING = ("running_mean", "running_var", "running_whitening", "running_phi")
