"""Gradient noise: every batch of a small population enumerated, so that expectations are exact."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from normzoo.callbacks import GradientNoise
from normzoo.functional import gradient_noise, noise_scale, update_noise_bound
from normzoo.functional.noise import DEFAULT_FACTOR, noise_scale_means, noise_scale_update


def population(n: int, seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (n, size)) + 1)


def mean_squared_error(g: torch.Tensor, batches: list[tuple[int, ...]]) -> float:
    whole = g.mean(0)
    return float(np.mean([(g[list(b)].mean(0) - whole).square().sum().item() for b in batches]))


@given(st.integers(2, 7), st.data(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_the_bound_is_exact_over_all_batches_without_replacement(n, data, seed):
    b = data.draw(st.integers(1, n))
    g, alpha = population(n, seed), 0.3
    exact = alpha**2 * mean_squared_error(g, list(itertools.combinations(range(n), b)))
    found = update_noise_bound(gradient_noise(g), alpha, b, population=n, factor="(N-b)/(N-1)")
    assert found.item() == pytest.approx(exact, rel=1e-9, abs=1e-15)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        other = update_noise_bound(gradient_noise(g, unbiased=True), alpha, b, n)
    assert other.item() == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert update_noise_bound(gradient_noise(g), alpha, b, n, factor="1").item() >= exact * (1 - 1e-9)


def test_there_is_one_default_factor():
    assert inspect.signature(GradientNoise).parameters["factor"].default == DEFAULT_FACTOR == "(N-b)/N"


def test_the_default_factor_warns_where_it_changes_a_figure():
    with pytest.warns(FutureWarning, match=r"'\(N-b\)/N' by default now, and was '\(N-b\)/\(N-1\)'") as caught:
        found = update_noise_bound(1.0, 0.1, 2, population=4)
    assert {warning.filename for warning in caught} == {__file__}
    assert found.item() == update_noise_bound(1.0, 0.1, 2, 4, "(N-b)/N").item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_noise_bound(1.0, 0.1, 2)
        assert update_noise_bound(1.0, 0.1, 4, population=4).item() == 0.0  # with either factor
        update_noise_bound(1.0, 0.1, 1, population=1)


@pytest.mark.parametrize("decay", [None, 0.75])
def test_sums_over_steps_are_those_of_the_loop(decay):
    steps = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    assert noise_scale_means(sums).isnan().all()
    for now in steps:
        sums = noise_scale_update(sums, now, decay)
    weights = [1.0 if decay is None else (1 - decay) * decay ** (19 - i) for i in range(20)]
    want = [sum(w * v for w, v in zip(weights, steps[:, k].tolist(), strict=True)) / sum(weights) for k in (0, 1)]
    assert noise_scale_means(sums).tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("n", "b"), [(3, 1), (4, 2), (3, 4)])
def test_without_a_factor_it_is_exact_over_all_batches_with_replacement(n, b):
    g = population(n)
    exact = 0.25 * mean_squared_error(g, list(itertools.product(range(n), repeat=b)))
    assert update_noise_bound(gradient_noise(g), 0.5, b).item() == pytest.approx(exact, rel=1e-12)
    if b <= n:
        named = update_noise_bound(gradient_noise(g), 0.5, b, n, factor="1")
        assert named.item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("small", "big"), [(1, 2), (1, 4), (2, 3), (2, 4)])
@pytest.mark.parametrize("nested", [False, True])
def test_noise_scale_is_unbiased_over_all_draws(small, big, nested):
    """Means of |G|^2 and tr(Sigma) over every pair of batches equal the population's, whether nested or not."""
    n = 3
    g = population(n)
    draws = list(itertools.product(range(n), repeat=big))
    big_sq = np.mean([g[list(d)].mean(0).square().sum().item() for d in draws])
    if nested:  # the small batch is the start of the big one
        small_sq = np.mean([g[list(d[:small])].mean(0).square().sum().item() for d in draws])
    else:
        small_sq = np.mean(
            [g[list(d)].mean(0).square().sum().item() for d in itertools.product(range(n), repeat=small)]
        )
    found = noise_scale(small_sq, big_sq, small, big)
    gradient_sq, trace = g.mean(0).square().sum(), gradient_noise(g)
    assert_close(found.gradient_sq, gradient_sq, rtol=1e-10, atol=1e-12)
    assert_close(found.trace, trace, rtol=1e-10, atol=1e-12)
    assert_close(found.scale, trace / gradient_sq, rtol=1e-9, atol=0)


def test_noise_scale_elementwise_and_where_the_gradient_vanishes():
    found = noise_scale(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 1.0]), 1, 2)
    assert found.gradient_sq.tolist() == [1.0, 0.0]
    assert found.trace.tolist() == [2.0, 2.0]
    assert found.scale.tolist() == [2.0, math.inf]


@pytest.mark.parametrize(("n", "b"), [(3, 2), (4, 1), (2, 3)])
def test_noise_from_micro_batches_is_unbiased_over_all_draws(n, b):
    """Two micro-batches of b independent samples: every draw of both."""
    g = population(n, size=2)
    means = torch.stack([g[list(d)].mean(0) for d in itertools.product(range(n), repeat=b)])
    found = [
        gradient_noise(torch.stack([x, y]), batch_size=b, unbiased=True).item()
        for x, y in itertools.product(means, means)
    ]
    assert np.mean(found) == pytest.approx(gradient_noise(g).item(), rel=1e-10)


def test_gradient_noise_sums_over_parameters_and_widens():
    a, b = population(5, 1).view(5, 2, 2), population(5, 2)
    both = gradient_noise([a, b])
    assert both.item() == pytest.approx(gradient_noise(torch.cat([a.flatten(1), b], 1)).item(), rel=1e-12)
    rows = torch.cat([a.flatten(1), b], 1).numpy()
    assert both.item() == pytest.approx(rows.var(0).sum(), rel=1e-12)
    half = (b + 100).bfloat16()
    assert gradient_noise(half).item() == gradient_noise(half.float()).item()
    assert gradient_noise(b[:1]).item() == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_scale(1.0, 1.0, 2, 2), "0 < small_batch < big_batch, not 2 and 2"),
        (lambda: noise_scale(1.0, 1.0, 0, 2), "0 < small_batch < big_batch, not 0 and 2"),
        (lambda: gradient_noise([torch.ones(2, 1), torch.ones(3, 1)]), "the same number for each parameter"),
        (lambda: gradient_noise(torch.ones(0, 1)), "at least one"),
        (lambda: gradient_noise([]), "at least one"),
        (lambda: gradient_noise(torch.ones(1, 1), unbiased=True), "at least two"),
        (lambda: gradient_noise(torch.ones(2, 1), batch_size=0), "batch_size must be at least 1, not 0"),
        (lambda: update_noise_bound(1.0, 0.1, 3, population=2), "from 1 to the population (2), not 3"),
        (lambda: update_noise_bound(1.0, 0.1, 0), "batch_size must be from 1"),
        (lambda: update_noise_bound(1.0, 0.1, 1, factor="N"), "one of '(N-b)/(N-1)', '(N-b)/N', '1', not 'N'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
