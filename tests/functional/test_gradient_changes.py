"""Changes of the gradient along a step: exact on quadratics, and what is undefined or not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normzoo.functional import gradient_changes, gradient_predictiveness


def evaluator(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Callable[[], tuple[Tensor, Sequence[Tensor]]]:
    def evaluate() -> tuple[Tensor, Sequence[Tensor]]:
        with torch.enable_grad():
            value = loss()
            return value, torch.autograd.grad(value, params)

    return evaluate


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    multiples=st.lists(st.floats(-8, 8).map(lambda s: round(s, 3)), min_size=1, max_size=5, unique=True),
    lr=st.floats(1e-4, 10),
)
def test_a_quadratic_has_the_change_that_its_matrix_says(seed: int, n: int, multiples: list[float], lr: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    a = a + a.T
    x = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    g = (a @ x).detach()
    found = gradient_changes(evaluator(lambda: x @ a @ x / 2, [x]), [x], [lr * g], multiples)
    assert found.shape == (1 + len(multiples), 5)
    for s, row in zip([0.0, *multiples], found.tolist(), strict=True):
        there = x.detach() - s * lr * g
        other = a @ there
        want = [(there @ a @ there / 2).item(), abs(s) * lr * g.norm().item(), other.norm().item()]
        want += [abs(s) * lr * (a @ g).norm().item(), (other @ g).item()]
        assert row == pytest.approx(want, rel=1e-7, abs=1e-9)
    summary = gradient_predictiveness(found.tolist())
    if any(multiples):
        # Relative rounding of the distance grows as the step shrinks
        assert summary.smoothness == pytest.approx(((a @ g).norm() / g.norm()).item(), rel=1e-6)
        assert -1 <= summary.worst_cosine <= 1
    else:
        assert math.isnan(summary.smoothness)
        assert summary.worst_cosine == pytest.approx(1.0)


def test_the_change_is_taken_from_the_difference() -> None:
    """Beside a gradient of 1e8 that stays, one of 1e-3 appears: norms would differ by 5e-15."""
    x, y = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    evaluate = evaluator(lambda: 1e8 * x + y * y / 2, [x, y])
    changes = gradient_changes(evaluate, [x, y], [torch.zeros(()), torch.tensor(1e-3)], [1.0])
    assert changes[1].tolist() == pytest.approx([5e-7, 1e-3, 1e8, 1e-3, 1e16], rel=1e-6)
    assert gradient_predictiveness(changes.tolist()).smoothness == pytest.approx(1.0, rel=1e-6)


def test_zero_is_the_start_and_is_evaluated_once() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    calls: list[float] = []

    def loss() -> Tensor:
        calls.append(x.item())
        return (x**2).sum()

    changes = gradient_changes(evaluator(loss, [x]), [x], [torch.ones(1)], [-1.0, 0.0, 1.0])
    assert calls == [3.0, 4.0, 2.0]
    assert changes[2].tolist() == changes[0].tolist() == [9.0, 0.0, 6.0, 0.0, 36.0]
    found = gradient_predictiveness(changes.tolist())
    assert found.cosine == [1.0, 1.0, 1.0]
    assert (found.smoothness, found.largest_change, found.loss_range) == pytest.approx((2.0, 1 / 3, 12.0))


def test_start_is_where_the_step_starts_and_values_return() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    changes = gradient_changes(
        evaluator(lambda: (x**2).sum(), [x]), [x], [torch.tensor([2.0])], [1.0], [torch.tensor([3.0])]
    )
    assert changes.tolist() == [[9.0, 0.0, 6.0, 0.0, 36.0], [1.0, 2.0, 2.0, 4.0, 12.0]]
    assert x.tolist() == [1.0]


def test_parameters_return_bit_for_bit_if_the_loss_raises() -> None:
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    before = x.detach().clone()

    def loss() -> Tensor:
        if not torch.equal(x, before):
            raise ZeroDivisionError
        return (x**2).sum()

    with pytest.raises(ZeroDivisionError):
        gradient_changes(evaluator(loss, [x]), [x], [torch.tensor([1e-3, 1e-4])], [1.0])
    assert torch.equal(x, before)


def test_gradients_may_be_overwritten_by_the_next_evaluation() -> None:
    x, buffer = torch.tensor([3.0]), torch.zeros(1)

    def evaluate() -> tuple[Tensor, list[Tensor]]:
        buffer.copy_(2 * x)
        return (x**2).sum(), [buffer]

    assert gradient_changes(evaluate, [x], [torch.ones(1)], [1.0])[1].tolist() == [4.0, 1.0, 4.0, 2.0, 24.0]


def test_complex_parameters_count_as_pairs_of_real_ones() -> None:
    z = torch.tensor([3 + 4j], dtype=torch.complex128, requires_grad=True)
    g = 2 * z.detach()  # torch's convention for the gradient of |z|^2
    changes = gradient_changes(evaluator(lambda: z.abs().square().sum(), [z]), [z], [0.25 * g], [1.0])
    assert changes.tolist() == [
        pytest.approx([25.0, 0.0, 10.0, 0.0, 100.0]),
        pytest.approx([6.25, 2.5, 5.0, 5.0, 50.0]),
    ]


def test_the_distance_is_that_of_the_points_as_they_are_rounded() -> None:
    x = torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)  # the next below is 1 - 2^-8
    step = torch.tensor([1e-3 + 2**-8], dtype=torch.bfloat16)
    changes = gradient_changes(evaluator(lambda: (x.float() ** 2).sum(), [x]), [x], [step], [1e-3, 1.0])
    assert changes[:, 1].tolist() == [0.0, 0.0, 2**-8]
    assert gradient_predictiveness(changes.tolist()).smoothness == 2.0


def test_a_zero_gradient_has_no_angle_and_no_relative_change() -> None:
    x = torch.zeros(2, requires_grad=True)
    changes = gradient_changes(evaluator(lambda: (x**2).sum(), [x]), [x], [torch.tensor([3.0, 4.0])], [1.0])
    found = gradient_predictiveness(changes.tolist())
    assert math.isnan(found.cosine[0])
    assert math.isnan(found.worst_cosine)
    assert math.isnan(found.largest_change)
    assert (found.smoothness, found.loss_range) == pytest.approx((2.0, 25.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_at_a_multiple_is_an_infinite_change(bad: float) -> None:
    start, near = (2.0, 0.0, 4.0, 0.0, 16.0), (1.0, 0.5, 4.0, 1.0, 12.0)
    found = gradient_predictiveness([start, near, (bad, 1.0, bad, bad, bad)])
    assert found.cosine[0] == 0.75
    assert math.isnan(found.cosine[1])
    assert found[1:] == (math.inf, 0.75, math.inf, math.inf)
    found = gradient_predictiveness([start, near, (bad, 1.0, 4.0, 1.0, 12.0)])  # of the loss alone
    assert found[1:] == (2.0, 0.75, 0.25, math.inf)


@pytest.mark.parametrize("start", [(math.nan, 0.0, 1.0, 0.0, 1.0), (1.0, 0.0, math.inf, math.nan, math.nan)])
def test_a_start_that_is_not_finite_leaves_all_undefined(start: tuple[float, ...]) -> None:
    found = gradient_predictiveness([start, (1.0, 1.0, 1.0, 1.0, 1.0)])
    assert all(map(math.isnan, [*found.cosine, *found[1:]]))


def test_a_far_point_of_a_real_loss_may_have_none() -> None:
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    changes = gradient_changes(evaluator(lambda: x.log().sum(), [x]), [x], [torch.tensor([0.25])], [1.0, 2.0, 4.0])
    assert changes[:, 0].tolist() == [math.log(0.5), math.log(0.25), -math.inf, pytest.approx(math.nan, nan_ok=True)]
    found = gradient_predictiveness(changes.tolist())
    assert (found.smoothness, found.largest_change, found.loss_range) == (math.inf,) * 3
    assert found.worst_cosine == -1.0  # beyond the pole, the gradient of log x is 1/x
