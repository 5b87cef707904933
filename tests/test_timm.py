"""The zoo's names in timm's factories, and timm as it was when they are taken out again."""

from __future__ import annotations

import copy
import functools
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from sweeps import slow
from timm.layers import create_norm, create_norm_act
from torch import nn
from torch.testing import assert_close

import normzoo
import normzoo.timm as zoo
from normzoo import registry
from normzoo.layers._base import NormLayer

OWN = ("evonorm_s0", "evonorm_b0", "filter_response")
TABLES = (
    (create_norm, "_NORM_MAP"),
    (create_norm, "_NORM_TYPES"),
    (create_norm_act, "_NORM_ACT_MAP"),
    (create_norm_act, "_NORM_ACT_TYPES"),
    (create_norm_act, "_NORM_TO_NORM_ACT_MAP"),
    (create_norm_act, "_NORM_ACT_REQUIRES_ARG"),
)


def state_of_timm() -> dict[Any, Any]:
    """Its tables, and its function wherever it is."""
    held: dict[Any, Any] = {(m.__name__, n): copy.copy(getattr(m, n)) for m, n in TABLES}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "timm" and "get_norm_act_layer" in vars(module):
            held[name] = vars(module)["get_norm_act_layer"]
    return held


@pytest.fixture
def registered() -> Iterator[None]:
    zoo.register()
    yield
    zoo.unregister()


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NormLayer)]


def test_unregister_leaves_timm_as_it_was():
    before = state_of_timm()
    assert sum(isinstance(key, str) for key in before) > 12
    zoo.unregister()
    assert state_of_timm() == before
    zoo.register()
    once = state_of_timm()
    assert all(before[key] != once[key] for key in before if isinstance(key, str))
    for key in (("timm.layers.create_norm", "_NORM_MAP"), ("timm.layers.create_norm_act", "_NORM_ACT_MAP")):
        assert len(once[key]) > len(before[key]) + 25
        assert once[key] | before[key] == once[key], "an entry of timm's was overwritten"
    zoo.register()
    assert state_of_timm() == once
    for _ in range(2):
        zoo.unregister()
        assert state_of_timm() == before


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", normzoo.list_norms())
def test_every_name_works_in_every_factory(name):
    info, x = normzoo.norm_info(name), images(64, 8)
    spellings = [s for s in (name, *info.aliases, name.upper()) if zoo._is_ours(timm.layers.get_norm_layer(s))]
    assert {name, name.upper()} <= set(spellings)
    for spelling in spellings:
        for layer in (
            timm.layers.create_norm_layer(spelling, 64),
            timm.layers.get_norm_layer(spelling)(64),
            timm.layers.get_norm_layer(timm.layers.get_norm_layer(spelling))(64, device="meta", dtype=torch.float64),
            timm.layers.create_norm_act_layer(spelling, 64, act_layer="relu"),
            timm.layers.get_norm_act_layer(spelling, act_layer=nn.SiLU)(64, inplace=False, eps=1e-3),
            timm.layers.get_norm_act_layer(timm.layers.get_norm_layer(spelling), act_layer=None)(64, apply_act=False),
        ):
            ours = isinstance(layer, info.layer_class)
            assert ours or type(layer).__module__.startswith(("timm", "torch"))
            if spelling == name and name not in OWN:
                assert ours
        assert timm.layers.create_norm_layer(name, 64)(x).shape == x.shape


@pytest.mark.usefixtures("registered")
def test_names_of_timm_keep_its_layers():
    assert type(timm.layers.create_norm_layer("batchnorm", 8)) is nn.BatchNorm2d
    assert type(timm.layers.create_norm_layer("group_norm", 32)) is timm.layers.GroupNorm
    assert type(timm.layers.create_norm_act_layer("evonorm_s0", 32)) is timm.layers.EvoNorm2dS0
    assert type(timm.layers.get_norm_act_layer(nn.BatchNorm2d, "relu")(8)) is timm.layers.BatchNormAct2d
    assert type(timm.layers.get_norm_act_layer(timm.layers.GroupNorm, "relu")(32)) is timm.layers.GroupNormAct
    for no_name in (timm.layers.get_norm_layer, timm.layers.get_norm_act_layer):
        assert no_name(None) is None
        with pytest.raises(KeyError):
            no_name("gruop")


GROUPS = {name: {"groups": 4} for name in ("group", "evonorm_s0")}  # of 64 channels, where none are asked for


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "factory",
    [
        lambda n: n,
        normzoo.get_norm,
        lambda n: normzoo.norm_info(n).layer_class,
        lambda n: type(normzoo.create_norm(n, 64)),  # of "batch" another class
    ],
    ids=["name", "factory", "class", "class of a layer"],
)
@pytest.mark.parametrize("name", ["group", "batch_renorm", "layer", "rms", "batch"])
def test_norm_and_activation_are_both_in_one(name, factory):
    x = images(64, 8)
    plain = normzoo.create_norm(name, 64, **GROUPS.get(name, {}))(x)
    for act, function in (
        ("relu", torch.relu),
        (nn.SiLU, nn.functional.silu),
        (functools.partial(nn.LeakyReLU, 0.1), nn.LeakyReLU(0.1)),
        (None, lambda y: y),
    ):
        layer = timm.layers.get_norm_act_layer(factory(name), act_layer=act)(64)
        assert registry.layer_name(layer) == name
        assert_close(layer(x), function(plain))
        off = timm.layers.get_norm_act_layer(factory(name), act_layer=act)(64, apply_act=False)
        assert_close(off(x), plain)
    layer = timm.layers.create_norm_act_layer(
        factory(name), 64, act_layer="leaky_relu", act_kwargs={"negative_slope": 0.2}, inplace=False
    )
    assert_close(layer(x), nn.functional.leaky_relu(plain, 0.2))
    assert layer.act.inplace is False


@pytest.mark.usefixtures("registered")
def test_dropout_comes_between_norm_and_activation():
    drop = functools.partial(nn.Dropout, 0.5)
    layer = timm.layers.create_norm_act_layer("group", 64, act_layer="relu", drop_layer=drop)
    assert [type(m) for m in layer.act] == [nn.Dropout, nn.ReLU]
    assert (layer.train()(images(64, 8)) == 0).float().mean() > 0.6
    alone = timm.layers.create_norm_act_layer("group", 64, act_layer="relu", apply_act=False, drop_layer=drop)
    assert type(alone.act) is nn.Dropout
    own = timm.layers.create_norm_act_layer("filter_response", 64, act_layer="relu", drop_layer=drop)
    assert (own.act_layer, type(own.act)) == ("tlu", nn.Dropout)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", OWN)
def test_norms_with_an_activation_of_their_own_apply_that(name):
    x = images(64, 8)
    get = timm.layers.get_norm_act_layer
    for act in ("relu", None):
        groups = GROUPS.get(name, {})
        assert_close(get(normzoo.get_norm(name), act)(64)(x), normzoo.create_norm(name, 64, **groups)(x))
        without = normzoo.create_norm(name, 64, act_layer=None, **groups)(x)
        assert_close(get(normzoo.get_norm(name), act)(64, apply_act=False)(x), without)
    assert_close(timm.layers.create_norm_layer(name, 64)(x), without)


@pytest.mark.usefixtures("registered")
def test_proxy_norm_takes_the_activation_into_its_formula():
    layer = timm.layers.create_norm_act_layer("proxy", 64, act_layer="silu")
    assert_close(layer(images(64, 8)), normzoo.create_norm("proxy", 64, act_layer=nn.SiLU)(images(64, 8)))
    assert type(timm.layers.create_norm_act_layer("proxy", 64, "silu", apply_act=False).inner) is nn.Identity


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("channels", "groups", "want"), [(48, None, 3), (16, None, 1), (1024, None, 32), (7, 4, 1), (48, 32, 24)]
)
def test_groups_divide_the_channels(channels, groups, want):
    options = {} if groups is None else {"groups": groups}
    for name in ("group", "batch_group"):
        assert timm.layers.create_norm_layer(name, channels, **options).groups == want
        assert timm.layers.create_norm_act_layer(name, channels, act_layer="relu", **options).groups == want
    assert timm.layers.create_norm_act_layer(normzoo.get_norm("group", groups=32), 48, act_layer="relu").groups == 24
    assert timm.layers.create_norm_layer("proxy", channels).groups == 1
    assert timm.layers.create_norm_layer("power", channels).groups is None


@pytest.mark.usefixtures("registered")
def test_mistyped_options_are_errors_and_what_timm_passes_to_all_is_not():
    with pytest.raises(TypeError, match=r"^norm 'group' has no option 'grups'; did you mean 'groups'\?"):
        timm.layers.create_norm_layer("group", 64, grups=8)
    assert timm.layers.create_norm_layer("dynamic_tanh", 64, eps=1e-3, momentum=0.1).num_features == 64
    layer = timm.layers.create_norm_layer("batch_renorm", 64, eps=1e-3, momentum=0.2)
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "count", "norm"),
    [
        (slow if norm != fast else pytest.param)(name, count, norm)
        for name, count, fast in [
            ("test_resnet", 15, "batch_renorm"),
            ("test_efficientnet", 13, "group"),
            ("regnetx_002", 44, "switchable"),
            ("resnetv2_50", 49, "filter_response"),
            ("gernet_s", 45, "dynamic_tanh"),
        ]
        for norm in ["batch_renorm", "group", "switchable", "filter_response", "dynamic_tanh"]
    ],
)
def test_models_train_with_a_name(name, count, norm):
    torch.manual_seed(0)
    model = timm.create_model(name, norm_layer=norm, num_classes=3)
    assert [type(m) for m in norms_of(model)] == [normzoo.norm_info(norm).layer_class] * count
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
    model(images(size=64)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) > count


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_50"])
def test_a_name_and_a_conversion_are_one_model(name):
    by_name = timm.create_model(name, norm_layer="batch_renorm", num_classes=3).eval()
    converted = normzoo.create_model(name, "batch_renorm", num_classes=3).eval()
    by_name.load_state_dict(converted.state_dict(), strict=True)
    for ours, theirs in zip(norms_of(by_name), norms_of(converted), strict=True):
        ours.eps = theirs.eps  # which a model may give to its own norms alone
    with torch.no_grad():
        assert_close(by_name(images(size=64)), converted(images(size=64)))


@pytest.mark.usefixtures("registered")
def test_models_can_be_converted_copied_and_pickled():
    model = timm.create_model("test_efficientnet", norm_layer="group", num_classes=3).eval()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert_close(other(images(size=64)), model(images(size=64)))
    assert len(normzoo.convert_norms(model, "rms")) == 13
    assert model(images(size=64)).shape == (2, 3)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hiera_tiny_224"])
def test_tokens_are_refused_with_what_to_do(name):
    model = timm.create_model(name, norm_layer="group", device="meta")
    text = (
        r"^norm_layer='group' makes layers for images \(N, \d+, H, W\), and this model gives one an input of shape \(.*"
        r"use normzoo.create_model\(..., norm='group'\)"
    )
    with pytest.raises(ValueError, match=text):
        model(images(size=224).to("meta"))


@pytest.mark.usefixtures("registered")
def test_tokens_as_many_as_channels_are_not_taken_for_channels():
    layer = timm.layers.create_norm_layer("layer_channel", 16)
    with pytest.raises(ValueError, match=r"an input of shape \(2, 16, 16\)"):
        layer(torch.randn(2, 16, 16))
    for shape in ((2, 16), (2, 16, 3, 3), (2, 16, 3, 3, 3)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"an input of shape \(2, 3, 3, 16\)"):
        layer(torch.randn(2, 3, 3, 16))
    last = functools.partial(timm.layers.get_norm_layer("layer_channel"), channel_dim=-1)(16)
    assert_close(last(torch.ones(2, 5, 16)), torch.zeros(2, 5, 16))


def test_registered_layers_of_users_take_part(monkeypatch):
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    monkeypatch.setattr(registry, "_BY_TARGET", dict(registry._BY_TARGET))
    before = state_of_timm()
    zoo.register()

    @normzoo.register_norm("halving-norm", family="none", aliases=("halving",))
    class BatchNorm(nn.Module):
        """Halves, under a class name that timm knows."""

        def __init__(self, num_features, *, factor=0.5, device=None, dtype=None):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    try:
        with pytest.raises(KeyError):
            timm.layers.create_norm_layer("halving", 4)
        zoo.register()
        x = images(4, 2)
        for name in ("halving", "halving-norm"):
            assert_close(timm.layers.create_norm_layer(name, 4, eps=1e-5)(x), x / 2)
        for given in ("halving", BatchNorm, functools.partial(BatchNorm, factor=0.5)):
            assert_close(timm.layers.create_norm_act_layer(given, 4, act_layer="relu")(x), torch.relu(x / 2))
            assert_close(timm.layers.create_norm_act_layer(given, 4, act_layer="relu", apply_act=False)(x), x / 2)
    finally:
        zoo.unregister()
    assert state_of_timm() == before


@pytest.mark.parametrize(
    ("module", "table"),
    [(create_norm, "_NORM_MAP"), (create_norm_act, "_NORM_ACT_MAP"), (create_norm_act, "_NORM_ACT_REQUIRES_ARG")],
)
def test_another_timm_is_told_in_a_sentence(monkeypatch, module, table):
    monkeypatch.delattr(module, table)
    text = rf"^timm [\d.]+ has no {module.__name__}.{table}, through which normzoo adds its names: pass norm_layer="
    for change in (zoo.register, zoo.unregister):
        with pytest.raises(RuntimeError, match=text):
            change()
    monkeypatch.undo()
    before = state_of_timm()
    zoo.unregister()
    assert state_of_timm() == before


def test_models_with_names_compile_to_one_graph():
    zoo.register()
    model = nn.Sequential(timm.layers.create_norm_act_layer("group", 8, act_layer="relu"))
    zoo.unregister()
    exported = torch.export.export(model.eval(), (images(8, 4),))
    assert_close(exported.module()(images(8, 4)), model(images(8, 4)))
