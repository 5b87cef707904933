"""Extreme eigenvalues by Lanczos, against dense eigenvalues and spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo.functional import Ritz, lanczos, ritz_values


def random_vector(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(spectrum: list[float], seed: int = 1) -> torch.Tensor:
    n = len(spectrum)
    rotation, _ = torch.linalg.qr(random_vector(n * n, seed).reshape(n, n))
    matrix = rotation @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ rotation.T
    return (matrix + matrix.T) / 2


def extremes(matrix: torch.Tensor, products: int) -> Ritz:
    return ritz_values(*lanczos(matrix.mv, random_vector(len(matrix)).to(matrix.dtype), products))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_as_many_products_as_dimensions_are_exact(n: int, more: int, seed: int, scale: float) -> None:
    matrix = random_vector(n * n, seed).reshape(n, n) * scale
    matrix = matrix + matrix.T  # indefinite
    found, true = extremes(matrix, n + more), torch.linalg.eigvalsh(matrix)
    size = true.abs().max().item()
    assert found.largest == pytest.approx(true[-1].item(), abs=1e-9 * size)
    assert found.smallest == pytest.approx(true[0].item(), abs=1e-9 * size)
    assert found.residual <= 1e-9 * size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 4.0]), min_size=1, max_size=8), st.integers(0, 6))
def test_repeated_eigenvalues_of_either_sign_are_found(spectrum: list[float], more: int) -> None:
    found = extremes(with_spectrum(spectrum), len(spectrum) + more)
    assert found.largest == pytest.approx(max(spectrum), abs=1e-9)
    assert found.smallest == pytest.approx(min(spectrum), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("matrix", "value"), [([[0.0, 0.0], [0.0, 0.0]], 0.0), ([[-7.0]], -7.0), ([[-2.0, 0.0], [0.0, -2.0]], -2.0)]
)
def test_an_exhausted_space_adds_no_eigenvalue(matrix: list[list[float]], value: float, dtype: torch.dtype) -> None:
    """A 0 of vectors that there are not would be larger than the eigenvalues below 0."""
    found = extremes(torch.tensor(matrix, dtype=dtype), 6)
    assert (found.largest, found.smallest) == pytest.approx((value, value), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10_000))
def test_few_products_bound_from_inside_and_the_residual_holds(n: int, products: int, seed: int) -> None:
    matrix = random_vector(n * n, seed).reshape(n, n)
    matrix = matrix + matrix.T
    found, true = extremes(matrix, products), torch.linalg.eigvalsh(matrix)
    rounding = 1e-9 * true.abs().max().item()
    assert true[0].item() - rounding <= found.smallest <= found.largest <= true[-1].item() + rounding
    assert (true - found.largest).abs().min().item() <= found.residual + rounding


def test_float32_without_orthogonalization_stays_inside_the_spectrum() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 300), torch.tensor([30.0, 100.0])])
    found = ritz_values(*lanczos(lambda v: spectrum * v, random_vector(302).float(), 60))
    assert found.largest == pytest.approx(100.0, rel=1e-5)
    assert found.smallest == pytest.approx(-1.0, abs=1e-2)
    assert found.residual < 1e-3


def test_what_is_not_finite_is_nan() -> None:
    matrix = torch.full((3, 3), torch.nan, dtype=torch.float64)
    assert all(map(math.isnan, extremes(matrix, 3)))


def test_nothing_is_read_on_the_host_and_the_start_is_kept() -> None:
    start = random_vector(4)
    before = start.clone()
    alpha, beta = lanczos(with_spectrum([1.0, 2.0, 3.0, 4.0]).mv, start, 2)
    assert torch.equal(start, before)
    assert alpha.shape == beta.shape == (2,)
    assert alpha.dtype == beta.dtype == torch.float64
    assert lanczos(torch.empty(4, 4, device="meta").mv, torch.empty(4, device="meta"), 2)[0].is_meta
