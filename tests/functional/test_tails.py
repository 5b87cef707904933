"""Tail statistics against scipy, plain loops and distributions whose answer is known."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from normzoo.functional import excess_kurtosis, hill_estimator, stable_index
from normzoo.functional.tails import tail_summary

HALF_EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def draw(name: str, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return {
        "gaussian": lambda: rng.standard_normal(size),
        "student_t3": lambda: rng.standard_t(3, size),
        "laplace": lambda: rng.laplace(size=size),
        "offset": lambda: rng.standard_normal(size) + 100,
        "cauchy": lambda: rng.standard_cauchy(size),
    }[name]()


def hill_loop(values: list[float], k: int) -> float:
    ordered = sorted((abs(v) for v in values), reverse=True)
    total = 0.0
    for i in range(k):
        total += math.log(ordered[i] / ordered[k])
    return k / total


def stable_loop(values: list[float], m: int) -> float:
    blocks = [values[i : i + m] for i in range(0, len(values) - m + 1, m)]
    logs = [math.log(abs(v)) for block in blocks for v in block]
    sums = [math.log(abs(sum(block))) for block in blocks]
    return math.log(m) / (sum(sums) / len(sums) - sum(logs) / len(logs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "student_t3", "laplace", "offset"])
def test_excess_kurtosis_equals_scipy(name, dtype):
    x = torch.from_numpy(draw(name, 10_000)).to(dtype)
    want = stats.kurtosis(x.double().numpy(), fisher=True, bias=True)
    got = excess_kurtosis(x)
    assert (got.shape, got.dtype) == ((), dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert got.item() == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert excess_kurtosis(x.view(10, 20, 50)).item() == got.item()
    assert not excess_kurtosis(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e20, 1e30])
@pytest.mark.parametrize("name", ["gaussian", "student_t3"])
def test_excess_kurtosis_at_scales_whose_fourth_power_leaves_float32(name, scale):
    x = torch.from_numpy(draw(name, 1000) * scale).float()
    want = stats.kurtosis(x.double().numpy() / scale, fisher=True, bias=True)
    assert excess_kurtosis(x).item() == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("value", [1.0, 0.1, -3.3, 1e-20, 1e20])
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_excess_kurtosis_of_equal_values_is_nan(value, size, dtype):
    assert math.isnan(excess_kurtosis(torch.full((size,), value, dtype=dtype)).item())


def test_excess_kurtosis_of_known_samples():
    assert math.isnan(excess_kurtosis(torch.empty(0)).item())
    assert excess_kurtosis(torch.tensor([-1.0, 1.0])).item() == -2.0
    # mean 0, second moment 2/n, fourth 2/n: kurtosis n/2
    assert excess_kurtosis(torch.tensor([1.0, -1.0] + [0.0] * 98)).item() == pytest.approx(47.0, rel=1e-6)
    assert math.isnan(excess_kurtosis(torch.tensor([1.0, 2.0, math.nan])).item())
    assert math.isnan(excess_kurtosis(torch.tensor([1.0, 2.0, math.inf])).item())


@pytest.mark.parametrize("dtype", list(HALF_EPS), ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.from_numpy(draw("student_t3", 4000)).to(dtype)
    for function in (excess_kurtosis, lambda t: hill_estimator(t, 100), lambda t: stable_index(t, 10)):
        sample = x[x != 0]
        assert function(sample).dtype == torch.float32
        assert function(sample).item() == function(sample.float()).item()


@settings(max_examples=50)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=40, unique=True),
    st.integers(0, 2**31),
    st.data(),
)
def test_hill_estimator_equals_the_loop(magnitudes, seed, data):
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], len(magnitudes))
    values = (np.array(magnitudes) * signs).tolist()
    k = data.draw(st.integers(1, len(values) - 1))
    got = hill_estimator(torch.tensor(values, dtype=torch.float64), k)
    want = hill_loop(values, k)
    # 1e-12 is the rounding of a logarithm; it weighs where the magnitudes hardly differ
    assert 1 / got.item() == pytest.approx(1 / want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 3.0])
def test_hill_estimator_finds_the_index_of_a_pareto_sample(alpha):
    """The estimate from k values has standard error alpha / sqrt(k); a scale and signs do not matter."""
    rng = np.random.default_rng(0)
    x = (rng.pareto(alpha, 100_000) + 1) * rng.choice([-1, 1], 100_000)
    k = 10_000
    got = hill_estimator(torch.from_numpy(x), k).item()
    assert abs(got - alpha) < 4 * alpha / math.sqrt(k)
    assert hill_estimator(torch.from_numpy(1e-12 * x), k).item() == pytest.approx(got, rel=1e-9)


def test_hill_estimator_by_hand():
    x = torch.tensor([1.0, -2.0, 4.0, -8.0, 0.5], dtype=torch.float64)
    assert hill_estimator(x, 1).item() == pytest.approx(1 / math.log(2))  # 8 over 4
    assert hill_estimator(x, 2).item() == pytest.approx(2 / (3 * math.log(2)))  # 8 and 4 over 2
    assert hill_estimator(x.view(5, 1), 4).item() == pytest.approx(4 / (10 * math.log(2)))


@pytest.mark.parametrize("value", [3.0, -0.1, 1e-30])
def test_hill_estimator_of_equal_magnitudes_is_infinite(value):
    assert hill_estimator(torch.full((10,), value), 5).item() == math.inf


@pytest.mark.parametrize(("size", "k"), [(5, 0), (5, 5), (5, 6), (5, -1), (1, 1), (0, 0)])
def test_hill_estimator_refuses_a_k_outside_the_sample(size, k):
    text = f"k must be from 1 to the number of values less one ({size - 1}), not {k}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        hill_estimator(torch.ones(size), k)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 60), st.data())
def test_stable_index_equals_the_loop(seed, size, data):
    values = np.random.default_rng(seed).standard_t(2, size)
    m = data.draw(st.integers(2, size))
    got = stable_index(torch.from_numpy(values), m).item()
    assert 1 / got == pytest.approx(1 / stable_loop(values.tolist(), m), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("name", "alpha"), [("gaussian", 2.0), ("cauchy", 1.0)])
@pytest.mark.parametrize("m", [10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stable_index_of_stable_samples(name, alpha, m, dtype):
    x = torch.from_numpy(draw(name, 100_000)).to(dtype)
    assert stable_index(x, m).item() == pytest.approx(alpha, rel=0.05)
    assert stable_index(1e-6 * x, m).item() == pytest.approx(alpha, rel=0.05)


def test_stable_index_leaves_the_remainder_out_and_reads_in_memory_order():
    x = torch.from_numpy(draw("gaussian", 24))
    assert stable_index(x[:23], 5).item() == stable_index(x[:20], 5).item() != stable_index(x, 6).item()
    assert stable_index(x.view(2, 3, 4), 4).item() == stable_index(x, 4).item()
    # blocks (1, 1) and (2, 2): sums 2 and 4, so 1/alpha = log 2 / log 2
    assert stable_index(torch.tensor([1.0, 1.0, 2.0, 2.0]), 2).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "m"), [(5, 1), (5, 0), (5, -2), (5, 6), (1, 2), (0, 2)])
def test_stable_index_refuses_an_m_outside_the_sample(size, m):
    text = f"m must be from 2 to the number of values ({size}), not {m}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        stable_index(torch.ones(size), m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tail_summary_is_largest_norm_and_kurtosis(dtype):
    x = torch.from_numpy(draw("student_t3", 600)).to(dtype).view(20, 30)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    got = tail_summary(x.clone().requires_grad_())
    assert_close(got, torch.stack([wide.abs().max(), wide.norm(), excess_kurtosis(wide)]))
    assert got.dtype == wide.dtype
    assert not got.requires_grad


@pytest.mark.parametrize("values", [[0.0] * 10, [1.0, 2.0, 0.0, 0.0, 0.0]])
def test_hill_estimator_above_a_threshold_of_zero_is_nan(values):
    assert math.isnan(hill_estimator(torch.tensor(values), 3).item())
