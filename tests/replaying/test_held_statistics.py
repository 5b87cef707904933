"""Parts of a batch normalized by the statistics of the whole batch, against the formula in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import run_function
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normzoo import create_norm, list_norms, norm_info
from normzoo.replaying.held_statistics import BatchStatisticsLayers, uses_batch_statistics

SAMPLES, CHANNELS = 6, 32
LAYERS = {
    "torch": lambda: nn.BatchNorm2d(CHANNELS),
    "no running statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "sync": lambda: nn.SyncBatchNorm(CHANNELS),
    "timm": lambda: timm.layers.BatchNormAct2d(CHANNELS),
    "split": lambda: timm.layers.SplitBatchNorm2d(CHANNELS, num_splits=2),
    "channels last": lambda: nn.Sequential(ToLast(), create_norm("batch", CHANNELS, channel_dim=-1), ToFirst()),
    "activation": lambda: create_norm("batch", CHANNELS, act_layer=nn.ReLU),
    **{
        name: lambda name=name: create_norm(name, CHANNELS) for name in list_norms() if norm_info(name).batch_statistics
    },
}


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class ToFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def network(make: Any, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), make(), nn.ReLU(inplace=inplace), nn.Conv2d(CHANNELS, 2, 3))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net


def images(samples: int = SAMPLES) -> Tensor:
    return 3 * torch.randn(samples, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(1)) + 1


def everything(net: nn.Module) -> list[Any]:
    state = [(name, value.clone()) for name, value in net.state_dict().items()]
    flags = [(m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return [*state, *flags]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(
        x[0] == y[0] and (torch.equal(x[1], y[1]) if isinstance(x[1], Tensor) else x == y)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_outputs_of_parts_are_the_rows_of_the_whole_output(name: str) -> None:
    net, x = network(LAYERS[name]), images()
    layers = BatchStatisticsLayers(net)
    assert len(layers.layers) == 1
    with layers.captured(SAMPLES) as statistics:
        y = net(x)
    before = everything(net)
    for start, stop in ((0, 1), (2, 5), (5, 6)):
        with layers.held(statistics, start, stop):
            assert torch.allclose(net(x[start:stop]), y[start:stop], atol=1e-5, rtol=1e-5)
    assert statistics.finite
    assert same(before, everything(net))


@pytest.mark.parametrize("name", ["torch", "channels last", "ghost_batch"])
@torch.no_grad()
def test_the_shares_of_samples_in_the_variance_are_those_by_hand(name: str) -> None:
    net, x = network(LAYERS[name]), images()
    x[2] *= 5
    with BatchStatisticsLayers(net).captured(SAMPLES) as statistics:
        net(x)
    z = net[0](x).double()
    squares = (z - z.mean((0, 2, 3), keepdim=True)).square().sum((2, 3))
    shares = (squares / squares.sum(0)).mean(1)
    moving = statistics.moving()
    assert [moving[i][0] for i in range(SAMPLES)] == pytest.approx(shares.tolist(), rel=1e-5)
    assert sum(share for share, _ in moving.values()) == pytest.approx(1)
    assert max(moving, key=lambda row: moving[row]) == 2


@pytest.mark.parametrize("name", ["torch", "no running statistics", "timm", "channels last", "activation", "batch"])
def test_gradients_are_those_of_fixed_statistics(name: str) -> None:
    net, x = network(LAYERS[name], inplace=False), images()
    layers = BatchStatisticsLayers(net)
    with layers.captured(SAMPLES) as statistics:
        net(x)
    with layers.held(statistics, 1, 3):
        found = torch.autograd.grad(net(x[1:3]).square().sum(), list(net.parameters()))

    twin = copy.deepcopy(net).double()
    convolved = twin[0](x.double())
    mean, var = convolved.mean((0, 2, 3)).detach(), convolved.var((0, 2, 3), correction=0).detach()
    norm = next(m for m in twin[1].modules() if hasattr(m, "eps"))
    y = (twin[0](x[1:3].double()) - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
    if norm.weight is not None:
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    loss = twin[3](y.relu()).square().sum()
    for g, exact in zip(found, torch.autograd.grad(loss, list(twin.parameters())), strict=True):
        assert torch.allclose(g.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_a_layer_of_running_statistics_is_not_held() -> None:
    net, x = network(LAYERS["torch"]), images()
    net[1].eval()
    layers = BatchStatisticsLayers(net)
    with layers.captured(SAMPLES) as statistics, torch.no_grad():
        y = net(x)
    assert statistics.calls == {"1": []}
    with layers.held(statistics, 0, 1), torch.no_grad():
        assert torch.allclose(net(x[:1]), y[:1], atol=1e-5)


@pytest.mark.parametrize("kind", ["group", "layer", "instance", "frozen_batch", "rms", "none"])
def test_layers_of_single_samples_are_not_held(kind: str) -> None:
    assert not uses_batch_statistics(create_norm(kind, CHANNELS))
    assert not BatchStatisticsLayers(nn.Sequential(create_norm(kind, CHANNELS), nn.Linear(2, 2))).layers


class OwnForward(nn.BatchNorm1d):
    """Normalizes in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1) * self.weight


@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own_is_held_by_its_output() -> None:
    layer, x = OwnForward(4), torch.randn(5, 4)
    layers = BatchStatisticsLayers(layer)
    with layers.captured(5) as statistics:
        y = layer(x)
    assert not statistics.of_channels
    with layers.held(statistics, 3, 4):
        assert torch.equal(layer(x[3:4]), y[3:4])


class Shared(nn.Module):
    """One layer used three times, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        y = self.linear(self.norm(tokens)).relu()
        return self.norm(self.norm(y) + tokens).unflatten(0, x.shape[:2])


def test_calls_of_a_shared_layer_have_statistics_of_their_own() -> None:
    torch.manual_seed(0)
    net, x = Shared(), torch.randn(4, 3, 8)
    layers = BatchStatisticsLayers(net)
    with layers.captured(4) as statistics:
        y = net(x)
    assert [len(calls) for calls in statistics.calls.values()] == [3]
    with layers.held(statistics, 1, 2):
        assert torch.allclose(net(x[1:2]), y[1:2], atol=1e-5)


def test_checkpoints_are_computed_again_by_the_same_statistics() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), torch.randn(4, 8)
    layers = BatchStatisticsLayers(net)
    with layers.captured(4) as statistics:
        net(x)
    with layers.held(statistics, 1, 2):
        plain = torch.autograd.grad(net(x[1:2]).sum(), list(net.parameters()))
    with layers.held(statistics, 1, 2):
        again = torch.autograd.grad(checkpoint(net, x[1:2], use_reentrant=False).sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_statistics_with_nan_are_not_finite_and_an_error_leaves_the_layer_as_it_was() -> None:
    net = nn.BatchNorm1d(4)
    layers, before = BatchStatisticsLayers(net), everything(net)
    with layers.captured(3) as statistics, torch.no_grad():
        net(torch.full((3, 4), math.nan))
    assert not statistics.finite
    net.load_state_dict(dict(before[:5]))
    with pytest.raises(RuntimeError), layers.held(statistics, 0, 1):
        net(torch.zeros(1, 7))
    assert same(before, everything(net))


def check_synchronized(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()

    def gather(value: Any) -> list[Any]:
        values = [None, None]
        torch.distributed.all_gather_object(values, value)
        return values

    torch.manual_seed(0)
    net, whole = create_norm("batch", 4, sync=True), torch.randn(5, 4)
    own = whole[:2] if rank == 0 else whole[2:]
    layers = BatchStatisticsLayers(net, gather)
    with torch.no_grad(), layers.captured(len(own)) as statistics:
        y = net(own)
    call = statistics.calls[""][0]
    assert torch.allclose(call.mean, whole.double().mean(0))
    assert torch.allclose(call.var, whole.double().var(0, correction=0))
    for i in range(1 + rank):  # no collective: ranks may make different numbers of passes
        with torch.no_grad(), layers.held(statistics, i, i + 1):
            assert torch.allclose(net(own[i : i + 1]), y[i : i + 1], atol=1e-5)


def test_layers_that_normalize_over_ranks_are_held_at_the_statistics_of_all(tmp_path: Path) -> None:
    run_function(tmp_path, check_synchronized, 2, str(tmp_path))
