"""The bounds of stability, by running torch's optimizers on quadratics just below and just above them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normzoo.functional import adam_bound, adam_preconditioner, sgd_bound

SPECTRUM = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)


def final_size(make: Callable[[list[Tensor]], torch.optim.Optimizer], largest: float, steps: int) -> float:
    """The distance from the minimum of a quadratic of this largest eigenvalue, 1 at first."""
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64) / 3**0.5)
    optimizer = make([x])
    for _ in range(steps):
        x.grad = largest * SPECTRUM * x.detach()
        optimizer.step()
    return x.norm().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"dampening": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.3},
        {"weight_decay": 2.0},
    ],
    ids=str,
)
def test_sgd_converges_just_below_and_diverges_just_above(options: dict[str, Any]) -> None:
    lr = 0.2
    own = {name: value for name, value in options.items() if name != "weight_decay"}
    bound = sgd_bound(lr, **own) - options.get("weight_decay", 0.0)
    make = lambda params: torch.optim.SGD(params, lr=lr, **options)  # noqa: E731
    assert final_size(make, 0.97 * bound, 400) < 0.02
    assert final_size(make, 1.03 * bound, 400) > 10


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_adam_of_a_frozen_preconditioner_converges_just_below_and_diverges_just_above(
    beta1: float, weight_decay: float
) -> None:
    lr, curvature = 0.05, torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)
    second_moment = torch.tensor([0.04, 1.0, 9.0], dtype=torch.float64)
    for over, grows in ((0.96, False), (1.04, True)):
        x = torch.nn.Parameter(torch.full((3,), 1e-6, dtype=torch.float64))  # too small to move the second moment
        optimizer = torch.optim.AdamW([x], lr=lr, betas=(beta1, 0.999), weight_decay=weight_decay)
        x.grad = torch.zeros_like(x)
        optimizer.step()
        state = optimizer.state[x]
        state["step"].fill_(100_000.0)  # bias corrections are over
        p = adam_preconditioner(second_moment, state["step"], beta1, 0.999, 1e-8)
        bound = adam_bound(lr, beta1) * (1 - lr * weight_decay / 2)
        scale = over * bound / (curvature / p).max()
        for _ in range(300):
            state["exp_avg_sq"].copy_(second_moment / 0.999)
            x.grad = scale * curvature * x.detach()
            optimizer.step()
        assert (x.norm().item() > 1e-4) is grows
        assert grows or x.norm().item() < 1e-8


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_preconditioner_is_that_of_torch(steps: int, amsgrad: bool) -> None:
    """The step is lr P^-1 times the running mean of gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=0.1, betas=(0.8, 0.95), eps=1e-3, amsgrad=amsgrad)
    for _ in range(steps):
        before = x.detach().clone()
        x.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[x]
    p = adam_preconditioner(state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"], state["step"], 0.8, 0.95, 1e-3)
    torch.testing.assert_close(before - x.detach(), 0.1 * state["exp_avg"] / p, rtol=1e-9, atol=1e-12)


def test_tensors_are_taken_as_numbers_are() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    assert sgd_bound(lr, 0.9).item() == pytest.approx(38.0)
    assert adam_bound(lr).item() == pytest.approx(380.0)
    assert sgd_bound(0 * lr).item() == float("inf")
