"""What Numba reads off histograms is what PyTorch's functions do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ranks import run_function
from torch import Tensor

from normzoo.functional import hill_estimator
from normzoo.functional.buckets import Layout, bucket_counts_all
from normzoo.functional.log_histogram import TAIL_LEVELS
from normzoo.functional.tail_statistics import TailStatistics, tail_statistics

rng = np.random.default_rng(1)
SPECIAL = {
    "nothing but zeros": [0.0, -0.0, 0.0],
    "tiny values": [1e-45, -1e-45, 0.0, 2e-45],
    "tiny values among the largest": [1e-45, 1e-45, 1e-45, 1.0],
    "one value": [3.0],
    "equal values of both signs": [2.0, -2.0, 2.0],
    "infinite and NaN": [np.inf, -np.inf, np.nan, 1.0, 2.0],
    "nothing finite": [np.nan, np.inf],
    "beyond float32": [1e39, -1e300, 1.0, 2.0],
    "one far value": [1e-30, 1e-30, 1e30],
    "subnormal values": [1e-39, -3e-39, 1e-38, 1.0],
}


def assert_same(compiled: TailStatistics, expected: TailStatistics) -> None:
    for name in ("sizes", "zeros", "nonfinite"):
        assert getattr(compiled, name).tolist() == getattr(expected, name).tolist()
    assert torch.equal(compiled.quantiles.nan_to_num(-1), expected.quantiles.nan_to_num(-1))
    assert torch.equal(compiled.quantiles.isnan(), expected.quantiles.isnan())
    torch.testing.assert_close(compiled.alpha, expected.alpha, rtol=1e-12, atol=0, equal_nan=True)
    assert len(compiled.pairs) == len(expected.pairs)
    assert all(map(np.array_equal, compiled.pairs, expected.pairs))


@settings(max_examples=150)
@given(
    values=st.lists(
        hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(allow_nan=True, allow_infinity=True)),
        min_size=1,
        max_size=4,
    ),
    levels=st.lists(st.floats(0, 1), max_size=4),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    mantissa_bits=st.integers(0, 7),
)
def test_statistics_of_any_values(
    values: list[np.ndarray], levels: list[float], fraction: float, mantissa_bits: int
) -> None:
    counts = bucket_counts_all([torch.from_numpy(x) for x in values], mantissa_bits)
    compiled = tail_statistics(counts, mantissa_bits, fraction, levels, compiled=True)
    assert_same(compiled, tail_statistics(counts, mantissa_bits, fraction, levels, compiled=False))


@pytest.mark.parametrize("mantissa_bits", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_statistics_of_special_values(mantissa_bits: int, fraction: float) -> None:
    values = [torch.tensor(x, dtype=torch.float64) for x in SPECIAL.values()]
    values += [torch.from_numpy(rng.standard_cauchy(5000)), torch.from_numpy(rng.normal(size=20_000) * 1e-4)]
    counts = bucket_counts_all(values, mantissa_bits)
    counts = torch.cat([counts, torch.zeros_like(counts[:1])])  # and of no values at all
    compiled = tail_statistics(counts, mantissa_bits, fraction, compiled=True)
    assert_same(compiled, tail_statistics(counts, mantissa_bits, fraction, compiled=False))
    assert compiled.sizes.tolist() == [*(len(x) for x in values), 0]
    strided = torch.cat([counts, counts], 1)[:, : counts.shape[1]]
    assert_same(tail_statistics(strided, mantissa_bits, fraction, compiled=True), compiled)


@pytest.mark.parametrize("compiled", [True, False])
def test_statistics_are_those_of_the_values(compiled: bool) -> None:
    x = torch.from_numpy(rng.standard_t(3, size=50_000))
    x[:70] = 0.0
    found = tail_statistics(bucket_counts_all([x], 7), 7, 0.01, compiled=compiled)
    ranked = x.abs().sort().values
    exact = [ranked[int(np.ceil(q * len(x))) - 1].item() for q in TAIL_LEVELS]
    assert found.quantiles[0].tolist() == pytest.approx(exact, rel=2**-8)
    expected = hill_estimator(x[x != 0], k=int(np.ceil(0.01 * (len(x) - 70))))
    assert found.alpha.item() == pytest.approx(float(expected), rel=1e-2)
    assert (found.sizes.item(), found.zeros.item(), found.nonfinite.item()) == (50_000, 70, 0)
    dense = torch.zeros(Layout(7).size, dtype=torch.int64)
    dense[found.pairs[0][:, 0]] = torch.from_numpy(found.pairs[0][:, 1])
    assert torch.equal(dense[None], bucket_counts_all([x], 7))


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_out_of_range_is_refused(compiled: bool) -> None:
    counts: Tensor = bucket_counts_all([torch.ones(3)])
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, not 1"):
        tail_statistics(counts, 3, 1, compiled=compiled)
    with pytest.raises(ValueError, match="q must be from 0 to 1"):
        tail_statistics(counts, 3, 0.1, [0.5, 1.5], compiled=compiled)


def by_default() -> None:
    import sys

    import torch

    from normzoo.functional import _one_pass
    from normzoo.functional.buckets import bucket_counts_all
    from normzoo.functional.histogram_and_moments import prepare
    from normzoo.functional.tail_statistics import prepare as prepare_statistics
    from normzoo.functional.tail_statistics import tail_statistics

    counts = bucket_counts_all([torch.linspace(-1, 1, 1000)])
    prepare_statistics()
    without = tail_statistics(counts, 3, 0.1)
    assert "numba" not in sys.modules
    prepare([torch.empty(_one_pass.WORTHWHILE)])
    prepare_statistics()
    assert "normzoo.functional._tail_kernel" in sys.modules
    with_numba = tail_statistics(counts, 3, 0.1)
    torch.testing.assert_close(with_numba.alpha, without.alpha, rtol=1e-12, atol=0)


def test_numba_is_used_where_gradients_are_worth_it(tmp_path: Path) -> None:
    run_function(tmp_path, by_default, 1)
