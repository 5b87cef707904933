"""One contract, kept by every layer of the registry: its formula, its edges, its errors.

``norm_cases.py`` says what each layer is held against; ``test_contract_torch.py`` holds the layers against PyTorch.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from norm_cases import (
    CASES,
    CHANNELS,
    DEGENERATE,
    IMAGE,
    ONE_EACH,
    SEQUENCE,
    SHAPED,
    assert_state,
    every_case,
    every_layer,
    gradients,
    sample,
    state_of,
    train_and_eval,
)
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call
from torch.testing import assert_close

import normzoo
from normzoo import registry


def _cumulative(case) -> bool:
    """Whether ``momentum=None`` makes running statistics the average of all batches."""
    return "momentum" in case.defaults and case.name != "online"


def test_every_registered_layer_has_a_case(monkeypatch):
    def without() -> set[str]:
        return set(normzoo.list_norms()) ^ {case.name for case in CASES}

    assert without() == set()
    monkeypatch.setitem(registry._NORMS, "planted", normzoo.norm_info("batch"))
    assert without() == {"planted"}
    assert len({str(case) for case in CASES}) == len(CASES)


@every_layer
def test_signature_is_the_promised_one(case):
    first, *rest = inspect.signature(normzoo.norm_info(case.name).layer_class).parameters.values()
    assert (first.name, first.kind) == ("num_features", first.POSITIONAL_OR_KEYWORD)
    assert first.default is first.empty
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)
    assert [p.name for p in rest][-5:] == ["affine", "act_layer", "channel_dim", "device", "dtype"]


@every_layer
def test_the_activation_asked_for_follows(case):
    plain, twin, rectified = (case.made(act_layer=a, dtype=torch.float64) for a in (None, None, nn.ReLU))
    x = sample(IMAGE)
    y = plain(x)
    assert y.min() < 0
    if case.name == "proxy":  # whose activation is inside the formula
        want, _ = case.expect(rectified, x)
        assert (want - y).abs().max() > 0.1
    else:
        want = twin(x).relu()
    assert_close(rectified(x), want, rtol=1e-11, atol=1e-11)


@train_and_eval
@pytest.mark.parametrize(("case", "shape"), SHAPED)
def test_output_and_statistics_equal_the_reference(case, shape, training):
    layer = case.made(dtype=torch.float64).train(training)
    for step in range(3):
        x = sample(shape, seed=step)
        kept = x.clone()
        y, state = case.expect(layer, x)
        assert_close(layer(x), y, rtol=1e-11, atol=1e-11)
        assert_state(layer, state, rtol=1e-11, atol=1e-11)
        assert torch.equal(x, kept)


@every_layer
def test_every_held_value_shows_in_the_output(case):
    """What a case draws for parameters and buffers is far enough from nothing for a wrong one to be seen."""
    x, of_backward = sample(IMAGE if IMAGE in case.shapes else case.shapes[-1]), ("drift_mean", "drift_scale", "ema_gz")
    for name in case.make().state_dict().keys() - {*of_backward, "num_batches_tracked"}:
        differences = []
        for training in (True, False):
            layer, other = (case.made(dtype=torch.float64).train(training) for _ in range(2))
            other.state_dict()[name].mul_(1.5).add_(0.2)
            differences.append((case.expect(layer, x)[0] - case.expect(other, x)[0]).abs().max().item())
        assert max(differences) > 1e-3, name


@train_and_eval
@every_case
def test_without_affine_it_is_the_layer_at_its_start(case, training):
    plain, fresh = case.make(affine=False).train(training), case.make().train(training)
    assert {k for k, _ in plain.named_parameters()} == {k for k, _ in fresh.named_parameters()} - {"weight", "bias"}
    x = sample(IMAGE, torch.float32)
    assert_close(plain(x), fresh(x), rtol=1e-6, atol=1e-6)


@train_and_eval
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("case", "shape"), SHAPED)
def test_gradcheck(case, shape, affine, training):
    layer = case.made(affine=affine, dtype=torch.float64, **case.smooth).train(training)
    names, values = list(dict(layer.named_parameters())), list(layer.parameters())
    inputs = [v.detach().clone().requires_grad_() for v in (sample(shape), *values)]

    def check() -> bool:
        return torch.autograd.gradcheck(
            lambda x, *p: functional_call(layer, dict(zip(names, p, strict=True)), (x,)),
            inputs,
            fast_mode=len(shape) > 2,
        )

    if not case.differentiates[0 if training else 1]:
        with pytest.raises(GradcheckError):
            check()
        return
    assert check()


@train_and_eval
@pytest.mark.parametrize(("case", "shape"), [s for s in SHAPED if len(s.values[1]) > 2])
def test_channel_dim_last_is_the_transpose(case, shape, training):
    first, last = (case.made(channel_dim=d).train(training) for d in (1, -1))
    x, dy = sample(shape, torch.float32), sample(shape, torch.float32, seed=1)
    one = gradients(first, x, dy)
    two = gradients(last, x.movedim(1, -1).contiguous(), dy.movedim(1, -1).contiguous())
    for name, value in one.items():
        assert_close(two[name].movedim(-1, 1) if value.ndim > 1 else two[name], value, rtol=1e-5, atol=1e-5)
    assert_state(last, state_of(first), rtol=1e-5)


@train_and_eval
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
@every_case
def test_large_offset_does_not_cancel(case, memory_format, training):
    layer = case.made().train(training)
    if "running_mean" in layer.state_dict():
        layer.running_mean += 1e4
    x = (sample((8, CHANNELS, 8, 8), torch.float32) / 2 + 1e4).contiguous(memory_format=memory_format)
    y, state = case.expect(layer, x)
    # A few units in the last place of 1e4, which is 1e-3, also where the offset stays in the output; through
    # E[x^2] - E[x]^2 the variance is off by 1e1.
    assert_close(layer(x).double(), y, rtol=1e-4, atol=1e-2)
    assert_state(layer, state, rtol=1e-3, atol=1e-4)


@train_and_eval
@pytest.mark.parametrize("shape", DEGENERATE, ids=str)
@every_case
def test_single_values_are_normalized_or_refused(case, shape, training):
    layer, twin = (case.made().train(training) for _ in range(2))
    x = sample(shape, torch.float32)
    if case.refuses_shape(shape, training):
        with pytest.raises(ValueError, match=case.refusal):
            layer(x)
        return
    y, state = case.expect(layer, x)
    assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-4)  # float32 scaled by 1 / sqrt(eps)
    assert_state(layer, state, rtol=1e-5, atol=1e-6)
    assert all(v.isfinite().all() for v in gradients(twin, x, torch.ones_like(x)).values())


@train_and_eval
@every_case
def test_a_refused_batch_leaves_no_trace(case, training):
    layer = case.made().train(training)
    before = state_of(layer)
    refused = [shape for shape in DEGENERATE if case.refuses_shape(shape, training)]
    for shape in [(2, CHANNELS + 1), *refused]:
        with pytest.raises(ValueError, match="input (of|has) shape"):
            layer(torch.zeros(shape))
        assert_state(layer, before, rtol=0)


@train_and_eval
@pytest.mark.parametrize("shape", [(0, CHANNELS), (0, CHANNELS, 4, 4), (2, CHANNELS, 0, 3)], ids=str)
@every_case
def test_empty_batch_changes_nothing(case, shape, training):
    layer = case.made().train(training)
    before = state_of(layer)
    got = gradients(layer, torch.zeros(shape), torch.zeros(shape))
    assert got["y"].shape == got["x"].shape == shape
    assert_state(layer, before, rtol=0)


@every_layer
def test_empty_batch_gives_every_parameter_a_zero_gradient(case):
    """DistributedDataParallel waits for a gradient of every parameter; torch.nn.BatchNorm2d gives zeros."""
    got = gradients(case.made(), torch.zeros(0, CHANNELS, 4, 4), torch.zeros(0, CHANNELS, 4, 4))
    assert {k: v is not None and not v.any() for k, v in got.items()} == dict.fromkeys(got, True)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if _cumulative(c)], ids=str)
def test_without_momentum_running_statistics_are_the_average_of_all_batches(case):
    """Each batch's own statistics are what ``momentum=1`` leaves."""
    options = {"dtype": torch.float64, **({"warmup": 0} if case.name == "power" else {})}
    layer = case.make(momentum=None, **options)
    of_batch = []
    for seed in range(5):
        x, alone = sample((4, CHANNELS, 3), seed=seed), case.make(momentum=1.0, **options)
        layer(x)
        alone(x)
        of_batch.append(dict(alone.named_buffers()))
    running = {k: v for k, v in layer.named_buffers() if k.startswith("running_")}
    assert running
    for name, value in running.items():
        values = torch.stack([held[name] for held in of_batch])
        if name == "running_var" and case.name in ("batch_renorm", "l1_batch"):  # the average is of deviations
            eps = layer.eps if case.name == "batch_renorm" else 0
            values, value = (values + eps).sqrt(), (value + eps).sqrt()
        assert_close(value, values.mean(0), rtol=1e-6, atol=1e-6)


@every_layer
def test_bad_input_is_refused_with_a_reason(case):
    layer, name = case.make(), normzoo.norm_info(case.name).layer_class.__name__
    for shape in (*case.shapes, (0, CHANNELS)):
        wrong = (*shape[:1], CHANNELS + 1, *shape[2:])
        text = f"{name} was made for 6 channels; the input of shape {wrong} has 7 at dimension 1"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            layer(torch.zeros(wrong))
    with pytest.raises(ValueError, match=r"made for 6 channels; .* \(2, 6, 5\) has 5 at dimension -1$"):
        case.make(channel_dim=-1)(torch.zeros(2, 6, 5))
    with pytest.raises(ValueError, match=rf"^{name} takes floating-point input; the input has dtype torch.int64$"):
        layer(torch.zeros(SEQUENCE, dtype=torch.int64))
    for shape in ((CHANNELS,), ()):
        with pytest.raises(
            ValueError, match=rf"^{name} takes \(N, C\), .*; the input has shape {re.escape(str(shape))}$"
        ):
            layer(torch.zeros(shape))


@every_layer
def test_bad_options_are_refused_with_a_reason(case):
    with pytest.raises(TypeError, match=rf"norm '{case.name}' has no option 'afine'; did you mean 'affine'\?"):
        normzoo.get_norm(case.name, afine=True)
    with pytest.raises(TypeError, match="afine"):
        normzoo.norm_info(case.name).layer_class(CHANNELS, afine=True)
    with pytest.raises(ValueError, match=r"channel_dim must be 1 .* or -1 .*, not 2$"):
        case.make(channel_dim=2)
    with pytest.raises(ValueError, match=r"^num_features must be at least 1, not 0$"):
        normzoo.create_norm(case.name, 0)
    if "eps" in case.defaults:
        with pytest.raises(ValueError, match=r"^eps must not be negative, got -1"):
            case.make(eps=-1.0)
    if "momentum" in case.defaults:
        for momentum in (1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match=rf"^momentum is the update rate.*, from 0 to 1, .*not {momentum}$"):
                case.make(momentum=momentum)


BAD_OPTIONS = [
    ("switchable", {"unbiased_instance": True, "sync": True}, "unbiased_instance is for the weights of one rank"),
    ("ghost_batch", {"ghost_size": 0}, r"^ghost_size must be at least 1, not 0$"),
    *((n, {"groups": 4}, "^groups=4 does not divide 6 channels") for n in ("batch_group", "iter_norm", "power")),
    *((n, {"groups": 4}, "^groups=4 does not divide 6 channels") for n in ("group", "evonorm_s0", "proxy")),
    ("iter_norm", {"iterations": -1}, r"^iterations must not be negative, got -1$"),
    ("evonorm_b0", {"act_layer": "gate"}, r"^act_layer must be 'max', None or what makes an activation, not 'gate'$"),
    ("evonorm_s0", {"act_layer": "max"}, r"^act_layer must be 'gate', None or what makes an activation, not 'max'$"),
    ("filter_response", {"act_layer": "relu"}, r"^act_layer must be 'tlu', None or .*, not 'relu'$"),
    ("online", {"momentum_backward": 1.5}, r"^momentum_backward is the update rate .*, from 0 to 1, not 1.5$"),
    ("online", {"compensation": "ac"}, r"^compensation must be 'clamp', 'layer' or None, not 'ac'$"),
    ("online", {"clamp_value": 0.0}, r"^clamp_value must be positive, not 0.0$"),
    ("power", {"momentum_backward": -0.5}, r"^momentum_backward is an update rate, from 0 to 1, not -0.5$"),
    ("power", {"warmup": -1}, r"^warmup is a number of batches, not -1$"),
    ("local_response", {"size": 0}, r"^size must be at least 1, not 0$"),
    ("local_response", {"k": 0.0}, r"^k must be positive, .*, not 0.0$"),
    ("divisive", {"mean_window": 0}, r"^windows must be at least 1 wide, not 0 and 5$"),
    ("divisive", {"sigma": 0.0}, r"^sigma must be positive, .*, not 0.0$"),
    ("proxy", {"samples": 1}, r"^samples must be at least 2, not 1$"),
    ("proxy", {"proxy_eps": -1.0}, r"^proxy_eps must not be negative, got -1.0$"),
]


@pytest.mark.parametrize(("name", "options", "text"), BAD_OPTIONS)
def test_a_layers_own_options_are_checked(name, options, text):
    with pytest.raises(ValueError, match=text):
        normzoo.create_norm(name, CHANNELS, **options)


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("affine", {"weight_init": 0.1}, {"weight": 0.1, "bias": 0.0}),
        ("dynamic_tanh", {}, {"alpha": 0.5}),
        ("dynamic_tanh", {"alpha_init": 0.8}, {"alpha": 0.8, "weight": 1.0, "bias": 0.0}),
        ("derf", {}, {"alpha": 0.5, "shift": 0.0}),
        ("derf", {"alpha_init": 0.8, "shift_init": 0.3}, {"alpha": 0.8, "shift": 0.3}),
        ("divisive", {"learn_sigma": True}, {"sigma": 0.5}),
        ("batch_instance", {}, {"gate": 1.0}),
        ("switchable", {}, {"mean_weight": 1.0, "var_weight": 1.0, "running_var": 1.0}),
        ("evonorm_b0", {}, {"v": 1.0, "weight": 1.0, "running_var": 1.0}),
        ("evonorm_s0", {"groups": 2}, {"v": 1.0}),
        ("filter_response", {}, {"tau": 0.0}),
        ("proxy", {}, {"proxy_weight": 0.0, "proxy_bias": 0.0}),
        ("online", {}, {"running_mean": 0.0, "running_var": 1.0, "drift_mean": 0.0, "drift_scale": 0.0}),
        ("power", {}, {"running_phi": 1.0, "ema_gz": 0.0}),
    ],
)
def test_initial_values(name, options, values):
    layer = normzoo.create_norm(name, CHANNELS, **options)
    for _ in range(2):
        held = layer.state_dict()
        assert all(torch.equal(held[k], torch.full_like(held[k], v)) for k, v in values.items())
        layer.load_state_dict({k: v + 1 for k, v in held.items()})
        layer.reset_parameters()


@pytest.mark.parametrize("name", ["layer_channel", "positional"])
def test_a_single_channel_is_not_normalized_over_channels(name):
    layer = normzoo.create_norm(name, 1)
    with pytest.raises(ValueError, match=r"^each position of the input of shape \(2, 1, 3\) has a single channel: "):
        layer(torch.ones(2, 1, 3))
