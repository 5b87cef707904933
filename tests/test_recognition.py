"""Which modules are norms: answers recorded when conversion, callbacks and statistics each had their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm.layers
import torch
from norm_classes import classes, made
from torch import nn
from torch.nn.parameter import is_lazy

import normzoo
from normzoo.layers import BatchNorm
from normzoo.layers._base import NormLayer
from normzoo.recognition import channel_dim, is_norm, known_class, norm_entries

# {class: [norm to callbacks, kind and its channel_dim, norm to param_groups, dimension of channels or 7, norm by keys]}
RECORDED = json.loads((Path(__file__).parent / "recorded" / "norm_classes.json").read_text(encoding="utf-8"))
TOLD_NOTHING = 7
# Where callbacks and param_groups disagreed: the answer of both now, and why.
DECIDED = {
    "normzoo.layers._base.NormLayer": (True, "the zoo's base class says it, registered or not"),
    "normzoo.layers._base.RunningStatsLayer": (True, "likewise"),
    "timm.layers.grn.GlobalResponseNorm": (True, "it normalizes; ConvNeXt V2 trains its scale without decay"),
    "timm.layers.inplace_abn.InplaceAbn": (True, "it is batch norm, which its name does not say"),
    "timm.models.mlp_mixer.Affine": (True, "conversion takes it for the norm affine"),
    "torch.nn.modules.batchnorm._BatchNorm": (True, "what derives from torch's base is a batch norm"),
    "torch.nn.modules.batchnorm._LazyNormBase": (True, "likewise"),
    "torch.nn.modules.batchnorm._NormBase": (True, "likewise"),
    "torch.nn.modules.instancenorm._InstanceNorm": (True, "likewise"),
    "torch.nn.modules.normalization.LocalResponseNorm": (True, "it has no parameters, but is a norm"),
    "torch.nn.utils.parametrizations._WeightNorm": (False, "a parametrization of weights is no layer"),
    "torchvision.transforms.transforms.Normalize": (False, "a transform of data is no layer"),
}


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return {name: module for name, cls in classes() if (module := made(cls)) is not None}


def seen_by_keys(module: nn.Module) -> bool:
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        return False
    return list(norm_entries({f"a.{name}": tensor for name, tensor in module.state_dict().items()})) == ["a"]


def test_classes_are_what_they_were(modules):
    known = {name: row for name, row in RECORDED.items() if name in modules}
    assert len(known) > 80
    for name, (to_callbacks, kind, to_param_groups, told, by_keys) in known.items():
        module = modules[name]
        if to_callbacks != to_param_groups:
            assert is_norm(module) == DECIDED[name][0], name
        else:
            assert is_norm(module) == to_callbacks, name
        found = known_class(module)
        assert (found and [found.kind.name, found.kind.channel_dim]) == kind, name
        assert not (found and found.overridden), name
        expected = kind[1] if told == TOLD_NOTHING and kind is not None else told
        assert channel_dim(module, TOLD_NOTHING) == expected, name
        assert seen_by_keys(module) == by_keys, name


def test_each_decision_is_about_a_disagreement():
    assert DECIDED.keys() == {name for name, row in RECORDED.items() if row[0] != row[2]}


@pytest.mark.slow
def test_other_classes_are_no_norms(modules):
    others = {name: module for name, module in modules.items() if name not in RECORDED}
    others = {name: module for name, module in others.items() if "norm" not in name.rpartition(".")[2].lower()}
    assert len(others) > 800
    assert [name for name, m in others.items() if is_norm(m) or known_class(m) or seen_by_keys(m)] == []


class Changed(nn.BatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


class ChangedZoo(BatchNorm):
    def normalize(self, x):
        return -super().normalize(x)


class Same(nn.BatchNorm2d):
    pass


class SameZoo(BatchNorm):
    pass


class Unregistered(NormLayer):
    pass


@pytest.mark.parametrize("cls", [Changed, ChangedZoo, Same, SameZoo])
def test_subclasses_are_norms_whatever_their_forward(cls):
    module = cls(4)
    known = known_class(module)
    assert is_norm(module)
    assert known is not None
    assert (known.kind.name, known.overridden) == ("batch", cls in (Changed, ChangedZoo))


def test_a_forward_set_on_the_module_overrides_its_class():
    module = nn.BatchNorm2d(4)
    module.forward = lambda x: x
    known = known_class(module)
    assert known is not None
    assert known.overridden
    assert is_norm(module)


def test_layers_on_the_zoos_base_are_norms_and_of_no_known_kind():
    assert is_norm(Unregistered(4))
    assert known_class(Unregistered(4)) is None


class Scale(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(("norm", "dim"), [(nn.LayerNorm, -1), (nn.BatchNorm1d, 1)])
def test_layers_that_conversion_put_in_are_marked(norm, dim):
    model = nn.Sequential(nn.Linear(3, 4), norm(4))
    assert not is_norm(Scale(4))
    normzoo.convert_norms(model, Scale)
    assert is_norm(model[1])
    assert known_class(model[1]) is None
    assert channel_dim(model[1], 7) == dim


def test_parametrizations_and_blocks_are_no_norms():
    for wrap in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        model = wrap(nn.Linear(4, 4))
        assert [name for name, module in model.named_modules() if is_norm(module)] == []
    block = timm.layers.ConvNormAct(3, 4)
    assert [name for name, module in block.named_modules() if is_norm(module)] == ["bn"]


@pytest.mark.parametrize(
    ("module", "dim"),
    [
        (nn.LayerNorm(4), -1),
        (nn.LayerNorm((3, 4)), -2),
        (nn.RMSNorm(4), -1),
        (timm.layers.LayerNorm2d(4), 1),
        (timm.layers.RmsNorm(4), -1),
        (normzoo.create_norm("rms", 4, channel_dim=-1), -1),
        (nn.BatchNorm2d(4), 1),
        (Changed(4), 7),
        (nn.Linear(4, 4), -1),
        (nn.Conv2d(4, 4, 1), 7),
    ],
)
def test_where_channels_are(module, dim):
    assert channel_dim(module, otherwise=7) == dim
