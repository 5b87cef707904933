"""Parameter groups, without weight decay for norms and biases."""

from __future__ import annotations

import math

import pytest
import timm
import timm.layers as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_small import resnet
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo import param_groups


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OwnZoo(type(normzoo.create_norm("batch", 2))):
    """A subclass that the registry does not know."""


RESNET = ["bn", "conv1.1", "conv1.4", "downsample.2"]  # where timm's test_resnet has its norms


def models():
    def small(name, **options):
        return timm.create_model(name, num_classes=3, **options)

    made = {
        "resnet": (lambda: small("test_resnet"), RESNET),
        "vit": (lambda: small("vit_tiny_patch16_224", depth=2), ["norm"]),
        "convnext": (lambda: small("convnext_atto", depths=(1, 1, 1, 1)), ["norm", "downsample.0", "stem.1"]),
    }
    for norm in ("batch_renorm", "evonorm_b0", "filter_response", "switchable", "dynamic_tanh"):
        made[norm] = (lambda norm=norm: resnet(norm), RESNET)
    return made


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("decay_biases", [False, True])
def test_each_parameter_is_in_one_group(name, decay_biases):
    make, norms = models()[name]
    model = make()
    groups = param_groups(model, 0.1, decay_biases=decay_biases)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(g.keys() == {"params", "weight_decay"} for g in groups)
    decayed, spared = ({id(p) for p in g["params"]} for g in groups)
    for key, param in model.named_parameters():
        path, _, local = key.rpartition(".")
        last_two = ".".join(path.split(".")[-2:])
        a_norm = any(path.split(".")[-1].startswith(n) or last_two == n or path == n for n in norms)
        a_norm = a_norm or (name == "convnext" and last_two.endswith("downsample.0"))
        assert (id(param) in spared) == (a_norm or (local == "bias" and not decay_biases)), key
        assert (id(param) in decayed) != (id(param) in spared)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for k, p in model.named_parameters():
        assert_close(p.detach(), weights[k] * (1 - 0.05 * (id(p) in decayed)))


def test_all_parameters_of_norms_are_spared_whatever_their_name():
    for name in normzoo.list_norms():
        layer = normzoo.get_norm(name)(32)
        if list(layer.parameters()):
            groups = param_groups(layer, 0.1, decay_biases=True)
            assert [g["weight_decay"] for g in groups] == [0.0], name
            assert len(groups[0]["params"]) == len(list(layer.parameters()))


def test_norms_of_other_authors_gains_and_attention():
    conv = nn.Sequential(nn.Conv2d(4, 4, 1))
    normzoo.standardize_weights(conv, "scaled_ws")
    gru, attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)
    model = nn.ModuleList([OwnForward(4), OwnZoo(4), conv, gru, attention, tl.evo_norm.EvoNorm2dS0(32), nn.PReLU()])
    spared = {id(p) for p in param_groups(model, 0.1)[1]["params"]}
    names = sorted(k for k, p in model.named_parameters() if id(p) in spared)
    gate = ["3.bias_ih_l0", "3.bias_hh_l0"]
    of_attention = ["4.in_proj_bias", "4.bias_k", "4.bias_v", "4.out_proj.bias"]
    of_norms = ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.gain", "5.weight", "5.bias", "5.v"]
    assert names == sorted([*of_norms, "2.0.bias", *gate, *of_attention])
    biased = param_groups(model, 0.1, decay_biases=True)[1]["params"]
    assert sorted(map(id, biased)) == sorted(id(p) for k, p in model.named_parameters() if k in of_norms)


def test_shared_and_fixed_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[2].weight, model[3].weight = model[0].weight, model[1].weight
    model[0].bias.requires_grad_(False)
    decayed, spared = param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in spared["params"]] == [
        id(p) for p in (model[1].weight, model[1].bias, model[2].bias, model[3].bias)
    ]
    tied = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    tied[0].bias = tied[1].weight  # a norm's wherever else it is used
    assert len(param_groups(tied, 0.1, decay_biases=True)[1]["params"]) == 2


@given(
    kinds=st.lists(st.sampled_from(["linear", "norm", "batch", "fixed"]), min_size=1, max_size=6), biases=st.booleans()
)
@settings(max_examples=40)
def test_groups_partition_what_is_trained(kinds, biases):
    make = {
        "linear": lambda: nn.Linear(3, 3),
        "norm": lambda: nn.LayerNorm(3),
        "batch": lambda: normzoo.create_norm("batch", 3),
        "fixed": lambda: nn.Linear(3, 3).requires_grad_(False),
    }
    model = nn.Sequential(*(make[k]() for k in kinds))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    if not trained:
        with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
            param_groups(model, 0.1, decay_biases=biases)
        return
    groups = param_groups(model, 0.1, decay_biases=biases)
    assert all(g["params"] for g in groups)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trained)
    torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("decay", [-0.1, math.nan])
def test_a_negative_weight_decay_is_refused(decay):
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        param_groups(nn.Linear(2, 2), decay)


def spared_names(model, **options):
    groups = param_groups(model, 0.1, **options)
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    return {name for name, param in model.named_parameters() if id(param) in spared}


def test_patterns_spare_more():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    before = spared_names(model)
    assert spared_names(model, spare="pos_embed") - before == {"pos_embed"}
    assert spared_names(model, spare=["pos_*", "blocks.[01].attn.proj.weight"]) - before == {
        "pos_embed",
        "blocks.0.attn.proj.weight",
        "blocks.1.attn.proj.weight",
    }
    with pytest.raises(ValueError, match=r"^spare: 'pos_embd' matches no parameter; did you mean 'pos_embed'"):
        param_groups(model, 0.1, spare=["cls_token", "pos_embd"])


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        (
            "xcit_nano_12_p8_224",
            {
                "cls_token",
                "pos_embed.token_projection.weight",
                "blocks.0.attn.temperature",
                "blocks.1.attn.temperature",
            },
        ),
    ],
)
def test_models_say_what_to_spare_also_inside_of_others(name, named):
    model = timm.create_model(name, depth=2, num_classes=3)
    if "pos_embed.*" not in model.no_weight_decay():  # timm 1.0.21 says pos_embed, which in xcit names no parameter
        named = named - {"pos_embed.token_projection.weight"}
    assert spared_names(model, use_no_weight_decay=True) - spared_names(model) == named
    outer = nn.ModuleDict({"net": model, "head": nn.Linear(3, 3)})
    assert spared_names(outer, use_no_weight_decay=True) - spared_names(outer) == {f"net.{n}" for n in named}


def test_a_shared_parameter_is_spared_by_either_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert "a.weight" in spared_names(model, spare="b.weight")
