"""Norms of unknown classes are known by what they compute, and nothing else is taken for one."""

from __future__ import annotations

import copy
import random
import re
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from convert.own_norms import (
    NORMS,
    NOT_NORMS,
    CommunicatingNorm,
    Counting,
    GemmaRMSNorm,
    GptLayerNorm,
    LlamaRMSNorm,
    MovingBatchNorm,
    Small,
    Vector,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.testing import assert_close

import normzoo
from normzoo import convert_norms
from normzoo.convert._families import Unknown
from normzoo.convert._kinds import kind_of
from normzoo.convert._recognise import Recogniser, recognise


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point() and t.numel() > 1 and name != "beta":
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return module


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_is_what_it_computes(case):
    made, name, shape, options = NORMS[case]
    module = randomized(made())
    model = nn.Sequential(copy.deepcopy(module))
    site = convert_norms(model, name).changed[0]
    assert site.recognised
    assert kind_of(model[0]).name == name
    for option, value in options.items():
        assert getattr(model[0], option) == value, option
    for seed, size in enumerate((1.0, 1e-3, 100.0)):
        x = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + size / 3
        for training in (True, False):
            expected, y = module.train(training)(x), model.train(training)(x)
            assert_close(y, expected, rtol=1e-5, atol=2e-6)
    held = {**dict(module.named_buffers()), "running_mean": None, "running_var": None}
    for ours, theirs in (("running_mean", "moving_mean"), ("running_var", "moving_var")):
        before = held.get(theirs) if theirs in held else getattr(module, ours, None)
        if before is not None and name == "batch":
            assert_close(getattr(model[0], ours), before, rtol=1e-5, atol=1e-5)
    if name != "frozen_batch":
        x = torch.randn(shape, requires_grad=True)
        assert_close(
            torch.autograd.grad(model.train()(x).square().sum(), x),
            torch.autograd.grad(module.train()(x).square().sum(), x),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("case", NOT_NORMS)
def test_nothing_else_is_taken_for_a_norm(case):
    made, said = NOT_NORMS[case]
    module = made()
    known = isinstance(module, nn.BatchNorm2d)
    model = nn.Sequential(nn.Linear(8, 8), module, nn.LayerNorm(8))
    report = convert_norms(model, "rms", exclude="1" if known else None)
    assert model[1] is module
    assert [s.name for s in report.changed] == ["2"]
    if said is None or known:
        assert report.not_recognised == {}
    else:
        assert list(report.not_recognised) == ["1"]
        assert re.search(said, report.not_recognised["1"])
        assert "not recognised as a norm: " in str(report)
    with pytest.raises(ValueError, match=r"Sequential has no normalization layer to convert"):
        convert_norms(nn.Sequential(module), "rms")


def test_a_subclass_that_is_not_the_norm_is_refused_with_what_it_looked_like():
    class Relu(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    text = r"0: its class Relu has a forward of its own, .*; tried, it is closest to batch norm"
    with pytest.raises(ValueError, match=text):
        convert_norms(nn.Sequential(Relu(8)), "group")


def test_a_block_that_holds_a_norm_is_not_taken():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.norm(x) * self.weight

    model = nn.Sequential(Block())
    assert [s.name for s in convert_norms(model, "rms").changed] == ["0.norm"]


@given(
    channels=st.integers(2, 24).filter(lambda c: c not in (1,)),
    exponent=st.floats(-9, -2),
    seed=st.integers(0, 9),
    offset=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_eps_channels_and_offset_are_seen(channels, exponent, seed, offset):
    eps = 10.0**exponent

    class Hidden(Vector):  # eps stands in no attribute
        def forward(self, x):
            scale = 1 + self.weight if offset else self.weight
            return (x - x.mean(1, keepdim=True)) / (x.var(1, False, keepdim=True) + eps).sqrt() * scale.view(-1, 1, 1)

    seen = recognise(randomized(Hidden(channels), seed))
    assert (seen.name, seen.channel_dim, seen.unit_offset) == ("layer_channel", 1, offset)
    assert seen.options["eps"] == pytest.approx(eps, rel=1e-6)


def test_trying_changes_nothing():
    module = Counting(8)
    module.weight.grad = torch.ones(8)
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    module.register_forward_pre_hook(lambda *_: called.append(1))
    module.weight.register_hook(lambda g: called.append(1))
    before = (module.weight.clone(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    attributes, version = dict(vars(module)), module.weight._version
    Counting.calls, Counting.seen = 5, [1]
    assert recognise(module).name == "layer_channel"
    assert (Counting.calls, Counting.seen, called) == (5, [1], [])
    assert vars(module).keys() == attributes.keys()
    assert all(vars(module)[n] is v for n, v in attributes.items())
    assert torch.equal(module.weight, before[0])
    assert module.weight._version == version
    assert torch.equal(module.weight.grad, torch.ones(8))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[3]).all()
    assert module.training


def test_trying_is_silent(capsys):
    recognise(Counting(8))
    assert capsys.readouterr() == ("", "")


def test_a_counter_of_the_module_itself_is_no_part_of_the_model():
    module = Counting(8)
    convert_norms(nn.Sequential(module), "rms")
    assert not hasattr(module, "mine")


class Far(torch.Tensor):
    pass


def test_what_cannot_be_tried_is_listed():
    class Heavy(Vector):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def forward(self, x):
            return self.norm(x)

    with torch.device("meta"):
        meta = GptLayerNorm(8)
    other = GptLayerNorm(8)
    other.weight = nn.Parameter(torch.ones(8).as_subclass(Far))
    referring = GptLayerNorm(8)
    referring.__dict__["parent"] = [nn.Linear(4, 4)]
    patched = GptLayerNorm(8)
    patched.forward = lambda x: x
    cached = GptLayerNorm(8)
    cached.cache = [torch.zeros(2**21)]
    generator = GptLayerNorm(8)
    generator.lock = __import__("threading").Lock()
    told = {
        "meta device": meta,
        "holds a Far": other,
        "refers to a Linear that is no submodule": referring,
        "a forward of its own that is no method": patched,
        "more than 1,048,576 values": cached,
        "cannot be copied": generator,
    }
    for text, module in told.items():
        seen = recognise(module)
        assert isinstance(seen, Unknown), text
        assert text in seen.text
        report = convert_norms(nn.Sequential(module, nn.LayerNorm(8)), "rms")
        assert text in report.not_recognised["0"]
    heavy = Heavy(2**21)
    assert "more than 1,048,576 values" in recognise(heavy).text
    assert recognise(nn.Embedding(4, 8)) is None
    assert recognise(nn.PReLU(8)) is None


def test_distributed_tensors_are_not_tried():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        module = GptLayerNorm(8)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,))))
        assert recognise(module).text == "it holds a DTensor"
        assert "it communicates with other ranks" in recognise(CommunicatingNorm(8)).text
    finally:
        dist.destroy_process_group()


def test_a_forward_bound_to_the_instance_is_tried():
    module = GptLayerNorm(8)
    module.forward = lambda x: x
    module.forward = (lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, 1e-5)).__get__(module)
    assert recognise(module).name == "rms"
    known = nn.LayerNorm(8)
    known.forward = (lambda self, x: F.rms_norm(x, (8,), self.weight, 1e-5) + self.bias).__get__(known)
    model, x = nn.Sequential(known), torch.randn(4, 5, 8)
    y = model(x)
    convert_norms(model, {"name": "rms", "bias": True})
    assert_close(model(x), y)


@pytest.mark.parametrize("norm", [GptLayerNorm, LlamaRMSNorm, GemmaRMSNorm])
def test_a_language_model_of_its_own_norms(norm):
    torch.manual_seed(0)
    model = randomized(Small(norm=norm))
    tokens = torch.randint(0, 11, (3, 7))
    with torch.no_grad():
        expected = model(tokens)
        same = "layer_channel" if norm is GptLayerNorm else "rms"
        weight = model.ln_f.weight
        report = convert_norms(model, same)
        assert list(report.recognised) == ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]
        assert_close(model(tokens), expected, rtol=1e-6, atol=1e-6)
    assert (model.ln_f.weight is weight) == (norm is not GemmaRMSNorm)
    assert model.ln_f.weight.requires_grad
    if norm is GemmaRMSNorm:
        assert_close(model.ln_f.weight, 1 + weight)
        assert "its weight is a new parameter of 1 + weight: make optimizers anew" in report.changed[0].warnings
    assert "recognised by what it computes: h.0.ln_1 and 4 more: " in str(report)
    assert report.to_dict()["changed"][0]["recognised"] == report.recognised["h.0.ln_1"]
    assert model(tokens).isfinite().all()


def test_modules_of_one_class_and_attributes_are_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr("normzoo.convert._recognise.recognise", lambda m: tried.append(m) or recognise(m))
    tries = Recogniser()
    several = [LlamaRMSNorm(8), LlamaRMSNorm(8), LlamaRMSNorm(8, 1e-5), LlamaRMSNorm(4), GemmaRMSNorm(8)]
    seen = [tries(m) for m in several]
    assert len(tried) == 4
    assert [s.options["eps"] for s in seen] == [1e-6, 1e-6, 1e-5, 1e-6, 1e-6]
    frozen = several[0].requires_grad_(False)
    model = nn.Sequential(frozen, several[1])
    convert_norms(model, "rms")
    assert [m.weight.requires_grad for m in model] == [False, True]


def test_a_bias_that_is_a_buffer():
    for value, kept in ((0.0, False), (0.5, True)):
        module = NORMS["buffer"][0]()
        module.beta.fill_(value)
        model, x = nn.Sequential(module), torch.randn(4, 5, 8)
        y = module(x)
        report = convert_norms(model, "layer_channel")
        assert_close(model(x), y)
        assert (model[0].bias is not None) == kept
        if kept:
            assert not model[0].bias.requires_grad
            assert "its bias was a buffer and is a parameter that is not trained" in report.changed[0].warnings


def test_the_biased_variance_is_said():
    model = nn.Sequential(MovingBatchNorm(8, unbiased=False))
    assert "its running variance was the biased one" in convert_norms(model, "batch").changed[0].warnings[0]


@pytest.mark.parametrize("case", ["moving", "subclass", "activated", "detector"])
def test_recognised_batch_norms_fold(case):
    torch.manual_seed(0)
    module = randomized(NORMS[case][0]())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module, nn.ReLU()).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    y = model(x)
    normzoo.fold_norms(model, x)
    assert type(model[1]) in (nn.Identity, nn.LeakyReLU)
    assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_what_the_user_says():
    module = randomized(NOT_NORMS["outside eps"][0]())
    model, x = nn.Sequential(module, nn.LayerNorm(8)), torch.randn(4, 5, 8)
    y = model[0](x)
    treat = {"0": {"name": "positional", "weight": "a_2", "bias": "b_2", "channel_dim": -1, "unbiased": True}}
    report = convert_norms(model, {"name": "positional", "unbiased": True}, treat=treat, include="0")
    assert_close(model[0](x), y, rtol=1e-4, atol=1e-4)
    assert report.recognised == {"0": "positional, as treat says"}
    gated = nn.Sequential(NOT_NORMS["gated"][0](), GemmaRMSNorm(8))
    twin = copy.deepcopy(gated)
    convert_norms(gated, "layer_channel", treat={"0": "layer_channel"}, include="0")
    assert_close(gated(x), twin(x))
    convert_norms(gated, "rms", include="1", treat={"1": {"name": "rms", "add_unit_offset": True, "eps": 1e-6}})
    assert_close(gated(x), twin(x))
    both = nn.Sequential(NOT_NORMS["both layouts"][0]())
    convert_norms(both, "rms", treat={"*": {"name": "layer_channel", "channel_dim": 1}})
    assert both[0].channel_dim == 1
    with torch.device("meta"):
        meta = nn.Sequential(LlamaRMSNorm(8))
    convert_norms(meta, "rms", treat={"*": "rms"})
    assert (meta[0].channel_dim, meta[0].eps, meta[0].weight.is_meta) == (-1, 1e-6, True)


@pytest.mark.parametrize(
    ("treat", "error", "message"),
    [
        ({"7": "rms"}, ValueError, r"treat names '7', and no module that may be a norm has such a name"),
        ({"1": "rms"}, ValueError, r"treat says what 1 is, and its class is known already; leave it out"),
        ({"0": "rsm"}, normzoo._errors.UnknownNameError, r"did you mean 'rms'"),
        ({"0": {"name": "rms", "epz": 1}}, TypeError, r"treat\['0'\] has no key 'epz'; did you mean 'eps'\?"),
        ({"0": {"eps": 1}}, TypeError, r"must be a norm's name or a mapping with its name, not \{'eps': 1\}"),
        ({"0": {"name": "rms", "channel_dim": 2}}, ValueError, r"has channel_dim=2; it must be 1 or -1"),
        ({"0": {"name": "rms", "weight": "w"}}, ValueError, r"treat names 'w' as its weight, and it holds weight"),
        (["rms"], TypeError, r"treat must be a mapping \{name pattern: norm\}, not list"),
    ],
)
def test_mistakes_in_what_the_user_says(treat, error, message):
    model = nn.Sequential(LlamaRMSNorm(8), nn.LayerNorm(8))
    with pytest.raises(error, match=message):
        convert_norms(model, "group", treat=treat)
    extra = nn.Sequential(NOT_NORMS["extra"][0]())
    with pytest.raises(ValueError, match=r"its parameter factor is neither weight nor bias by its name"):
        convert_norms(extra, "rms", treat={"*": "rms"})


def test_only_conversion_and_folding_try_on_their_own():
    model = nn.Sequential(nn.Linear(8, 8), GemmaRMSNorm(8), MovingBatchNorm(8))
    plain = normzoo.param_groups(model, 0.1)
    assert [len(g["params"]) for g in plain] == [4, 1]
    report = convert_norms(copy.deepcopy(model), "rms")
    for recognised in (True, report):
        groups = normzoo.param_groups(model, 0.1, recognise=recognised)
        assert [len(g["params"]) for g in groups] == [1, 4]
    with pytest.raises(TypeError, match=r"recognise must be True, False or the report of a conversion, not 'yes'"):
        normzoo.param_groups(model, 0.1, recognise="yes")
    with pytest.raises(ValueError, match=r"no layer to freeze"):
        normzoo.freeze_norms(model)
    for recognised in (True, report):
        twin = copy.deepcopy(model)
        assert [s.name for s in normzoo.freeze_norms(twin, recognise=recognised).changed] == ["2"]
        x = torch.randn(4, 8)
        assert_close(twin.eval()[2](x), model.eval()[2](x))
        assert not list(twin[2].parameters())


def test_predicates_are_asked_about_norms_only():
    """Norms have num_features or normalized_shape; a layer scale, which is tried too, has neither."""

    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x):
            return x * self.gamma

    class Rms(nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    def model():
        return nn.Sequential(nn.Linear(8, 8), LayerScale(), Rms(), nn.BatchNorm1d(8))

    asked = []

    def wide(name, norm):
        asked.append(name)
        return norm.num_features > 4

    def converted(**options):
        return [site.name for site in normzoo.convert_norms(model(), "none", **options).changed]

    assert converted(include=wide) == ["2", "3"]
    assert set(asked) == {"2", "3"}
    assert converted(exclude=lambda name, norm: name == "2") == ["3"]
    assert converted(exclude="2") == ["3"]
