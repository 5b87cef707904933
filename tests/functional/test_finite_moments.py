"""Extremes and moments of finite values: against loops in double precision, and merged from parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normzoo.functional import finite_moments as module
from normzoo.functional.finite_moments import (
    COLUMNS,
    finite_moments,
    finite_std,
    merge_finite_moments,
    no_finite_values,
    root_mean_square,
)

numbers = st.lists(st.floats(width=32, allow_subnormal=False), max_size=40)


def twin(values: list[float]) -> list[float]:
    finite = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    infinite, nan = sum(map(math.isinf, values)), sum(map(math.isnan, values))
    if not finite.size:
        return [0, math.inf, -math.inf, 0, 0, infinite, nan]
    m2 = ((finite - finite.mean()) ** 2).sum()
    return [finite.size, finite.min(), finite.max(), finite.mean(), m2, infinite, nan]


def assert_alike(found: Tensor, values: list[float]) -> None:
    expected = torch.tensor(twin(values), dtype=torch.float64)
    assert found.shape == (COLUMNS,)
    assert found.dtype == torch.float64
    size = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    n = max(len(values), 1)
    for column, tolerance in enumerate((0, 0, 0, 1e-6 * size, 1e-5 * n * size**2, 0, 0)):
        torch.testing.assert_close(found[column], expected[column], rtol=1e-6, atol=tolerance)


@given(numbers)
def test_they_are_those_of_a_loop_in_double_precision(values: list[float]) -> None:
    assert_alike(finite_moments(torch.tensor(values)), values)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_parts_merge_to_the_whole(parts: list[list[float]]) -> None:
    merged = merge_finite_moments(torch.stack([finite_moments(torch.tensor(part)) for part in parts]))
    assert_alike(merged, [v for part in parts for v in part])


def test_the_path_of_a_gpu_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000).tolist()
    x = torch.tensor(values)
    assert_alike(finite_moments(torch.cat([x, torch.tensor([torch.nan])])), [*values, math.nan])
    monkeypatch.setattr(module, "_PIECE", 7)
    assert_alike(finite_moments(x), values)


@pytest.mark.parametrize("size", [1e-38, 1.0, 1e19, 3e38])
def test_no_square_overflows(size: float) -> None:
    packed = finite_moments(torch.tensor([size, -size]))
    assert finite_std(packed).item() == pytest.approx(size, rel=1e-6)
    assert root_mean_square(packed).item() == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_any_dtype_is_taken(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(finite_moments(x.to(dtype)), finite_moments(x))


def test_complex_numbers_are_pairs() -> None:
    x = torch.randn(6)
    torch.testing.assert_close(finite_moments(torch.view_as_complex(x.view(3, 2))), finite_moments(x))


def test_of_no_values_there_are_no_moments() -> None:
    assert finite_moments(torch.empty(0, 3)).tolist() == no_finite_values().tolist()
    assert finite_std(no_finite_values()).isnan()
    assert root_mean_square(no_finite_values()).isnan()
