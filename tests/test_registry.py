"""The registry: what it lists, what it accepts and refuses, and that it and the layers name the same things."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo
from normzoo import layers, registry
from normzoo.layers._base import NormLayer, RunningStatsLayer
from normzoo.layers._leaf import Leaf
from normzoo.layers.batch import PlainBatchNorm
from normzoo.layers.weight import StandardizedConv

ROOT = Path(__file__).parents[1]

ALIASES = {
    "affine": ["Affine"],
    "batch": ["batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "BatchNorm2d", "batch-norm", "BATCH"],
    "batch_group": ["batchgroupnorm", "BatchGroupNorm", "batch_group_norm"],
    "batch_instance": ["batchinstancenorm", "BatchInstanceNorm"],
    "batch_renorm": ["batchrenorm", "BatchRenorm", "batch-renorm", "Batch_ReNorm"],
    "derf": ["dynamicerf", "DynamicErf", "dynamic_erf", "Derf"],
    "divisive": ["divisivenorm", "DivisiveNorm"],
    "dynamic_tanh": ["dyt", "DyT", "DynamicTanh"],
    "evonorm_b0": ["EvoNormB0", "evonormb0"],
    "evonorm_s0": ["EvoNormS0", "evonorms0"],
    "filter_response": ["frn", "FRN", "filterresponsenorm", "FilterResponseNorm", "filterresponsenormtlu2d"],
    "frozen_batch": ["frozenbatchnorm", "frozenbatchnorm2d", "FrozenBatchNorm2d"],
    "ghost_batch": ["ghostbatchnorm", "GhostBatchNorm"],
    "group": ["groupnorm", "GroupNorm", "group_norm"],
    "instance": ["instancenorm", "instancenorm1d", "instancenorm2d", "instancenorm3d", "InstanceNorm2d"],
    "iter_norm": ["IterNorm", "iternorm"],
    "l1_batch": ["l1batchnorm", "L1BatchNorm"],
    "layer": ["groupnorm1", "GroupNorm1"],
    "layer_channel": ["layernorm", "layernorm2d", "LayerNorm2d"],
    "local_response": ["localresponsenorm", "LocalResponseNorm"],
    "none": ["identity", "Identity", "NONE"],
    "online": ["onlinenorm", "OnlineNorm"],
    "positional": ["pono", "PONO", "positionalnorm", "PositionalNorm"],
    "power": ["powernorm", "PowerNorm"],
    "proxy": ["proxynorm", "ProxyNorm"],
    "rms": ["rmsnorm", "rmsnorm2d", "RMSNorm", "RmsNorm2d"],
    "switchable": ["switchablenorm", "switchnorm", "SwitchNorm"],
}
# Not layers but methods for the weights of convolutions
WEIGHT_METHODS = {"scaled_ws": ["ScaledWS"], "weight_standardized": ["ws", "WS", "WeightStandardized"]}
CALLS = [normzoo.norm_info, normzoo.get_norm, lambda name: normzoo.create_norm(name, 8)]


@pytest.fixture
def clean_registry(monkeypatch):
    """Registrations of a test go to copies that are thrown away."""
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    monkeypatch.setattr(registry, "_BY_TARGET", dict(registry._BY_TARGET))


FAMILIES = {
    "batch": "batch batch_renorm evonorm_b0 frozen_batch ghost_batch iter_norm l1_batch online power",
    "sample": "divisive evonorm_s0 filter_response group instance layer layer_channel local_response positional rms",
    "mixed": "batch_group batch_instance proxy switchable",
    "none": "affine derf dynamic_tanh none",
    "weight": "scaled_ws weight_standardized",
}
# Those of the families batch and mixed whose training output depends on the sample alone
ALONE = {"frozen_batch", "proxy"}


def test_names_and_families():
    assert {family: " ".join(normzoo.list_norms(family)) for family in FAMILIES} == FAMILIES
    listed = [name for family, names in FAMILIES.items() if family != "weight" for name in names.split()]
    assert normzoo.list_norms() == sorted(listed)
    assert len(normzoo.list_norms()) == 27
    with pytest.raises(ValueError, match=r"^'sampel' is not a known norm family; did you mean 'sample'\? Valid: "):
        normzoo.list_norms("sampel")


def test_entries_say_what_a_layer_is():
    for name in [*normzoo.list_norms(), *normzoo.list_norms("weight")]:
        info = normzoo.norm_info(name)
        assert info.name == name == name.lower()
        assert re.fullmatch(r".+ \d{4}, (arXiv \d{4}\.\d{5}|NeurIPS \d+)", info.paper)
        assert re.fullmatch(r"[a-z][^.\n]{10,70}", info.summary)
        with pytest.raises(AttributeError):
            info.name = "other"


def test_batch_statistics_are_those_of_families_with_a_batch():
    for name in normzoo.list_norms():
        info = normzoo.norm_info(name)
        assert info.batch_statistics == (info.family in ("batch", "mixed") and name not in ALONE)
        # A count of batches and a rate for them; online normalization counts samples
        assert (info.batch_statistics and name != "online") == issubclass(info.layer_class, RunningStatsLayer)


@pytest.mark.parametrize("name", normzoo.list_norms())
def test_batch_statistics_is_what_the_layer_does(name):
    """In training a sample's output depends on the samples beside it, or it does not."""
    layer = normzoo.create_norm(name, 32, dtype=torch.float64)
    x = torch.randn(4, 32, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:2] + 1, x[2:]])
    first, second = (layer(v)[2:].detach() for v in (x, other) if layer.reset_parameters() is None)
    assert (not torch.allclose(first, second, rtol=1e-9)) == normzoo.norm_info(name).batch_statistics


@pytest.mark.parametrize(("name", "alias"), [(n, a) for n, known in ALIASES.items() for a in [n, *known]])
def test_aliases_are_accepted_in_any_case(name, alias):
    assert normzoo.norm_info(alias) is normzoo.norm_info(name)
    assert normzoo.get_norm(alias).func is normzoo.norm_info(name).layer_class


@pytest.mark.parametrize("name", ["scaled_ws", "none+ws", "group+ws", "GroupNorm+ScaledWS"])
def test_methods_for_weights_are_not_layers(name):
    text = rf"^'{re.escape(name)}' changes the weights of convolutions, which a layer cannot: use normzoo.create_model"
    for call in (normzoo.get_norm, lambda n: normzoo.create_norm(n, 8)):
        with pytest.raises(ValueError, match=text):
            call(name)
    with pytest.raises(ValueError, match=r"^'wz' is not a known method for weights; did you mean 'ws'\?"):
        normzoo.get_norm("group+wz")


@pytest.mark.parametrize("name", ["ws", "weight_standardized"])
def test_weight_standardization_alone_is_refused(name):
    text = rf"^'{name}' goes beside a norm; name both, as in 'group\+ws', or 'none\+ws' for no norm$"
    for call in (normzoo.get_norm, lambda n: normzoo.create_model("resnet18", n)):
        with pytest.raises(ValueError, match=text):
            call(name)


def test_every_alias_of_every_layer_is_tested():
    assert ALIASES.keys() == set(normzoo.list_norms())
    assert WEIGHT_METHODS.keys() == set(normzoo.list_norms("weight"))
    for name, known in WEIGHT_METHODS.items():
        assert {normzoo.norm_info(alias).name for alias in (name, *known)} == {name}
        assert set(normzoo.norm_info(name).aliases) <= set(known)
    for name in ALIASES:
        assert set(normzoo.norm_info(name).aliases) <= set(ALIASES[name])


def test_timm_names_mean_what_they_mean_in_timm():
    """Where timm knows an alias, its layer and ours agree; its names for other functions are not taken."""
    create_norm = importlib.import_module("timm.layers.create_norm")
    x = torch.randn(4, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    compared = set()
    for alias in create_norm._NORM_MAP:
        try:
            ours = normzoo.create_norm(alias, 32)
        except ValueError:
            continue
        theirs = create_norm.create_norm_layer(alias, 32)
        if alias in ("layernorm", "rmsnorm"):  # theirs take the channel last
            torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1))
        elif alias != "batchnorm1d":  # theirs refuses images
            torch.testing.assert_close(ours(x), theirs(x))
        compared.add(alias)
    same = {"batchnorm", "batchnorm1d", "batchnorm2d", "frozenbatchnorm2d", "groupnorm", "groupnorm1"}
    assert compared == same | {"layernorm", "layernorm2d", "rmsnorm", "rmsnorm2d"}
    for other in ("layernormfp32", "simplenorm", "simplenorm2d"):
        with pytest.raises(ValueError, match=f"^'{other}' is not a known norm"):
            normzoo.get_norm(other)


@pytest.mark.parametrize("error", [ValueError, KeyError])
@pytest.mark.parametrize("call", CALLS, ids=["norm_info", "get_norm", "create_norm"])
def test_unknown_name_gives_the_nearest(call, error):
    with pytest.raises(error, match=r"^'gruop' is not a known norm; did you mean 'group' or 'batch_group'\?$"):
        call("gruop")
    with pytest.raises(error, match=r"^'Batch_renrom' is not a known norm; did you mean 'batch_renorm'"):
        call("Batch_renrom")
    valid = ", ".join(sorted([*ALIASES, *WEIGHT_METHODS]))
    with pytest.raises(error, match=rf"^'zzzzzz' is not a known norm\. Valid: {valid}\.$"):
        call("zzzzzz")


@pytest.mark.parametrize("name", ["", "zzzzzz", 3, None, ["batch"]])
def test_no_name_at_all(name):
    text = f"^{re.escape(repr(str(name)))} is not a known norm(; did you mean|. Valid: affine, batch, batch_group)"
    with pytest.raises(registry.UnknownNameError, match=text):
        normzoo.norm_info(name)


def test_options_are_the_layers_own():
    shared = {"affine": True, "act_layer": None, "channel_dim": 1}
    assert normzoo.norm_info("none").options == shared
    assert normzoo.norm_info("layer").options == {"eps": 1e-5, **shared}
    assert normzoo.norm_info("group").options == {"groups": 32, "eps": 1e-5, **shared}
    assert normzoo.norm_info("batch").options == {"eps": 1e-5, "momentum": 0.1, "sync": False, **shared}
    renorm = normzoo.norm_info("batch_renorm").options
    assert list(renorm) == ["eps", "momentum", "r_max", "d_max", "average", "sync", *shared]


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        (
            "group",
            "gruops",
            r"^norm 'group' has no option 'gruops'; did you mean 'groups'\? Options: groups, eps",
        ),
        ("GroupNorm", "momentum", r"^norm 'group' has no option 'momentum'"),
        ("batch_renorm", "rmax", r"^norm 'batch_renorm' has no option 'rmax'; did you mean 'r_max'\?"),
        (
            "batch",
            "zzz",
            r"^norm 'batch' has no option 'zzz'\. Options: eps, momentum, sync, affine, act_layer, channel_dim$",
        ),
        ("none", "eps", r"^norm 'none' has no option 'eps'"),
    ],
)
def test_unknown_option_gives_the_nearest(name, option, text):
    for call in (normzoo.get_norm, lambda n, **o: normzoo.create_norm(n, 8, **o)):
        with pytest.raises(TypeError, match=text):
            call(name, **{option: 1})


def test_factories_bind_options_and_create_places():
    factory = normzoo.get_norm("group", groups=4, eps=1e-3)
    layer = factory(16, device="meta", dtype=torch.float64)
    assert (layer.groups, layer.eps, layer.weight.is_meta, layer.weight.dtype) == (4, 1e-3, True, torch.float64)
    made = normzoo.create_norm("groupnorm", 16, groups=4, eps=1e-3, device="meta", dtype=torch.float64)
    assert (repr(made), made.weight.is_meta, made.weight.dtype) == (repr(layer), True, torch.float64)
    assert factory(8) is not factory(8)
    with pytest.raises(ValueError, match=r"^groups=32 does not divide 20 channels; groups can be 1, 2, 4, 5, 10, 20$"):
        normzoo.create_norm("group", 20)


def test_registry_and_layers_hold_the_same_classes():
    names = [*normzoo.list_norms(), *normzoo.list_norms("weight")]
    entries = {normzoo.norm_info(n).layer_class: normzoo.norm_info(n).target for n in names}
    assert len(entries) == len(names)
    defined = set()
    for module in pkgutil.iter_modules(layers.__path__, "normzoo.layers."):
        members = vars(importlib.import_module(module.name)).values()
        classes = {m for m in members if isinstance(m, type) and issubclass(m, nn.Module)}
        defined |= {c for c in classes if c.__module__ == module.name}
    convolutions = {c for c in defined if issubclass(c, StandardizedConv)}  # an entry for each method, of images
    not_registered = {Leaf, NormLayer, RunningStatsLayer, PlainBatchNorm}
    assert {c for c in entries if c not in convolutions} == defined - not_registered - convolutions
    assert {c.__name__ for c in convolutions.intersection(entries)} == {"StandardizedConv2d", "ScaledConv2d"}
    assert set(entries) - convolutions == {getattr(layers, name) for name in layers.__all__}
    for cls, target in entries.items():
        assert target == f"{cls.__module__}:{cls.__qualname__}"


class Scale(nn.Module):
    """A user's layer.

    It has a second line.
    """

    def __init__(self, num_features, *, gain=1.0, affine=True, device=None, dtype=None):
        super().__init__()
        self.num_features, self.gain = num_features, gain


def test_a_users_layer_is_registered(clean_registry):
    before = normzoo.list_norms()
    assert normzoo.register_norm("scale", family="user", paper="none yet", aliases=("ScaleNorm",))(Scale) is Scale
    assert normzoo.list_norms() == sorted([*before, "scale"])
    assert normzoo.list_norms("user") == ["scale"]
    info = normzoo.norm_info("scalenorm")
    assert (info.name, info.summary, info.paper) == ("scale", "A user's layer.", "none yet")
    assert info.batch_statistics is False
    assert info.options == {"gain": 1.0, "affine": True}
    assert normzoo.create_norm("scale", 4, gain=2.0).gain == 2.0
    with pytest.raises(TypeError, match=r"^norm 'scale' has no option 'gian'; did you mean 'gain'\?"):
        normzoo.get_norm("scale", gian=2.0)
    with pytest.raises(ValueError, match=r"^'scael' is not a known norm; did you mean 'scale'"):
        normzoo.get_norm("scael")


def test_a_local_class_is_registered_with_a_summary(clean_registry):
    @normzoo.register_norm("local", family="batch", summary="mine", batch_statistics=True)
    class Local(nn.Module):
        def __init__(self, num_features, *, device=None, dtype=None):
            super().__init__()

    assert normzoo.norm_info("local").layer_class is Local
    assert (normzoo.norm_info("local").summary, normzoo.norm_info("local").batch_statistics) == ("mine", True)
    assert isinstance(normzoo.create_norm("local", 3), Local)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"name": "batch"}, r"^the norm name 'batch' is already taken by 'batch'$"),
        ({"name": "Batch_Norm"}, r"^the norm name 'Batch_Norm' is already taken by 'batch'$"),
        ({"name": "groupnorm1"}, r"^the norm name 'groupnorm1' is already taken by 'layer'$"),
        ({"name": "fresh", "aliases": ("other", "identity")}, r"^the norm name 'identity' is already taken by 'none'$"),
    ],
)
def test_taken_names_are_refused_and_nothing_is_added(clean_registry, names, text):
    norms, aliases = dict(registry._NORMS), dict(registry._ALIASES)
    with pytest.raises(ValueError, match=text):
        normzoo.register_norm(family="user", **names)(Scale)
    assert (norms, aliases) == (registry._NORMS, registry._ALIASES)


def test_a_layer_that_swallows_options_is_refused(clean_registry):
    class Greedy(nn.Module):
        def __init__(self, num_features, **kwargs):
            super().__init__()

    text = r"^Greedy takes \*\*kwargs, which would hide a mistyped option; name its options$"
    with pytest.raises(TypeError, match=text):
        normzoo.register_norm("greedy", family="user")(Greedy)
    assert "greedy" not in normzoo.list_norms()


def test_the_packages_names_resolve():
    assert set(normzoo.__all__) <= set(dir(normzoo))
    for name in normzoo.__all__:
        assert getattr(normzoo, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'normzoo' has no attribute 'get_nrom'$"):
        normzoo.get_nrom  # noqa: B018


def test_torch_and_timm_are_imported_when_they_are_needed():
    code = (
        "import sys, normzoo, normzoo.registry\n"
        "normzoo.list_norms(); normzoo.norm_info('batch').summary; normzoo.__version__; dir(normzoo)\n"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'normzoo.layers', 'normzoo.models'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "normzoo.get_norm('batch')\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'timm', 'lightning', 'normzoo.models'} & set(sys.modules)\n"
        "import timm, torch\n"  # which alone knows the models then
        "model = timm.create_model('resnet20_cifar', norm_layer=normzoo.get_norm('group', groups=8))\n"
        "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)\n"
        "assert model.bn1.groups == 8 and 'lightning' not in sys.modules\n"
    )
    # timm 1.0.21 calls torch.jit where it is imported.
    options = ["-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"]
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
