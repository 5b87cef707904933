"""Symbolic tracing by every kind of tracer, and TorchScript."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from norm_cases import CHANNELS, IMAGE, ONE_EACH, assert_state, every_layer, gradients, sample, state_of, train_and_eval
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import normzoo
import normzoo.timm
from normzoo.layers._base import NormLayer

NAMES = [case.name for case in ONE_EACH]
X = sample(IMAGE, torch.float32)
RGB = sample((2, 3, 32, 32), torch.float32)


@every_layer
def test_a_layer_traced_alone_is_that_layer(case):
    layer, twin = case.made(), case.made()
    graph = torch.fx.symbolic_trace(layer)
    graph.graph.lint()
    for training in (True, False, True):
        got = gradients(graph.train(training), X, torch.ones_like(X))
        for name, value in gradients(twin.train(training), X, torch.ones_like(X)).items():
            assert torch.equal(got[name if name in ("x", "y") else f"leaf.{name}"], value), name
    assert_state(layer, state_of(twin), rtol=0)
    y = twin.eval()(X)
    made_of_both = torch.fx.GraphModule(layer, torch.fx.Tracer().trace(layer))
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), made_of_both):
        assert torch.equal(other.eval()(X), y)
    assert torch.equal(torch.fx.Interpreter(graph.eval()).run(X), y)


def test_a_layer_called_in_any_way_and_twice_is_recorded_each_time():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([normzoo.create_norm("group", CHANNELS, groups=2)])

        def forward(self, x):
            (norm,) = self.norms
            return norm.forward(norm(x=norm(x)))

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["norms.0"] * 3
    assert torch.equal(graph(X), model(X))


def test_hooks_run_in_the_traced_model_and_not_while_it_is_traced():
    layer, seen = normzoo.create_norm("batch_renorm", CHANNELS), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer)).eval()
    assert not seen
    assert torch.equal(graph(X), layer(X))
    assert seen == [IMAGE, IMAGE]


def test_a_layer_that_the_traced_model_does_not_hold_is_named():
    layer = normzoo.create_norm("switchable", CHANNELS)
    text = "torch.fx cannot record a call of SwitchableNorm, since the traced model does not hold this layer: assign it"
    with pytest.raises(NameError, match=text):
        torch.fx.symbolic_trace(lambda x: layer.forward(x))
    with pytest.raises(NameError, match=text):
        layer(torch.fx.Proxy(torch.fx.Graph().placeholder("x")))


def test_a_layer_of_the_user_that_derives_from_ours_is_recorded_too():
    class Halved(NormLayer):
        def normalize(self, x):
            return x / 2 if x.shape[1] > 1 else x

    graph = torch.fx.symbolic_trace(nn.Sequential(Halved(CHANNELS)))
    assert torch.equal(graph(X), X / 2)


@pytest.mark.parametrize("method", ["ws", "scaled_ws"])
def test_convolutions_with_standardized_weights_are_recorded(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    normzoo.standardize_weights(model, method)
    for module, x in ((model, RGB), (model[0], RGB)):
        graph = torch.fx.symbolic_trace(module)
        for other in (graph, pickle.loads(pickle.dumps(graph))):
            assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile (Standardized|Scaled)Conv2d"):
        _scripted(model)


FEW = ("batch_renorm", "evonorm_b0", "proxy")


@pytest.fixture
def timm_names():
    normzoo.timm.register()
    yield
    normzoo.timm.unregister()


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_timm_extracts_features_by_fx(name, timm_names):
    features, x = [], sample((2, 3, 64, 64), torch.float32)
    for how in ("fx", "hook"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", norm_layer=name, features_only=True, feature_cls=how)
        features.append(model.eval()(x))
    for got, want in zip(*features, strict=True):
        assert torch.equal(got, want)


@train_and_eval
def test_torchvision_extracts_features_at_layers_by_their_names(training):
    model, twin = (_cifar_resnet().train(training) for _ in range(2))
    graph = create_feature_extractor(model, ["layer1.0.bn1", "layer2"])
    found = graph.train(training)(RGB)
    wanted = {}
    for name in ("layer1.0.bn1", "layer2"):
        twin.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: wanted.update({name: y}))
    twin(RGB)  # with activations in place, which the features show as well
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(graph.get_submodule("bn1").running_mean, twin.bn1.running_mean)


def _cifar_resnet() -> nn.Module:
    torch.manual_seed(0)
    return normzoo.create_model("resnet20_cifar", "batch_renorm")


def test_traced_models_are_pickled():
    model = _cifar_resnet().eval()
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    assert torch.equal(graph(RGB), model(RGB))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantization_leaves_layers_in_floating_point():
    layer = normzoo.create_norm("group", 8, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (RGB,))
    prepared(RGB)
    quantized = convert_fx(prepared)
    assert type(quantized.get_submodule("1")) is type(layer)
    assert (quantized(RGB) - model(RGB)).abs().max() < 0.1


def _scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(model)


@every_layer
def test_torchscript_is_refused_in_one_sentence(case):
    layer = case.make()
    text = rf"torch\.jit\.script cannot compile {type(layer).__name__}, whose Python code .* use torch\.export\.export,"
    for model in (layer, nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"norm": layer}))):
        with pytest.raises(RuntimeError, match=text) as caught:
            _scripted(model)
        assert "\n" not in str(caught.value)


@train_and_eval
@every_layer
def test_torch_jit_trace_records_operations(case, training):
    layer, twin = (case.made().train(training) for _ in range(2))
    if training and case.name in ("batch_instance", "online", "power"):
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.trace cannot record .* in training, .* call eval"):
            _jit_traced(layer)
        return
    traced = _jit_traced(layer)
    torch.jit.save(traced, io.BytesIO())
    twin(X)
    for i in range(3):  # the interpreter profiles, then optimizes
        other = sample(IMAGE, torch.float32, seed=i)
        assert_close(traced(other), twin(other), rtol=1e-5, atol=1e-5)
    assert_state(layer, state_of(twin), rtol=1e-5, atol=1e-6)


def _jit_traced(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(layer, X, check_trace=False)
