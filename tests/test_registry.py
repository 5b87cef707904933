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

ROOT = Path(__file__).parents[1]

ALIASES = {
    "batch": ["batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "BatchNorm2d", "batch-norm", "BATCH"],
    "batch_renorm": ["batchrenorm", "BatchRenorm", "batch-renorm", "Batch_ReNorm"],
    "group": ["groupnorm", "GroupNorm", "group_norm"],
    "layer": ["groupnorm1", "GroupNorm1"],
    "instance": ["instancenorm", "instancenorm1d", "instancenorm2d", "instancenorm3d", "InstanceNorm2d"],
    "none": ["identity", "Identity", "NONE"],
}
CALLS = [normzoo.norm_info, normzoo.get_norm, lambda name: normzoo.create_norm(name, 8)]


@pytest.fixture
def clean_registry(monkeypatch):
    """Registrations of a test go to copies that are thrown away."""
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))


def test_names_and_families():
    assert normzoo.list_norms() == ["batch", "batch_renorm", "group", "instance", "layer", "none"]
    assert normzoo.list_norms("batch") == ["batch", "batch_renorm"]
    assert normzoo.list_norms("sample") == ["group", "instance", "layer"]
    assert normzoo.list_norms(family="none") == ["none"]
    with pytest.raises(ValueError, match=r"^'sampel' is not a known norm family; did you mean 'sample'\? Valid: "):
        normzoo.list_norms("sampel")


def test_entries_say_what_a_layer_is():
    for name in normzoo.list_norms():
        info = normzoo.norm_info(name)
        assert info.name == name == name.lower()
        assert re.fullmatch(r".+ \d{4}, arXiv \d{4}\.\d{5}", info.paper)
        assert re.fullmatch(r"[a-z][^.\n]{10,70}", info.summary)
        assert info.batch_statistics == (info.family == "batch") == issubclass(info.layer_class, RunningStatsLayer)
        with pytest.raises(AttributeError):
            info.name = "other"


@pytest.mark.parametrize(("name", "alias"), [(n, a) for n, known in ALIASES.items() for a in [n, *known]])
def test_aliases_are_accepted_in_any_case(name, alias):
    assert normzoo.norm_info(alias) is normzoo.norm_info(name)
    assert normzoo.get_norm(alias).func is normzoo.norm_info(name).layer_class


def test_every_alias_of_every_layer_is_tested():
    assert ALIASES.keys() == set(normzoo.list_norms())
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
        if alias != "batchnorm1d":  # theirs refuses images
            torch.testing.assert_close(ours(x), create_norm.create_norm_layer(alias, 32)(x))
        compared.add(alias)
    assert compared == {"batchnorm", "batchnorm1d", "batchnorm2d", "groupnorm", "groupnorm1"}
    for other in ("layernorm", "layernorm2d", "rmsnorm", "frozenbatchnorm2d"):
        with pytest.raises(ValueError, match=f"^'{other}' is not a known norm"):
            normzoo.get_norm(other)


@pytest.mark.parametrize("error", [ValueError, KeyError])
@pytest.mark.parametrize("call", CALLS, ids=["norm_info", "get_norm", "create_norm"])
def test_unknown_name_gives_the_nearest(call, error):
    valid = ", ".join(normzoo.list_norms())
    with pytest.raises(error, match=rf"^'gruop' is not a known norm; did you mean 'group'\? Valid: {valid}\.$"):
        call("gruop")
    with pytest.raises(error, match=r"^'Batch_renrom' is not a known norm; did you mean 'batch_renorm'"):
        call("Batch_renrom")


@pytest.mark.parametrize("name", ["", "zzzzzz", 3, None, ["batch"]])
def test_no_name_at_all(name):
    text = f"^{re.escape(repr(str(name)))} is not a known norm.* Valid: batch, batch_renorm, group"
    with pytest.raises(registry.UnknownNameError, match=text):
        normzoo.norm_info(name)


def test_options_are_the_layers_own():
    shared = {"affine": True, "channel_dim": 1}
    assert normzoo.norm_info("none").options == shared
    assert normzoo.norm_info("layer").options == {"eps": 1e-5, **shared}
    assert normzoo.norm_info("group").options == {"groups": 32, "eps": 1e-5, **shared}
    assert normzoo.norm_info("batch").options == {"eps": 1e-5, "momentum": 0.1, **shared}
    renorm = normzoo.norm_info("batch_renorm").options
    assert list(renorm) == ["eps", "momentum", "r_max", "d_max", "average", "affine", "channel_dim"]


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
        ("batch", "zzz", r"^norm 'batch' has no option 'zzz'\. Options: eps, momentum, affine, channel_dim$"),
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
    entries = {normzoo.norm_info(n).layer_class: normzoo.norm_info(n).target for n in normzoo.list_norms()}
    assert len(entries) == len(normzoo.list_norms())
    defined = set()
    for module in pkgutil.iter_modules(layers.__path__, "normzoo.layers."):
        members = vars(importlib.import_module(module.name)).values()
        classes = {m for m in members if isinstance(m, type) and issubclass(m, nn.Module)}
        defined |= {c for c in classes if c.__module__ == module.name}
    assert set(entries) == defined - {NormLayer, RunningStatsLayer}
    assert set(entries) == {getattr(layers, name) for name in layers.__all__}
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
    with pytest.raises(ValueError, match=r"^'scael' is not a known norm; did you mean 'scale'\?"):
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


def test_importing_normzoo_and_its_registry_imports_no_torch():
    code = (
        "import sys, normzoo, normzoo.registry\n"
        "normzoo.list_norms(); normzoo.norm_info('batch').summary; normzoo.__version__; dir(normzoo)\n"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'normzoo.layers', 'normzoo.models'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "normzoo.get_norm('batch')\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'timm', 'lightning', 'normzoo.models'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
