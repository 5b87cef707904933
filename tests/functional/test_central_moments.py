"""Central moments and histograms taken together, against numpy and scipy in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normzoo.functional import _chunks, buckets
from normzoo.functional import central_moments as module
from normzoo.functional.buckets import bucket_counts_all
from normzoo.functional.central_moments import (
    central_moments,
    euclidean_norm,
    kurtosis,
    largest_magnitude,
    merge_central_moments,
    no_values,
)
from normzoo.functional.histogram_and_moments import (
    histogram_and_moments,
    merged,
    sample,
    sampled_histogram_and_moments,
)

rng = np.random.default_rng(0)
SAMPLES = {
    "gaussian": rng.normal(size=30_000),
    "student3": rng.standard_t(3, 30_000),
    "cauchy": rng.standard_cauchy(30_000),
    "stable": scipy.stats.levy_stable.rvs(1.5, 0, size=20_000, random_state=1),
    "offset": rng.normal(size=300_000) + 5e3,
    "small": rng.normal(size=999) * 1e-25,
    "tiny": rng.normal(size=20_000) * 1e-30,
    "large": rng.normal(size=20_000) * 1e32,
}
HALF = ["gaussian", "student3", "stable"]  # within its range, and not all but equal
CASES = [(name, dtype) for name in SAMPLES for dtype in (torch.float32, torch.float64)]
CASES += [(name, dtype) for name in HALF for dtype in (torch.bfloat16, torch.float16)]


def twin(x: np.ndarray) -> list[float]:
    x = x.astype(np.longdouble)
    d = x - x.mean()
    return [len(x), x.min(), x.max(), x.mean(), (d**2).sum(), (d**3).sum(), (d**4).sum(), (x**2).sum()]


@pytest.fixture(params=[2**19, 9_000])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in one piece, and in several."""
    monkeypatch.setattr(_chunks, "CHUNK", request.param)
    monkeypatch.setattr(buckets, "CHUNK", request.param)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_moments_and_figures_agree_with_double_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(SAMPLES[name]).to(dtype)
    before = x.clone()
    found = central_moments([x, x[:100].clone()])
    assert torch.equal(x, before)
    for row, values in zip(found, (x, x[:100]), strict=True):
        expected = twin(values.double().numpy())
        spread = math.sqrt(expected[4] / expected[0])
        assert row[:3].tolist() == expected[:3]
        assert float(row[3]) == pytest.approx(float(expected[3]), abs=1e-6 * spread + 1e-6 * abs(float(expected[3])))
        assert float(row[4]) == pytest.approx(float(expected[4]), rel=1e-5)
        third = 1e-4 * expected[0] * spread**3 * max(1.0, float(expected[6]) / (expected[0] * spread**4))
        assert float(row[5]) == pytest.approx(float(expected[5]), rel=1e-4, abs=third)
        assert float(row[6]) == pytest.approx(float(expected[6]), rel=1e-4)
        plain = values.double().numpy()
        assert float(largest_magnitude(row)) == np.abs(plain).max()
        assert float(euclidean_norm(row)) == pytest.approx(float(np.sqrt((plain.astype(np.longdouble) ** 2).sum())))
        scale = np.abs(plain).max()
        assert float(kurtosis(row)) == pytest.approx(scipy.stats.kurtosis(plain / scale), rel=1e-4, abs=1e-3)


def test_tensors_of_other_precisions_beside_it_change_nothing() -> None:
    x = torch.from_numpy(SAMPLES["offset"])
    tensors = [x.to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64)]
    together = central_moments(tensors)
    assert torch.equal(together, torch.cat([central_moments([t]) for t in tensors]))


def test_what_a_device_computes_is_what_chunks_do() -> None:
    for name in ("gaussian", "student3", "offset"):
        x = torch.from_numpy(SAMPLES[name])
        assert torch.allclose(module._of_device(x), central_moments([x])[0], rtol=1e-9)


def test_a_device_joins_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(SAMPLES["gaussian"])
    monkeypatch.setattr(module, "TOGETHER", 7_001)
    assert torch.allclose(module._of_device(x), central_moments([x])[0], rtol=1e-9)


@pytest.mark.parametrize("size", [3, 20_000])
def test_equal_values_have_no_kurtosis(size: int) -> None:
    found = central_moments([torch.full((size,), 0.1), torch.zeros(size)])
    assert kurtosis(found).isnan().all()
    assert largest_magnitude(found).tolist() == [float(torch.tensor(0.1)), 0.0]
    assert euclidean_norm(found).tolist() == pytest.approx([0.1 * size**0.5, 0.0])


@pytest.mark.parametrize("size", [5, 20_000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show(size: int, value: float) -> None:
    x = torch.arange(float(size))
    x[1] = value
    found = central_moments([x])[0]
    assert not math.isfinite(float(largest_magnitude(found)))
    assert not math.isfinite(float(euclidean_norm(found)))
    assert math.isnan(float(kurtosis(found)))


_values = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e3, 1e3).map(lambda v: round(v, 3)))


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(_values, min_size=1, max_size=5), empty=st.integers(0, 3))
def test_merging_parts_is_taking_them_together(parts: list[np.ndarray], empty: int) -> None:
    rows = torch.cat([central_moments([torch.from_numpy(p) for p in parts]), no_values(empty)])
    together = central_moments([torch.from_numpy(np.concatenate(parts))])[0]
    for order in (rows, rows.flip(0)):
        assert torch.allclose(merge_central_moments(order), together, rtol=1e-9, atol=1e-2)


@pytest.mark.usefixtures("cut")
def test_both_at_once_are_each_by_itself() -> None:
    tensors = [torch.from_numpy(v).float() for v in SAMPLES.values()] + [torch.randn(64, 3, 3, 3), torch.zeros(7)]
    tensors.append(torch.randn(40, 50, 6).transpose(0, 1))
    counts, moments = histogram_and_moments(tensors, compiled=False)
    assert torch.equal(counts, bucket_counts_all(tensors))
    assert torch.equal(moments, central_moments(tensors))


def test_groups_are_merged() -> None:
    tensors = [torch.randn(n, dtype=torch.float64) for n in (10, 200, 3, 9000)]
    counts, moments = merged(*histogram_and_moments(tensors), [0, 1, 0, 2])
    expected = [torch.cat([tensors[0], tensors[2]]), tensors[1], tensors[3]]
    assert torch.equal(counts, bucket_counts_all(expected))
    assert torch.allclose(moments, central_moments(expected))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 1000), budget=st.integers(16, 400))
def test_samples_are_of_the_budget_and_take_turns(size: int, budget: int) -> None:
    x = torch.arange(float(size))
    taken = [sample(x, budget, turn) for turn in range(size)]
    assert all(len(t) == len(t.unique()) for t in taken)
    assert all(len(t) == size if size <= budget else budget - 16 < len(t) <= budget for t in taken)
    assert len(torch.cat(taken).unique()) >= 0.9 * (size - 16)
    apart = taken[-1].sort().values.diff()
    assert size <= budget or len(apart) < 16 or apart.max() <= 16 + size / (budget // 16)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_a_sample_keeps_extremes_and_norm_exact(scale: float) -> None:
    tensors = [torch.randn(40_000) * scale, torch.randn(33) * scale]
    counts, moments = sampled_histogram_and_moments(tensors, 1000, turn=3)
    expected = central_moments(tensors)
    assert counts.sum(1).tolist() == [992, 33] == moments[:, 0].tolist()
    assert torch.equal(largest_magnitude(moments), largest_magnitude(expected))
    assert torch.allclose(euclidean_norm(moments), euclidean_norm(expected), rtol=1e-6)
    taken = [sample(x, 1000, 3) for x in tensors]
    assert torch.equal(counts, bucket_counts_all(taken))
    assert torch.allclose(moments[:, 3:7], central_moments(taken)[:, 3:7])
