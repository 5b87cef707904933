"""LogHistogram against numpy on the same values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normzoo.functional import hill_estimator
from normzoo.functional.log_histogram import bucket_counts, bucket_edges
from normzoo.metrics import LogHistogram

SMALLEST = float(np.finfo(np.float32).tiny)
normal_floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
samples = hnp.arrays(np.float32, st.integers(1, 200), elements=normal_floats)


def filled(x: np.ndarray | torch.Tensor, mantissa_bits: int = 3) -> LogHistogram:
    histogram = LogHistogram(mantissa_bits=mantissa_bits)
    histogram.update(torch.as_tensor(x))
    return histogram


@given(samples, st.floats(0, 1), st.integers(0, 7), st.booleans())
@settings(max_examples=200, deadline=None)
def test_quantiles_are_within_the_stated_error(x: np.ndarray, q: float, bits: int, absolute: bool) -> None:
    values = np.sort(np.abs(x) if absolute else x).astype(np.float64)
    exact = values[max(1, math.ceil(q * len(values))) - 1]
    found = filled(x, bits).quantile(q, absolute=absolute)
    assert found == pytest.approx(exact, rel=2.0 ** -(bits + 1) * (1 + 1e-9), abs=0)


@given(samples, samples)
@settings(max_examples=50, deadline=None)
def test_merging_is_counting_together(a: np.ndarray, b: np.ndarray) -> None:
    apart = filled(a).counts + filled(b).counts
    assert torch.equal(apart, filled(np.concatenate([a, b])).counts)


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_every_value_is_in_the_bucket_of_its_bits(x: np.ndarray, bits: int) -> None:
    counts = np.zeros(2 ** (9 + bits), dtype=np.int64)
    for value in x:
        pattern = int(np.float32(value).view(np.uint32))
        counts[pattern >> (23 - bits)] += 1
    assert np.array_equal(bucket_counts(torch.from_numpy(x), bits).numpy(), counts)


def test_edges_are_the_floats_where_buckets_start() -> None:
    edges = bucket_edges(3)
    for i in (0, 1, 8, 700, 1016, 2039):
        inside, below = edges[i].float(), torch.nextafter(edges[i].float(), torch.tensor(0.0))
        assert bucket_counts(inside)[i] == 1
        if i:
            assert bucket_counts(below)[i - 1] == 1
    assert edges[-1] == 2.0**128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(filled(x).counts, filled(x.float()).counts)


def test_float64_beyond_float32_is_clamped_not_infinite() -> None:
    histogram = filled(torch.tensor([1e300, -1e300, math.inf, math.nan], dtype=torch.float64))
    assert histogram.nonfinite() == 2
    assert histogram.quantile(1.0) == pytest.approx(2.0**128, rel=0.1)


def test_zero_and_non_finite_are_counted_apart() -> None:
    histogram = filled(torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]))
    assert (histogram.zeros(), histogram.nonfinite()) == (2, 3)
    assert histogram.quantile(0.0) == pytest.approx(-1.0, rel=0.07)
    assert histogram.quantile(0.5) == 0.0


def test_nothing_counted_gives_nan() -> None:
    assert math.isnan(LogHistogram().quantile(0.5))
    assert math.isnan(LogHistogram().tail_index(0.1))
    assert math.isnan(filled(torch.tensor([math.nan])).quantile(0.5))


def test_counts_beyond_32_bits() -> None:
    histogram = filled(torch.tensor([1.0, 2.0, 2.0]))
    histogram.counts *= 3 * 10**9
    assert histogram.quantile(0.2) == pytest.approx(1.0, rel=0.07)
    assert histogram.quantile(0.9) == pytest.approx(2.0, rel=0.07)


@pytest.mark.parametrize(
    ("sample", "fraction"),
    [
        (lambda g: g.standard_normal(200_000), 0.01),
        (lambda g: g.standard_t(3, 200_000), 0.01),
        (lambda g: g.standard_cauchy(200_000), 0.05),
        (lambda g: g.pareto(1.5, 200_000) + 1, 0.1),
    ],
    ids=["normal", "t3", "cauchy", "pareto"],
)
def test_tail_index_agrees_with_hill_on_the_values(sample: object, fraction: float) -> None:
    x = torch.from_numpy(sample(np.random.default_rng(0)).astype(np.float32))  # type: ignore[operator]
    exact = hill_estimator(x, math.ceil(fraction * len(x))).item()
    assert filled(x).tail_index(fraction) == pytest.approx(exact, rel=0.02)


def test_layers_do_not_mix() -> None:
    histogram = LogHistogram(layers=2)
    histogram.update(torch.tensor([1.0]), layer=0)
    histogram.update(torch.tensor([8.0, 8.0]), layer=1)
    assert histogram.quantile(1.0, layer=0) == pytest.approx(1.0, rel=0.07)
    assert histogram.quantile(0.0, layer=1) == pytest.approx(8.0, rel=0.07)
    histogram.reset()
    assert int(histogram.counts.sum()) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogHistogram(layers=0), "layers must be at least 1"),
        (lambda: LogHistogram(mantissa_bits=8), "mantissa_bits must be from 0 to 7"),
        (lambda: LogHistogram().quantile(1.5), "q must be from 0 to 1"),
        (lambda: LogHistogram().tail_index(1.0), "fraction must be between 0 and 1"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
