"""Group scaling, alone and as the first step of power normalization, for groups of few and of many channels."""

from __future__ import annotations

import copy

import pytest
import torch
from norm_cases import gradients, sample
from torch.testing import assert_close

import normzoo
from normzoo.functional import _pieces
from normzoo.functional.power import group_scaling
from normzoo.testing import check_norm

CHANNELS = 32
SHAPES = [(5, CHANNELS), (4, CHANNELS, 3), (4, CHANNELS, 3, 2), (2, CHANNELS, 2, 3, 2)]
every_group = pytest.mark.parametrize("groups", [1, 2, 4, 8, 16, 32])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")


def twin(x, groups, eps):
    """The formula as it reads, in float64 or wider."""
    mean = torch.stack([part.square().mean(1) for part in x.chunk(groups, 1)], 1)
    return x / (mean + eps).sqrt().repeat_interleave(x.shape[1] // groups, 1)


@every_shape
@every_group
def test_values_and_gradients_are_those_of_the_formula(groups, shape):
    x = sample(shape).requires_grad_()
    y = group_scaling(x, groups, eps=1e-3)
    want = twin(x, groups, 1e-3)
    assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = sample(shape, seed=1)
    for got, wanted in zip(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy), strict=True):
        assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    if len(shape) == 2:
        assert torch.autograd.gradgradcheck(
            lambda x: group_scaling(x, groups, eps=1e-3), [x[:2].detach().requires_grad_()]
        )


@pytest.mark.parametrize("channel_dim", [1, -1])
@every_shape
@every_group
def test_power_with_groups_is_power_of_what_is_scaled(groups, shape, channel_dim, monkeypatch):
    """In warm-up and past it, while the backward's state moves, in pieces and whole."""
    options = {"warmup": 2, "eps": 1e-3, "dtype": torch.float64, "channel_dim": channel_dim}
    layer = normzoo.create_norm("power", CHANNELS, groups=groups, **options)
    plain = normzoo.create_norm("power", CHANNELS, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1.5, CHANNELS))
        layer.bias.normal_()
    plain.load_state_dict(layer.state_dict())
    for step in range(4):
        if step == 3:
            monkeypatch.setattr(_pieces, "PIECE", 2 * sample(shape)[0].numel())
        x, dy = (sample(shape, seed=step + i).movedim(1, channel_dim) for i in (0, 9))
        got = gradients(layer, x, dy)
        leaf = x.clone().requires_grad_()
        y = plain(twin(leaf.movedim(channel_dim, 1), groups, 1e-3).movedim(1, channel_dim))
        y.backward(dy)
        for name, want in {"y": y, "x": leaf.grad, "weight": plain.weight.grad, "bias": plain.bias.grad}.items():
            assert_close(got[name], want, rtol=1e-10, atol=1e-10, msg=f"{name} in step {step}")
        for name, value in plain.state_dict().items():
            assert_close(layer.state_dict()[name], value, rtol=1e-10, atol=1e-10)
        layer.zero_grad()
        plain.zero_grad()
    assert (layer.ema_gz != 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_group
def test_memory_format_and_dtype_are_kept(groups, dtype, training):
    layer = normzoo.create_norm("power", CHANNELS, groups=groups).train(training)
    x, dy = (sample((4, CHANNELS, 3, 2), dtype, seed=i) for i in (0, 1))
    first, last = copy.deepcopy(layer), copy.deepcopy(layer)
    one = gradients(first, x, dy)
    two = gradients(last, *(t.contiguous(memory_format=torch.channels_last) for t in (x, dy)))
    for name in ("x", "y"):
        assert one[name].is_contiguous()
        assert two[name].is_contiguous(memory_format=torch.channels_last)
        assert one[name].dtype == two[name].dtype == dtype
        eps = 8 * torch.finfo(dtype).eps
        assert_close(one[name], two[name], rtol=eps, atol=eps * one[name].abs().max().item())
    wide = gradients(copy.deepcopy(layer), x.float(), dy.float())["y"]
    assert_close(one["y"].float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_beside_the_input_at_most_a_value_for_each_group_is_kept(groups):
    factory = normzoo.get_norm("power", groups=groups)
    assert check_norm(factory, num_features=16, checks=["saved_memory"])[0].status == "passed"
