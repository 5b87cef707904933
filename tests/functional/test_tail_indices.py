"""Every estimator of a tail index over indices from 0.5 to 8, on quantiles of the distribution rather than a draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import qmc
from torch import Tensor

from normzoo.functional import hill_estimator, moment_estimator, power_law_fit, stable_index
from normzoo.metrics import LogHistogram

INDICES = [0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0]


def pareto(alpha: float, n: int = 4000) -> Tensor:
    """The n quantiles in the middles of equal shares, P(|x| > t) = t^-alpha, of either sign in turn."""
    shares = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
    return shares ** (-1 / alpha) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)


@pytest.mark.parametrize("alpha", INDICES)
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_of_the_largest_magnitudes(alpha: float, scale: float) -> None:
    x = scale * pareto(alpha)
    for k, error in ((3999, 1e-4), (400, 1e-3), (40, 5e-3)):
        assert hill_estimator(x, k).item() == pytest.approx(alpha, rel=error)
        assert hill_estimator(x.float(), k).item() == pytest.approx(alpha, rel=error + 1e-3)
    assert 1 / moment_estimator(x, 3999).item() == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize("alpha", INDICES)
@pytest.mark.parametrize("bits", [0, 3, 7])
def test_of_a_histogram(alpha: float, bits: int) -> None:
    x = pareto(alpha)
    histogram = LogHistogram(mantissa_bits=bits)
    histogram.update(x)
    for k in (40, 400):
        inverse = 1 / hill_estimator(x, k).item()
        assert abs(1 / histogram.tail_index(k=k) - inverse) < math.log1p(2.0**-bits)
    if bits >= 3:
        assert histogram.tail_index(0.1) == pytest.approx(alpha, rel=0.03)


@pytest.mark.parametrize("alpha", INDICES)
def test_of_a_fitted_power_law(alpha: float) -> None:
    x = pareto(alpha, 1000)
    fit = power_law_fit(x, threshold=1.0)
    assert fit.tail == 1000
    assert fit.alpha == pytest.approx(1000 / x.abs().log().sum().item(), rel=1e-3)  # the maximum of the likelihood
    assert fit.alpha == pytest.approx(alpha, rel=2e-3)
    assert fit.standard_error == pytest.approx(fit.alpha / math.sqrt(1000))
    assert fit.distance < 0.003
    assert fit.p_value > 0.5  # a log-normal far out is a power law, too
    beyond = power_law_fit(x, threshold=2.0 ** (1 / alpha))
    assert beyond.tail == pytest.approx(500, abs=1)
    assert beyond.alpha == pytest.approx(alpha, rel=5e-3)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 2.5, 8.0])
def test_of_a_power_law_above_a_threshold_that_is_looked_for(alpha: float) -> None:
    """Half of the magnitudes are a power law from 1 on; the others are spread evenly below."""
    law = pareto(alpha, 200)
    fit = power_law_fit(torch.cat([law, torch.linspace(0.3, 0.999, 100, dtype=torch.float64)]))
    assert fit.alpha == pytest.approx(alpha, rel=0.05)
    assert 0.9 < fit.threshold < 1.3
    assert fit.distance < 0.02


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 1.2, 1.5, 1.8, 2.0])
def test_of_a_stable_distribution(alpha: float) -> None:
    """By the formula of Chambers, Mallows & Stuck, on points that fill the cube evenly: blocks of four."""
    points = np.clip(qmc.Sobol(8, rng=0).random_base2(13), 1e-12, 1 - 1e-12)
    v, w = np.pi * (points[:, :4] - 0.5), -np.log(points[:, 4:])
    x = np.sin(alpha * v) / np.cos(v) ** (1 / alpha) * (np.cos((1 - alpha) * v) / w) ** ((1 - alpha) / alpha)
    for scaled in (x, 1e-6 * x):
        assert stable_index(torch.from_numpy(scaled), 4).item() == pytest.approx(alpha, rel=0.015)
