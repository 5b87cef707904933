"""What layers refuse in words of their own, and what they start from."""

from __future__ import annotations

import re

import pytest
import torch
from norm_cases import CHANNELS, FLAT, IMAGE, SEQUENCE, VOLUME, every_layer

import normzoo


@every_layer
def test_bad_input_is_refused_with_a_reason(case):
    layer, name = case.make(), normzoo.norm_info(case.name).layer_class.__name__
    for shape in (FLAT, SEQUENCE, IMAGE, VOLUME, (0, CHANNELS)):
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
