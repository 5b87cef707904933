"""The law of products of Gaussian matrices, against its moments, quadrature, and matrices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.testing import assert_close

from normzoo.functional import fuss_catalan_cdf, fuss_catalan_density, fuss_catalan_edge, kolmogorov_smirnov


@functools.cache
def quadrature(factors: int, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Midpoints s = edge u^8 of equal steps of u, fine at 0, where the density is infinite; its masses; their ends."""
    u, edge = (torch.arange(count, dtype=torch.float64) + 0.5) / count, fuss_catalan_edge(factors)
    s = edge * u**8
    return s, fuss_catalan_density(s, factors) * 8 * edge * u**7 / count, edge * (u + 0.5 / count) ** 8


@pytest.mark.parametrize("factors", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_moments_of_squared_values_are_the_fuss_catalan_numbers(factors, order):
    number = math.comb((factors + 1) * order, order) // (factors * order + 1)
    s, masses, _ = quadrature(factors)
    assert float((s ** (2 * order) * masses).sum()) == pytest.approx(number, rel=3e-4)


def test_one_matrix_has_the_quarter_circle():
    s = torch.linspace(-0.5, 2.5, 301, dtype=torch.float64)
    assert_close(fuss_catalan_density(s, 1), (4 - s**2).clamp_min(0).sqrt() / math.pi * (s >= 0), atol=1e-8, rtol=0)
    inside = s.clamp(0, 2)
    area = (inside * (4 - inside**2).sqrt() / 2 + 2 * (inside / 2).asin()) / math.pi
    assert_close(fuss_catalan_cdf(s, 1), area, atol=1e-12, rtol=0)


def test_two_matrices_have_the_closed_form_of_the_law_of_order_two():
    # Penson & Zyczkowski 2011, equation 14, of the squared singular value
    x = torch.linspace(0.01, 6.74, 200, dtype=torch.float64)
    root = 27 + 3 * (81 - 12 * x).sqrt()
    third = 2 ** (1 / 3)
    p = third * math.sqrt(3) / (12 * math.pi) * (third * root ** (2 / 3) - 6 * x ** (1 / 3))
    p = p / (x ** (2 / 3) * root ** (1 / 3))
    assert_close(fuss_catalan_density(x.sqrt(), 2) / (2 * x.sqrt()), p, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factors", [1, 2, 3, 5, 9])
def test_the_distribution_is_the_integral_of_the_density(factors):
    _, masses, ends = quadrature(factors)
    assert_close(fuss_catalan_cdf(ends, factors), masses.cumsum(0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("factors", [1, 3, 5])
def test_beyond_the_support_there_is_nothing_and_at_its_ends_the_limits(factors):
    edge = fuss_catalan_edge(factors)
    ends = torch.tensor([-1.0, 0.0, edge, edge + 1], dtype=torch.float64)
    at_zero = 2 / math.pi if factors == 1 else math.inf
    assert fuss_catalan_density(ends, factors).tolist() == pytest.approx([0.0, at_zero, 0.0, 0.0])
    assert fuss_catalan_cdf(ends, factors).tolist() == [0.0, 0.0, 1.0, 1.0]
    tiny = torch.tensor([1e-12, 1e-9, 1e-6], dtype=torch.float64)  # where the law is a power of s
    ratio = fuss_catalan_cdf(tiny, factors) / tiny ** (2 / (factors + 1))
    assert_close(ratio, ratio[1].expand(3), rtol=5e-2, atol=0)
    assert fuss_catalan_cdf(torch.ones(2, 3), factors).shape == (2, 3)


def test_singular_values_of_products_follow_the_law_of_their_number_of_factors_only():
    generator = torch.Generator().manual_seed(0)
    n = 200
    for factors in (1, 2, 3, 5):
        product = torch.eye(n, dtype=torch.float64)
        for _ in range(factors):
            product = product @ torch.randn(n, n, dtype=torch.float64, generator=generator) / math.sqrt(n)
        values = torch.linalg.svdvals(product)
        distances = {k: kolmogorov_smirnov(fuss_catalan_cdf(values, k)).item() for k in (1, 2, 3, 5)}
        assert min(distances, key=distances.__getitem__) == factors
        assert distances[factors] < 0.02


@pytest.mark.parametrize("function", [fuss_catalan_density, fuss_catalan_cdf])
def test_there_is_no_product_of_no_matrix(function):
    with pytest.raises(ValueError, match="factors must be at least 1, not 0"):
        function(torch.ones(1), 0)
    with pytest.raises(ValueError, match="factors must be at least 1, not -1"):
        fuss_catalan_edge(-1)


def test_the_distance_is_that_of_the_two_step_functions():
    generator = torch.Generator().manual_seed(1)
    sample = torch.rand(2, 7, dtype=torch.float64, generator=generator)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for row, found in zip(sample, kolmogorov_smirnov(sample), strict=True):
        brute = ((row[:, None] <= grid).double().mean(0) - grid).abs().max()
        assert found.item() == pytest.approx(brute.item(), abs=1e-4)
    assert kolmogorov_smirnov(torch.tensor([0.5])).item() == 0.5
    assert kolmogorov_smirnov((torch.arange(10) + 0.5) / 10).item() == pytest.approx(0.05)
    for empty in (torch.tensor(1.0), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="at least one value"):
            kolmogorov_smirnov(empty)
