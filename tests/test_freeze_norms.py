"""Frozen norms: what is frozen, and that it stays so."""

from __future__ import annotations

import copy

import pytest
import timm.layers as tl
import torch
from statistics_small import IMAGES, C, Subclass, batches, layer_of, resnet
from sweeps import slow
from timm.layers.inplace_abn import InplaceAbn
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo import freeze_norms
from normzoo.convert._kinds import kind_of


def trained_a_little(model, images=IMAGES):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for x, _ in images:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("norm", ["batch_renorm", *map(slow, ("batch", "ghost_batch", "batch_group", "zoo batch"))])
def test_freezing_changes_nothing_in_evaluation_and_stays(norm):
    model = resnet()
    if norm != "batch":
        normzoo.convert_norms(
            model, norm.removeprefix("zoo "), options={"groups": 8} if norm == "batch_group" else None
        )
    trained_a_little(model)
    x = IMAGES[0][0]
    original = copy.deepcopy(model).eval()
    report = freeze_norms(model)
    assert len(report) == 15
    assert report.to == "frozen_batch"
    assert {type(m).__name__ for m in model.modules() if kind_of(m)} == {"FrozenBatchNorm"}
    with torch.no_grad():
        assert_close(model.eval()(x), original(x), rtol=1e-5, atol=1e-5)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    assert sum("bn" in k and k.endswith("weight") for k in buffers) == 10
    weight = model.conv1[0].weight.clone()
    trained_a_little(model)
    assert not torch.equal(model.conv1[0].weight, weight)
    assert all(torch.equal(v, dict(model.named_buffers())[k]) for k, v in buffers.items())
    original.load_state_dict(model.state_dict())
    other = copy.deepcopy(model)
    other.load_state_dict(original.state_dict())
    with torch.no_grad():
        assert_close(original(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ResNet has no layer to freeze; looked for batch norms with running"):
        freeze_norms(model)


def test_only_what_is_exactly_a_frozen_batch_norm_is_taken():
    taken = {
        "bn": nn.BatchNorm2d(C),
        "no affine": nn.BatchNorm2d(C, affine=False),
        "sync": nn.SyncBatchNorm(C),
        "act": tl.norm_act.BatchNormAct2d(C),
        "drop": tl.norm_act.BatchNormAct2d(C, drop_layer=nn.Dropout),
        "split": tl.split_batchnorm.SplitBatchNorm2d(C),
        "no bias": nn.BatchNorm2d(C, bias=False),
        **{n: layer_of(n) for n in ("batch", "batch_renorm", "ghost_batch", "batch_group")},
    }
    left = {
        "no statistics": nn.BatchNorm2d(C, track_running_stats=False),
        "instance": nn.InstanceNorm2d(C, track_running_stats=True),
        "group": nn.GroupNorm(2, C),
        "own": Subclass(C),
        "abn": InplaceAbn(C),
        "relu": nn.ReLU(),
        **{n: layer_of(n) for n in ("l1_batch", "switchable", "evonorm_b0", "iter_norm", "power", "batch_instance")},
    }
    made = {k: copy.deepcopy(v).double() for k, v in {**taken, **left}.items()}
    for k in taken:
        for name in ("running_mean", "running_var", "weight", "bias"):
            if (held := getattr(made[k], name, None)) is not None:
                with torch.no_grad():
                    held.uniform_(0.5, 1.5)
    model = nn.ModuleDict(made).eval()
    x = batches((3,))[0]
    with torch.no_grad():
        want = {k: model[k](x) for k in taken}
    report = freeze_norms(model)
    assert [s.name for s in report.changed] == list(taken)
    model.train()
    for k in taken:
        assert not list(model[k].parameters())
        model[k].eval() if k == "drop" else None
        assert_close(model[k](x), want[k], rtol=1e-12, atol=1e-12)
    for k in left:
        assert model[k] is made[k]


def test_which_are_frozen_can_be_chosen():
    def left(**chosen):
        model = resnet()
        freeze_norms(model, **chosen)
        return [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]

    everywhere = [n for n, m in resnet().named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left() == []
    assert left(include="layer1.*") == [n for n in everywhere if not n.startswith("layer1.")]
    assert left(exclude="layer4.*") == [n for n in everywhere if n.startswith("layer4.")]
    assert left(exclude=["layer4.*", lambda n, m: n == "bn1"], include=nn.BatchNorm2d) == [
        n for n in everywhere if n.startswith("layer4.") or n == "bn1"
    ]
    assert left(exclude=lambda n, m: m.num_features > 32) == [
        n for n in everywhere if n[:6] in ("layer2", "layer3", "layer4")
    ]
    with pytest.raises(ValueError, match="none chosen by include and exclude"):
        left(exclude="*")


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.GroupNorm(2, C)), nn.Sequential(nn.BatchNorm2d(C, track_running_stats=False))]
)
def test_nothing_to_freeze_is_an_error(model):
    with pytest.raises(ValueError, match="Sequential has no layer to freeze"):
        freeze_norms(model)
