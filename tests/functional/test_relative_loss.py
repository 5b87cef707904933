"""The loss along a step against a quadratic whose curve is known, and the headroom against cases by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from normzoo.functional import learning_rate_headroom, relative_loss
from normzoo.functional.relative_loss import relative_curve

MULTIPLES = [0.0, 0.5, 1.0, 2.0, -1.0]


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def awkward(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters that adding and subtracting a step would not restore."""
    first = torch.tensor([0.1, -0.0, 1e30, 1e-40, math.inf, math.nan, 3.0], dtype=torch.float32).to(dtype)
    return [nn.Parameter(first), nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_step_on_a_quadratic(dtype):
    """L = sum(h * theta^2) / 2; along its gradient h * theta, L(s) = sum(h * ((1 - s * lr * h) * theta)^2) / 2."""
    h = [torch.tensor([1.0, 4.0], dtype=dtype), torch.tensor([[2.0]], dtype=dtype)]
    theta = [torch.tensor([3.0, -1.0], dtype=dtype), torch.tensor([[0.5]], dtype=dtype)]
    params = [nn.Parameter(t.clone()) for t in theta]
    lr = 0.5
    losses = relative_loss(
        lambda: sum((a * p.square()).sum() for a, p in zip(h, params, strict=True)) / 2,
        params,
        [lr * a * t for a, t in zip(h, theta, strict=True)],
        MULTIPLES,
    )
    want = [
        sum((a * ((1 - s * lr * a) * t).square()).sum().item() for a, t in zip(h, theta, strict=True)) / 2
        for s in [0.0, *MULTIPLES]
    ]
    assert losses.dtype == torch.float32
    assert_close(losses.tolist(), want, rtol=1e-6, atol=1e-7)
    assert losses[0] == losses[1]  # a multiple of 0 repeats the starting point
    assert not losses.requires_grad
    assert bits(params) == bits(theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_are_restored_bit_for_bit(dtype):
    params = awkward(dtype)
    before, storage = bits(params), [p.data_ptr() for p in params]
    seen = []
    step = [torch.full_like(p, 0.3) for p in params]
    relative_loss(lambda: seen.append(bits(params)) or torch.tensor(1.0), params, step, [1.0, 0])
    assert bits(params) == before
    assert [p.data_ptr() for p in params] == storage
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in params)
    assert [s == before for s in seen] == [True, False]  # 0 takes the loss of the start


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_parameters_are_restored_when_evaluate_raises(fail_at):
    params, calls = awkward(), []
    before = bits(params)

    def evaluate() -> Tensor:
        calls.append(None)
        if len(calls) > fail_at:
            raise RuntimeError("out of memory")
        return torch.tensor(1.0)

    with pytest.raises(RuntimeError, match="^out of memory$"):
        relative_loss(evaluate, params, [torch.ones_like(p) for p in params], [1.0, 2.0])
    assert len(calls) == fail_at + 1
    assert bits(params) == before


def test_step_that_does_not_fit_raises_and_restores():
    params = awkward()
    before = bits(params)
    with pytest.raises(ValueError, match="zip"):
        relative_loss(lambda: torch.tensor(1.0), params, [torch.ones_like(params[0])], [1.0])
    assert bits(params) == before


def test_evaluate_is_called_once_for_each_point_without_gradient():
    params, modes = [nn.Parameter(torch.ones(2))], []
    relative_loss(
        lambda: modes.append(torch.is_grad_enabled()) or params[0].sum(), params, [torch.ones(2)], [1.0, 2.0, 3.0]
    )
    assert modes == [False] * 4
    assert relative_loss(lambda: params[0].sum(), params, [torch.ones(2)], []).tolist() == [2.0]


def test_every_point_starts_from_theta_not_from_the_last():
    params = [nn.Parameter(torch.tensor([1.0, 2.0]))]
    losses = relative_loss(lambda: params[0].sum(), params, [torch.tensor([0.25, 0.5])], [4.0, 1.0, 4.0])
    assert losses.tolist() == [3.0, 0.0, 2.25, 0.0]


@given(
    st.lists(st.sampled_from([0.0, -0.0]) | st.floats(-100, 100), max_size=8),
    st.lists(st.floats(-10, 10), min_size=2, max_size=2),
    st.lists(st.floats(-10, 10), min_size=2, max_size=2),
)
def test_each_point_is_theta_less_s_times_the_step(multiples, theta, step):
    theta, step = torch.tensor(theta, dtype=torch.float64), torch.tensor(step, dtype=torch.float64)
    now = theta + 100  # elsewhere, as after a step
    params, points = [nn.Parameter(now.clone())], []
    losses = relative_loss(
        lambda: points.append(params[0].detach().clone()) or points[-1].sum(), params, [step], multiples, [theta]
    )
    assert len(points) == 1 + sum(s != 0 for s in multiples)
    want = [theta, *(theta - s * step for s in multiples if s)]
    assert all(torch.equal(a, b) for a, b in zip(points, want, strict=True))
    assert torch.equal(params[0], now)
    assert [loss.item() for s, loss in zip(multiples, losses[1:], strict=True) if s == 0] == [
        losses[0].item() for s in multiples if s == 0
    ]


@given(st.floats(), st.lists(st.floats(), max_size=5))
def test_the_curve_is_exactly_1_at_the_start_or_nan(start, losses):
    curve = relative_curve([start, start, *losses])
    assert len(curve) == 1 + len(losses)
    if start == 0 or not math.isfinite(start):
        assert all(map(math.isnan, curve))
    else:
        assert curve[0] == 1.0
        assert curve[1:] == pytest.approx([loss / start for loss in losses], nan_ok=True)


@pytest.mark.parametrize(
    ("multiples", "relative", "headroom"),
    [
        ([1.0, 2.0, 4.0], [0.9, 0.8, 1.2], 3.0),  # halfway from 0.8 to 1.2
        ([4.0, 1.0, 2.0], [1.2, 0.9, 0.8], 3.0),  # in any order
        ([1.0, 2.0, 4.0], [0.9, 0.8, 0.7], 4.0),  # the grid ends
        ([1.0, 2.0], [1.0, 1.0], 2.0),  # exactly 1 is still in
        ([1.0, 2.0], [1.5, 0.5], 0.0),  # a rise at once ends it, though the loss falls again
        ([0.5, 1.0, 2.0], [0.5, 1.5, 0.1], 0.75),
        ([1.0, 2.0], [0.5, math.nan], 1.0),
        ([1.0, 2.0], [0.5, math.inf], 1.0),
        ([1.0, 2.0], [math.nan, 0.5], 0.0),
        ([1.0, 2.0], [math.inf, math.inf], 0.0),
        ([1.0, 2.0], [0.5, -math.inf], 1.0),  # "a non-finite value counts as above 1"
        ([1.0, 2.0], [-math.inf, 2.0], 0.0),
        ([-1.0, 0.0, 1.0, 2.0], [9.0, 9.0, 0.5, 1.5], 1.5),  # only positive multiples count
        ([0.0, -2.0], [1.0, 0.5], 0.0),
        ([], [], 0.0),
        ([1.0, 2.0], [-1.0, 3.0], 1.5),  # a loss may be negative
        ([1.0, 2.0], [0.0, 1e308], 1.0),
    ],
)
def test_headroom_by_hand(multiples, relative, headroom):
    got = learning_rate_headroom(multiples, relative)
    assert isinstance(got, float)
    assert got == pytest.approx(headroom, rel=1e-12)


def test_headroom_of_a_loss_below_zero_is_up_to_where_it_rises():
    """From -2 to -3, -2.5 and -1.5: it passes -2 halfway between the last two."""
    assert learning_rate_headroom([1.0, 2.0, 4.0], [1.5, 1.25, 0.75], negative=True) == 3.0
    assert learning_rate_headroom([1.0], [0.9], negative=True) == 0.0
    assert learning_rate_headroom([1.0, 2.0], [1.5, math.nan], negative=True) == 1.0


def test_headroom_refuses_curves_of_another_length():
    with pytest.raises(ValueError, match="zip"):
        learning_rate_headroom([1.0, 2.0], [1.0])


ANY = st.sampled_from([math.nan, math.inf, -math.inf, 1.0]) | st.floats(-3, 3) | st.floats()
GRID = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8, unique=True)
CURVE = GRID.flatmap(lambda grid: st.tuples(st.just(grid), st.lists(ANY, min_size=len(grid), max_size=len(grid))))


@given(CURVE)
def test_headroom_is_within_the_grid(curve):
    multiples, relative = curve
    assert 0 <= learning_rate_headroom(multiples, relative) <= max(multiples)


@given(CURVE, st.randoms(use_true_random=False))
def test_headroom_does_not_depend_on_the_order(curve, random):
    pairs = list(zip(*curve, strict=True))
    shuffled = random.sample(pairs, len(pairs))
    want = learning_rate_headroom(*curve)
    assert learning_rate_headroom(*zip(*shuffled, strict=True)) == pytest.approx(want, nan_ok=True)


@given(GRID, st.data())
def test_headroom_brackets_the_first_crossing(grid, data):
    """It lies from the last multiple at or below 1 to the first above, and is their crossing if both are known."""
    grid = sorted(grid)
    below = data.draw(st.integers(0, len(grid)))
    low, high = st.floats(-10, 1), st.floats(1.001, 1e6)
    relative = [data.draw(low if i < below else high) for i in range(len(grid))]
    got = learning_rate_headroom(grid, relative)
    s0, v0 = (grid[below - 1], relative[below - 1]) if below else (0.0, 1.0)
    if below == len(grid):
        assert got == grid[-1]
        return
    assert s0 <= got <= grid[below]
    assert got == pytest.approx(s0 + (grid[below] - s0) * (1 - v0) / (relative[below] - v0), rel=1e-9)


@given(CURVE, st.floats(0, 10))
def test_a_higher_curve_has_no_more_headroom(curve, rise):
    multiples, relative = curve
    finite = [v if math.isfinite(v) else 2.0 for v in relative]
    higher = learning_rate_headroom(multiples, [v + rise for v in finite])
    assert higher <= learning_rate_headroom(multiples, finite) * (1 + 1e-9)
