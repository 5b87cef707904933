"""Tail statistics against scipy, plain loops and distributions whose answer is known."""

from __future__ import annotations

import inspect
import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from normzoo.functional import (
    excess_kurtosis,
    hill_estimator,
    moment_estimator,
    power_law_fit,
    quantile_ratio,
    stable_index,
    tails,
)

HALF_EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def draw(name: str, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return {
        "gaussian": lambda: rng.standard_normal(size),
        "student_t3": lambda: rng.standard_t(3, size),
        "laplace": lambda: rng.laplace(size=size),
        "offset": lambda: rng.standard_normal(size) + 100,
        "cauchy": lambda: rng.standard_cauchy(size),
        "stable_1.5": lambda: stats.levy_stable.rvs(1.5, 0.0, size=size, random_state=rng),
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
    text = f"k must be at least 1 and less than the number of values ({size}), not {k}"
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


@pytest.mark.parametrize("values", [[0.0] * 10, [1.0, 2.0, 0.0, 0.0, 0.0]])
def test_hill_estimator_above_a_threshold_of_zero_is_nan(values):
    assert math.isnan(hill_estimator(torch.tensor(values), 3).item())


def moment_loop(values: list[float], k: int) -> float:
    ordered = sorted((abs(v) for v in values), reverse=True)
    excesses = [math.log(ordered[i] / ordered[k]) for i in range(k)]
    first, second = sum(excesses) / k, sum(e * e for e in excesses) / k
    return first + 1 - 0.5 / (1 - first * first / second)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(5, 60), st.data())
def test_moment_estimator_equals_the_loop(seed, size, data):
    values = np.random.default_rng(seed).standard_t(2, size)
    k = data.draw(st.integers(3, size - 1))
    assert moment_estimator(torch.from_numpy(values), k).item() == pytest.approx(
        moment_loop(values.tolist(), k), rel=1e-6, abs=1e-6
    )


def moment_error(gamma: float, k: int) -> float:
    """The asymptotic standard error, Dekkers, Einmahl & de Haan 1989, corollary 3.2."""
    if gamma >= 0:
        return math.sqrt((1 + gamma**2) / k)
    g = gamma
    inner = 4 - 8 * (1 - 2 * g) / (1 - 3 * g) + (5 - 11 * g) * (1 - 2 * g) / ((1 - 3 * g) * (1 - 4 * g))
    return math.sqrt((1 - g) ** 2 * (1 - 2 * g) * inner / k)


@pytest.mark.parametrize("gamma", [-1.0, -0.25, 0.0, 1 / 3, 1.0, 2.0])
def test_moment_estimator_of_generalized_pareto_samples(gamma):
    """Of all tails, these have the least bias; at k of n = 200 k it is below the standard error."""
    n, k = 400_000, 2000
    u = np.random.default_rng(3).random(n)
    x = -np.log(u) if gamma == 0 else (u**-gamma - 1) / gamma
    bias = 1 / math.log(n / k) if gamma <= 0 else 0  # log|x| grows as log log u there: a slow approach
    got = moment_estimator(torch.from_numpy(x), k).item()
    assert abs(got - gamma) < 4 * moment_error(gamma, k) + bias


KNOWN = [("student_t3", 3.0, 1000), ("cauchy", 1.0, 4000), ("stable_1.5", 1.5, 1000)]


@pytest.mark.parametrize(("name", "alpha", "k"), KNOWN)
def test_tail_estimators_find_the_index_of_known_samples(name, alpha, k):
    """Within 4 standard errors and the bias of a tail that is Pareto to second order, |x|^-alpha (1 + c |x|^-b)."""
    x = torch.from_numpy(draw(name, 400_000))
    # relative deviation from a Pareto tail at the threshold: t^-2 for Student and Cauchy, t^-alpha for stable tails
    threshold = x.abs().topk(k).values[-1].item()
    bias = 3 * threshold ** -(alpha if name == "stable_1.5" else 2)
    assert abs(hill_estimator(x, k).item() / alpha - 1) < 4 / math.sqrt(k) + bias
    assert abs(moment_estimator(x, k).item() - 1 / alpha) < 4 * moment_error(1 / alpha, k) + bias


def test_moment_estimator_tells_a_gaussian_from_a_heavy_tail():
    x = torch.from_numpy(draw("gaussian", 400_000))
    k = 2000
    # gamma 0 is approached as 1 / log(n / k); Hill's alpha is finite, about 2 log(n / k)
    assert abs(moment_estimator(x, k).item()) < 4 * moment_error(0, k) + 1 / math.log(400_000 / k)
    assert 2 < hill_estimator(x, k).item() < 4 * math.log(400_000 / k)


def test_moment_estimator_of_degenerate_samples():
    assert math.isnan(moment_estimator(torch.full((10,), 2.0), 5).item())
    assert math.isnan(moment_estimator(torch.tensor([1.0, 2.0, 0.0, 0.0]), 3).item())
    assert moment_estimator(torch.tensor([1.0, 2.0, 2.0]), 2).item() == -math.inf
    with pytest.raises(ValueError, match="k must be at least 1 and less than the number of values"):
        moment_estimator(torch.ones(5), 5)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_quantile_ratio_equals_numpy(values, p, q):
    lower, upper = sorted((p, q))
    magnitude = np.sort(np.abs(values))
    above, below = (magnitude[max(1, math.ceil(level * len(values))) - 1] for level in (upper, lower))
    got = quantile_ratio(torch.tensor(values, dtype=torch.float64), upper, lower).item()
    with np.errstate(all="ignore"):
        want = above / below
    assert got == pytest.approx(want, rel=1e-12, nan_ok=True)


DISTRIBUTIONS = {
    "gaussian": stats.norm(),
    "student_t3": stats.t(3),
    "cauchy": stats.cauchy(),
    "laplace": stats.laplace(),
    "stable_1.5": stats.levy_stable(1.5, 0.0),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantile_ratio_of_known_distributions(name):
    n, u, low = 200_000, 0.999, 0.5
    law = DISTRIBUTIONS[name]
    far, middle = law.ppf((1 + u) / 2), law.ppf((1 + low) / 2)
    a, b = 2 * law.pdf(far) * far, 2 * law.pdf(middle) * middle
    error = math.sqrt((u * (1 - u) / a**2 + low * (1 - low) / b**2 - 2 * low * (1 - u) / (a * b)) / n)
    x = torch.from_numpy(draw(name, n, seed=1))
    assert abs(math.log(quantile_ratio(x).item() / (far / middle))) < 4 * error
    assert quantile_ratio(1e-5 * x.float()).item() == pytest.approx(quantile_ratio(x).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 0.2, 0.5), "quantiles must be 0 <= lower <= upper <= 1, not lower=0.5 and upper=0.2"),
        ((torch.ones(3), 1.1), "not lower=0.5 and upper=1.1"),
        ((torch.ones(0),), "an empty tensor has no quantiles"),
    ],
)
def test_quantile_ratio_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantile_ratio(*arguments)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8])
def test_stable_index_of_other_stable_samples(alpha):
    """1/alpha has standard error s sqrt(m/n) / log m, and log|x| of a stable law s^2 = pi^2/6 (1/alpha^2 + 1/2)."""
    n, m = 100_000, 100
    x = stats.levy_stable.rvs(alpha, 0.0, size=n, random_state=np.random.default_rng(0))
    error = math.pi * math.sqrt((alpha**-2 + 0.5) / 6) * math.sqrt((1 / n) + m / n) / math.log(m)
    assert abs(1 / stable_index(torch.from_numpy(x), m).item() - 1 / alpha) < 4 * error


def test_power_law_fit_is_that_of_powerlaw():
    powerlaw = pytest.importorskip("powerlaw")
    x = np.random.default_rng(0).pareto(1.5, 400) + 1
    with warnings.catch_warnings(action="ignore"):
        fit = powerlaw.Fit(x, verbose=0)
        ratio, p_value = fit.distribution_compare("power_law", "lognormal", normalized_ratio=True)
    got = power_law_fit(torch.from_numpy(x * np.resize([-1, 1], 400)))
    assert (got.alpha + 1, got.threshold, got.distance) == pytest.approx((fit.alpha, fit.xmin, fit.D))
    assert (got.log_likelihood_ratio, got.p_value) == pytest.approx((ratio, p_value))
    assert got.tail == (x >= fit.xmin).sum()


def test_power_law_fit_tells_a_pareto_from_a_log_normal_sample():
    pytest.importorskip("powerlaw")
    rng = np.random.default_rng(0)
    pareto = torch.from_numpy(rng.pareto(1.5, 20_000) + 1)
    found = power_law_fit(torch.cat([-pareto, torch.tensor([0.0, math.nan, math.inf])]), threshold=1.0)
    assert found.tail == 20_000
    assert abs(found.alpha - 1.5) < 4 * found.standard_error
    # the maximum likelihood estimate above a threshold is Hill's
    assert found.alpha == pytest.approx(20_000 / pareto.log().sum().item(), rel=1e-6)
    assert found.distance < 1.95 / math.sqrt(20_000)  # Kolmogorov's 0.1 % point
    normal = power_law_fit(torch.from_numpy(rng.lognormal(size=20_000)), threshold=0.5)
    assert normal.log_likelihood_ratio < -4
    assert normal.p_value < 1e-4
    assert normal.distance > 1.95 / math.sqrt(normal.tail)


ESTIMATORS = {
    "excess_kurtosis": excess_kurtosis,
    "hill_estimator": lambda x: hill_estimator(x, 3),
    "moment_estimator": lambda x: moment_estimator(x, 3),
    "quantile_ratio": quantile_ratio,
    "quantile_ratio below": lambda x: quantile_ratio(x, 0.6, 0.2),
    "stable_index": lambda x: stable_index(x, 4),
}


def test_all_estimators_of_the_module_are_tried():
    functions = [f for f in vars(tails).values() if inspect.isfunction(f) and f.__module__ == tails.__name__]
    assert {f.__name__ for f in functions if not f.__name__.startswith("_")} == {
        name.partition(" ")[0] for name in ESTIMATORS
    } | {"power_law_fit"}


@pytest.mark.parametrize("place", [0, 7, 16])
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_that_are_not_finite_give_nan(name, bad, place):
    """Wherever they stand: the last two of 18 values are in no block of 4."""
    x = torch.from_numpy(draw("student_t3", 18)).float()
    assert math.isfinite(ESTIMATORS[name](x).item())
    x[place : place + len(bad)] = torch.tensor(bad)
    got = ESTIMATORS[name](x)
    assert (got.shape, got.dtype) == ((), torch.float32)
    assert math.isnan(got.item())
    assert math.isnan(ESTIMATORS[name](torch.full((18,), bad[0])).item())


@pytest.mark.parametrize("values", [[], [2.0], [0.0], [math.nan], [math.inf]])
def test_samples_of_fewer_values_than_an_estimator_needs(values):
    x = torch.tensor(values)
    assert math.isnan(excess_kurtosis(x).item())
    for function in (hill_estimator, moment_estimator):
        with pytest.raises(ValueError, match=f"k must be at least 1 and less than the number of values .{len(values)}"):
            function(x, 1)
    with pytest.raises(ValueError, match="m must be from 2"):
        stable_index(x, 2)
    if values:
        assert quantile_ratio(x).item() == pytest.approx(1.0 if values == [2.0] else math.nan, nan_ok=True)
    pytest.importorskip("powerlaw")
    with pytest.raises(ValueError, match="two different magnitudes from the threshold on, not [01]$"):
        power_law_fit(x)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0, 3.0], [1.0, -1.0, 2.0, 3.0], [3e38, 3e38, 1.0, 1.0]])
def test_stable_index_without_logarithms_is_nan(values):
    assert math.isnan(stable_index(torch.tensor(values), 2).item())


def test_power_law_fit_leaves_out_what_is_not_finite():
    pytest.importorskip("powerlaw")
    x = torch.from_numpy(draw("student_t3", 40))
    assert power_law_fit(torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf, 0.0])])) == power_law_fit(x)
    with pytest.raises(ValueError, match="two different magnitudes from the threshold on, not 0"):
        power_law_fit(torch.tensor([math.nan, math.inf, 0.0]))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_power_law_fit_refuses_thresholds_that_are_no_magnitudes(threshold):
    pytest.importorskip("powerlaw")
    text = f"threshold must be a finite magnitude above 0, or None for the best, not {threshold}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        power_law_fit(torch.arange(1.0, 20.0), threshold)


def test_power_law_fit_refuses_and_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "powerlaw", None)
    with pytest.raises(ImportError, match=re.escape("pip install normzoo[tails]")):
        power_law_fit(torch.ones(5))
    monkeypatch.undo()
    pytest.importorskip("powerlaw")
    with pytest.raises(ValueError, match="at least two different magnitudes from the threshold on, not 1"):
        power_law_fit(torch.tensor([1.0, 2.0, 3.0]), threshold=2.5)
