"""Batch renormalization against a float64 twin of Ioffe 2017, algorithm 1, whose r and d are detached."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from normzoo.functional import batch_renorm, piecewise_linear
from normzoo.layers import BatchRenorm

EPS = 1e-5


class Twin:
    """Algorithm 1, channel by channel, in float64, differentiated by autograd; it keeps sigma, not the variance."""

    def __init__(self, channels: int, average: str = "std", momentum: float = 0.1, eps: float = EPS) -> None:
        self.mu = torch.zeros(channels, dtype=torch.float64)
        self.sigma = torch.full((channels,), math.sqrt(1 + eps), dtype=torch.float64)
        self.average, self.momentum, self.eps = average, momentum, eps
        self.r, self.d = [0.0] * channels, [0.0] * channels

    def train_step(self, x: Tensor, weight: Tensor, bias: Tensor, r_max: float, d_max: float) -> Tensor:
        channels = []
        for c in range(x.shape[1]):
            v, mu, sigma = x[:, c], self.mu[c].item(), self.sigma[c].item()
            mean = v.mean()
            var = ((v - mean) ** 2).mean()
            std = torch.sqrt(var + self.eps)
            self.r[c] = min(max(std.item() / sigma, 1 / r_max), r_max)
            self.d[c] = min(max((mean.item() - mu) / sigma, -d_max), d_max)
            channels.append(((v - mean) / std * self.r[c] + self.d[c]) * weight[c] + bias[c])
            self.mu[c] = mu + self.momentum * (mean.item() - mu)
            if self.average == "std":
                self.sigma[c] = sigma + self.momentum * (std.item() - sigma)
            else:
                old = sigma**2 - self.eps
                self.sigma[c] = math.sqrt(old + self.momentum * (var.item() - old) + self.eps)
        return torch.stack(channels, 1)


def drifting(step: int, shape: tuple[int, ...] = (4, 3, 2, 2), dtype: torch.dtype = torch.float64) -> Tensor:
    """Batches whose mean and scale move, so that r and d pass both bounds."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    scale = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (x * scale + (step - 2) * scale).to(dtype)


@pytest.mark.parametrize("average", ["std", "variance"])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 2), (1, 3, 1, 2)], ids=str)
def test_training_equals_the_twin_in_output_gradient_and_statistics(average, shape):
    r_max, d_max, rate = 1.5, 0.5, 0.25
    layer = BatchRenorm(3, r_max=r_max, d_max=d_max, momentum=rate, average=average, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, 3.0]))
    twin = Twin(3, average, rate)
    ratios, shifts = [], []
    for step in range(6):
        x = drifting(step, shape).requires_grad_()
        mine = [x, layer.weight, layer.bias]
        other = [t.detach().clone().requires_grad_() for t in mine]
        y, z = layer(x), twin.train_step(*other, r_max, d_max)
        dy = drifting(step + 10, shape)
        for got, want in zip(torch.autograd.grad(y, mine, dy), torch.autograd.grad(z, other, dy), strict=True):
            assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert_close(y, z, rtol=1e-11, atol=1e-11)
        assert_close(layer.running_mean, twin.mu, rtol=1e-12, atol=1e-12)
        assert_close(layer.running_var, twin.sigma**2 - EPS, rtol=1e-11, atol=1e-12)
        ratios += twin.r
        shifts += twin.d
    # The data reached both bounds, and the inside of each.
    if shape[0] > 1:
        assert {1 / r_max, r_max} < set(ratios)
        assert {-d_max, d_max} < set(shifts)
    x = drifting(7, shape)
    want = (x - twin.mu.view_as(x[:1, :, :1, :1] if x.ndim > 2 else x[:1])) / twin.sigma.view(-1, *[1] * (x.ndim - 2))
    weight, bias = (p.view(-1, *[1] * (x.ndim - 2)) for p in (layer.weight, layer.bias))
    assert_close(layer.eval()(x), want * weight + bias, rtol=1e-11, atol=1e-11)
    assert layer.num_batches_tracked == 6


def test_numbers_computed_by_hand():
    """One channel, eps 1, mu 1, sigma 2 (running_var 3); batch (1, 5, 5, 9): mean 5, variance 8, sigma_B 3.

    r = 3/2 and d = (5 - 1)/2 = 2, unclipped, so y = (x - 5)/3 * 3/2 + 2 = (x - 1)/2; with bounds 1.25 and 1,
    y = (x - 5)/3 * 5/4 + 1. With momentum 1/4, mu = 1 + 4/4 = 2; sigma = 2 + 1/4 = 9/4, running_var = 81/16 - 1;
    or the variance itself, 3 + (8 - 3)/4 = 17/4.
    """
    data = {
        ("std", 3.0, 5.0): ([0.0, 2.0, 2.0, 4.0], 65 / 16),
        ("std", 1.25, 1.0): ([-2 / 3, 1.0, 1.0, 8 / 3], 65 / 16),
        ("variance", 3.0, 5.0): ([0.0, 2.0, 2.0, 4.0], 17 / 4),
        ("variance", 1.0, 0.0): ([-4 / 3, 0.0, 0.0, 4 / 3], 17 / 4),
    }
    x = torch.tensor([1.0, 5.0, 5.0, 9.0]).view(4, 1)
    for (average, r_max, d_max), (y, var) in data.items():
        for dtype in (torch.float32, torch.float64):
            mu, running_var = torch.tensor([1.0], dtype=dtype), torch.tensor([3.0], dtype=dtype)
            options = {"r_max": r_max, "d_max": d_max, "momentum": 0.25, "eps": 1.0, "average": average}
            got = batch_renorm(x.to(dtype), mu, running_var, training=True, **options)
            assert_close(got, torch.tensor(y, dtype=dtype).view(4, 1), rtol=1e-6, atol=1e-6)
            assert mu.item() == 2.0
            assert running_var.item() == pytest.approx(var, rel=1e-6)
            # evaluating: (x - 2) / sqrt(running_var + 1) with the statistics that the step left
            evaluated = batch_renorm(x.to(dtype), mu, running_var, **options)
            assert_close(evaluated, (x.to(dtype) - 2) / math.sqrt(var + 1), rtol=1e-6, atol=1e-6)
            assert mu.item() == 2.0


def test_without_corrections_it_is_batch_norm():
    layer, theirs = BatchRenorm(3, r_max=1.0, d_max=0.0), nn.BatchNorm2d(3)
    for step in range(3):
        x = drifting(step, (8, 3, 4, 4), torch.float32).requires_grad_()
        y, z = layer(x), theirs(x)
        assert_close(y, z, rtol=1e-6, atol=1e-6)
        (got,), (want,) = (torch.autograd.grad(out.pow(3).sum(), x) for out in (y, z))
        assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_close(layer.running_mean, theirs.running_mean)


def test_wide_bounds_make_training_equal_evaluation():
    layer = BatchRenorm(3, r_max=1e6, d_max=1e6, dtype=torch.float64)
    x = drifting(3)
    before = BatchRenorm(3, dtype=torch.float64).eval()
    assert_close(layer(x), before(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (10_000, 1 + 2 / 7, 1.25),
        (22_500, 2.0, 4.375),
        (25_000, 1 + 8 / 7, 5.0),
        (40_000, 3.0, 5.0),
        (10**9, 3.0, 5.0),
    ],
)
def test_default_schedule_is_the_papers(step, r_max, d_max):
    layer = BatchRenorm(1, affine=False, dtype=torch.float64)
    layer.num_batches_tracked.fill_(step)
    assert piecewise_linear(layer.r_max, layer.num_batches_tracked).item() == pytest.approx(r_max, rel=1e-6)
    assert piecewise_linear(layer.d_max, layer.num_batches_tracked).item() == pytest.approx(d_max, rel=1e-6)
    # A batch far outside both bounds shows them: two values mean +- 100 give y = +- r_max + d_max.
    y = layer(torch.tensor([[900.0], [1100.0]], dtype=torch.float64))
    assert_close(y.flatten().tolist(), [d_max - r_max, d_max + r_max], rtol=1e-6, atol=1e-5)
    assert layer.num_batches_tracked == step + 1


@pytest.mark.parametrize(
    ("points", "values"),
    [
        (2.5, {0: 2.5, 7: 2.5}),
        ([(3, 4)], {0: 4.0, 3: 4.0, 9: 4.0}),
        ([(0, 1), (10, 2), (20, 5)], {0: 1.0, 5: 1.5, 10: 2.0, 15: 3.5, 20: 5.0, 30: 5.0}),
        ([(0, 5), (4, 1)], {0: 5.0, 1: 4.0, 4: 1.0, 99: 1.0}),
    ],
)
def test_schedules_are_linear_between_points_and_constant_outside(points, values):
    layer = BatchRenorm(1, r_max=points, d_max=points)
    for step, value in values.items():
        for bound in (layer.r_max, layer.d_max):
            assert piecewise_linear(bound, torch.tensor(step)).item() == pytest.approx(value, rel=1e-6)


def test_the_schedule_stands_still_in_evaluation():
    layer = BatchRenorm(3, r_max=[(0, 1), (4, 3)]).eval()
    layer(drifting(0, dtype=torch.float32))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_half_precision_is_float32_inside(dtype, scale):
    half, single = (BatchRenorm(3, r_max=1.5, d_max=0.5) for _ in range(2))
    for step in range(4):
        x = (drifting(step) * scale).clamp(-6e4, 6e4).to(dtype)
        y, z = half(x), single(x.float())
        assert y.dtype == dtype
        assert_close(y.float(), z, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(half, name), getattr(single, name), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r_max": 0.5}, r"^r_max must be at least 1, got 0.5$"),
        ({"r_max": [(0, 2.0), (5, 0.9)]}, r"^r_max must be at least 1, got \[\(0, 2.0\), \(5, 0.9\)\]$"),
        ({"r_max": math.nan}, r"^r_max must be at least 1, got nan$"),
        ({"d_max": -1}, r"^d_max must be at least 0, got -1$"),
        ({"d_max": [(0, 0.0), (5, -1.0)]}, r"^d_max must be at least 0, got \["),
        ({"d_max": [(5, 0.0), (5, 1.0)]}, r"^the steps of d_max must increase, got \[\(5, 0.0\), \(5, 1.0\)\]$"),
        ({"r_max": [(5, 1.0), (1, 2.0)]}, r"^the steps of r_max must increase, got "),
        ({"r_max": []}, r"^the steps of r_max must increase, got \[\]$"),
        ({"r_max": "big"}, r"^r_max must be a number or a list of \(step, value\) pairs, not 'big'$"),
        ({"r_max": [1, 2]}, r"^r_max must be a number or a list of \(step, value\) pairs, not \[1, 2\]$"),
        ({"d_max": None}, r"^d_max must be a number or a list of \(step, value\) pairs, not None$"),
        ({"eps": 0}, r"eps must be > 0$"),
        ({"eps": 0.0}, r"eps must be > 0$"),
        ({"eps": -1e-5}, r"^eps must not be negative, got -1e-05$"),
        ({"average": "var"}, r"^average must be 'std' or 'variance', not 'var'$"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        BatchRenorm(3, **options)


SCALES = st.floats(-15, 15).map(lambda e: 10.0**e)


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.tuples(SCALES, SCALES, st.sampled_from([-1, 0, 1])), min_size=1, max_size=4),
    size=st.integers(2, 6),
    r_max=st.floats(1, 10),
    d_max=st.floats(0, 10),
    average=st.sampled_from(["std", "variance"]),
)
def test_bounds_hold_and_all_is_finite_at_any_scale(batches, size, r_max, d_max, average):
    layer = BatchRenorm(1, r_max=r_max, d_max=d_max, average=average)
    for i, (scale, offset, sign) in enumerate(batches):
        x = torch.randn(size, 1, generator=torch.Generator().manual_seed(i)) * scale + sign * offset
        x.requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        for t in (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var):
            assert t.isfinite().all()
        assert (layer.running_var >= 0).all()
        # y = normalized * r + d with normalized of mean 0 and mean square at most 1: d and r read off y.
        # What float32 leaves of a spread that is small beside the offset comes on top.
        spread = math.sqrt(x.detach().double().var(0, correction=0).item() + EPS)
        slack = 1e-4 + 4e-5 * x.abs().max().item() / spread
        assert abs(y.mean().item()) <= d_max + slack
        assert y.detach().double().std(0, correction=0).item() <= r_max * (1 + 1e-4) + slack


@settings(max_examples=60, deadline=None)
@given(
    mu=st.floats(-10, 10),
    var=st.floats(0, 100),
    mean=st.floats(-10, 10),
    std=st.floats(0.1, 10),
    r_max=st.floats(1, 10),
    d_max=st.floats(0, 10),
)
def test_r_and_d_reconstructed_from_the_output_are_the_clipped_ratios(mu, var, mean, std, r_max, d_max):
    """Two values, mean +- std, come out at d +- r * std / sqrt(std^2 + eps)."""
    x = torch.tensor([[mean - std], [mean + std]], dtype=torch.float64)
    running = (torch.tensor([v], dtype=torch.float64) for v in (mu, var))
    low, high = batch_renorm(x, *running, r_max=r_max, d_max=d_max, training=True, eps=EPS).flatten().tolist()
    sigma_b, sigma = math.sqrt(std**2 + EPS), math.sqrt(var + EPS)
    d, r = (high + low) / 2, (high - low) / 2 * sigma_b / std
    assert r == pytest.approx(min(max(sigma_b / sigma, 1 / r_max), r_max), rel=1e-9)
    assert d == pytest.approx(min(max((mean - mu) / sigma, -d_max), d_max), rel=1e-9, abs=1e-9)
    assert 1 / r_max - 1e-9 <= r <= r_max + 1e-9
    assert -d_max - 1e-9 <= d <= d_max + 1e-9


def test_the_running_variance_of_equal_values_is_not_negative() -> None:
    """The root of each of these eps, squared in single precision, is less than it."""
    for eps in (7e-6, 3e-5, 5e-5, 2e-4, 3e-3):
        running = torch.zeros(3)
        sample = torch.zeros(4, 3, 2, 2)
        batch_renorm(sample, torch.zeros(3), running, r_max=3.0, d_max=5.0, training=True, eps=eps)
        assert (running >= 0).all(), eps
