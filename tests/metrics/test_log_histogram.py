"""LogHistogram against numpy on the same values."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torchmetrics import SumMetric
from torchmetrics.metric import CompositionalMetric

from normzoo.functional import hill_estimator
from normzoo.metrics import ChannelMoments, LogHistogram

SMALLEST = float(np.finfo(np.float32).tiny)
normal_floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
samples = hnp.arrays(np.float32, st.integers(1, 200), elements=normal_floats)


def truncated(x: np.ndarray) -> np.ndarray:
    """Float64 towards zero to float32."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    # float64 is not rounded to float32, and so may lie on the other side of an edge
    exact = x.float() if dtype != torch.float64 else torch.from_numpy(truncated(x.numpy()))
    assert torch.equal(filled(x).counts, filled(exact).counts)


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
    assert histogram.quantile(1.0, layer=-1) == histogram.quantile(1.0, layer=1)
    histogram.reset()
    assert int(histogram.counts.sum()) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogHistogram(layers=0), "layers must be at least 1"),
        (lambda: LogHistogram(mantissa_bits=8), "mantissa_bits must be from 0 to 7"),
        (lambda: LogHistogram().quantile(1.5), "q must be from 0 to 1"),
        (lambda: LogHistogram().tail_index(1.0), "fraction must be between 0 and 1"),
        (lambda: LogHistogram().tail_index(), "give either fraction or k, not fraction=None and k=None"),
        (lambda: LogHistogram().tail_index(0.1, k=3), "give either fraction or k"),
        (lambda: LogHistogram().tail_index(k=0), "k must be at least 1, not 0"),
        (lambda: LogHistogram(2).update_all([torch.ones(1)]), "one tensor for each of the 2 layers is needed, not 1"),
        (
            lambda: LogHistogram(2).merge_state(LogHistogram(3)),
            r"of \(layers, mantissa bits\) \(3, 3\) cannot be merged",
        ),
        (lambda: LogHistogram(2).merge_state(LogHistogram(2, 4)), r"cannot be merged into one of \(2, 3\)"),
        (
            lambda: LogHistogram(3).merge_state({"counts": torch.ones(1, 4096, dtype=torch.int64)}),
            r"counts of shape \(1, 4096\) cannot be merged into that of a LogHistogram of shape \(3, 4096\)",
        ),
        (lambda: LogHistogram().merge_state({"other": torch.ones(1)}), "Expected state variable counts"),
        (lambda: LogHistogram().merge_state(ChannelMoments(3)), "to be an instance of LogHistogram"),
        (lambda: LogHistogram().update(torch.ones(2, dtype=torch.int32)), "floating point values, not torch.int32"),
        (lambda: LogHistogram().to_tensorboard(max_buckets=2), "max_buckets must be at least 3, not 2"),
        (lambda: LogHistogram.from_dict({"layers": []}), "needs mantissa_bits; there are layers"),
        (
            lambda: LogHistogram.from_dict({"mantissa_bits": 3, "layers": [[[4096, 1]]]}),
            "bucket 4096 with count 1: buckets go from 0 to 4095 with 3 mantissa bits",
        ),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


SAMPLES = {
    "gaussian": lambda r: r.standard_normal(20_000),
    "student_t3": lambda r: r.standard_t(3, 20_000),
    "cauchy": lambda r: r.standard_cauchy(20_000),
    "stable": lambda r: stats.levy_stable.rvs(1.5, 0.0, size=20_000, random_state=r),
    "all_exponents": lambda r: np.exp2(r.uniform(-126, 127, 20_000)) * r.choice([-1, 1], 20_000),
    "powers_of_two": lambda r: np.exp2(r.integers(-126, 127, 20_000)),
    "below_powers_of_two": lambda r: np.nextafter(np.exp2(r.integers(-120, 127, 20_000)).astype(np.float32), 0),
    "mostly_zero": lambda r: r.standard_normal(20_000) * (r.random(20_000) < 0.3),
    "one_value": lambda r: np.full(20_000, -0.3),
    "negative": lambda r: -r.exponential(size=20_000),
}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SAMPLES)
def test_several_quantiles_against_numpy(name: str, dtype: type, absolute: bool) -> None:
    x = SAMPLES[name](np.random.default_rng(1)).astype(dtype)
    levels = [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0]
    want = np.quantile((np.abs(x) if absolute else x).astype(np.float64), levels, method="inverted_cdf")
    for bits in (0, 3, 7):
        found = filled(x, bits).quantile(levels, absolute=absolute)
        assert found == pytest.approx(want, rel=2.0 ** -(bits + 1) * (1 + 1e-9), abs=0)


def test_merging_in_any_order_gives_the_same_counts() -> None:
    parts = [filled(np.random.default_rng(seed).standard_cauchy(100).astype(np.float32)) for seed in range(8)]
    totals = []
    for seed in range(5):
        random.Random(seed).shuffle(parts)
        total = LogHistogram()
        for part in parts:
            total.merge_state(part if seed % 2 else part.metric_state)
        totals.append(total)
    assert all(torch.equal(t.counts, totals[0].counts) for t in totals)
    assert int(totals[0].compute().sum()) == 800


def test_merging_and_adding_as_before_go_on_with_a_warning() -> None:
    one, other = filled(torch.tensor([1.0])), filled(torch.tensor([8.0, 8.0]))
    with pytest.warns(FutureWarning, match="from the next version on torchmetrics' composition") as caught:
        both = one + other
    assert isinstance(both, LogHistogram)
    assert both.quantile([0.0, 1.0]) == [1.0625, 8.5]
    assert int(one.counts.sum()) == 1
    with pytest.warns(DeprecationWarning, match="use merge_state") as also:
        one.merge(other)
    assert torch.equal(one.counts, both.counts)
    assert {warning.filename for warning in (*caught, *also)} == {__file__}


def test_all_other_arithmetic_is_torchmetrics_composition() -> None:
    one, other = filled(torch.tensor([1.0])), filled(torch.tensor([1.0, 1.0]))
    five = SumMetric()
    five.update(5)
    for composed, want in ((one + 1, 2), (1 + one, 2), (one * 3, 3), (other - one, 1), (one + five, 6)):
        assert isinstance(composed, CompositionalMetric)
        assert int(composed.compute()[0, 1016]) == want
    difference = other - one
    difference.update(torch.tensor([1.0]))  # of both
    assert int(difference.compute()[0, 1016]) == 1
    assert int(one.counts.sum()) == 2
    difference.reset()
    assert int(other.counts.sum()) == 0


def test_update_all_is_an_update_of_each_layer_and_resets_what_was_computed() -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 70_000, 1)]
    one, each = LogHistogram(3), LogHistogram(3)
    for _ in range(2):
        one.update_all(tensors)
        for layer, x in enumerate(tensors):
            each.update(x, layer)
        assert torch.equal(one.compute(), each.compute())


@pytest.mark.parametrize("count", [10**9, 2**40, 2**61])
def test_counts_do_not_overflow(count: int) -> None:
    histogram = LogHistogram.from_dict({"mantissa_bits": 3, "layers": [[[1016, count], [1024, count]]]})
    both = histogram.clone()
    if count < 2**61:
        both.merge_state(histogram)
    n = int(both.counts.sum())
    assert n == (4 if count < 2**61 else 2) * count
    assert both.quantile([0.49, 0.51]) == [1.0625, 2.125]
    assert both.to_tensorboard()["num"] == n
    assert json.loads(json.dumps(both.to_dict()))["layers"][0][0][1] == n // 2


@given(samples, st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_plain_data_there_and_back(x: np.ndarray, bits: int) -> None:
    histogram = LogHistogram(2, bits)
    histogram.update(torch.from_numpy(x), layer=1)
    again = LogHistogram.from_dict(json.loads(json.dumps(histogram.to_dict())))
    assert torch.equal(again.compute(), histogram.counts)
    assert again.mantissa_bits == bits
    assert sum(len(row) for row in histogram.to_dict()["layers"]) <= len(x)


@pytest.mark.parametrize("k", [1, 50, 2000])
def test_tail_index_of_the_k_largest(k: int) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(3, 100_000))
    exact = hill_estimator(x, k).item()
    # each log excess is known to within a bucket, log(1 + 2^-7)
    assert 1 / filled(x, 7).tail_index(k=k) == pytest.approx(1 / exact, abs=math.log1p(2.0**-7))
    assert filled(x, 7).tail_index(k / 100_000) == filled(x, 7).tail_index(k=k)


def test_tail_index_where_it_is_not_known() -> None:
    beyond = filled(torch.tensor([1e300, 1.0, 2.0, 3.0], dtype=torch.float64))
    assert math.isnan(beyond.tail_index(k=2))
    assert math.isnan(filled(torch.tensor([1e-42, 1e-42, 1.0])).tail_index(k=2))
    assert filled(torch.tensor([1.0, 2.0, 2.0])).tail_index(k=9) == filled(torch.tensor([1.0, 2.0, 2.0])).tail_index(
        k=2
    )


def test_what_is_counted_apart() -> None:
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-38, math.inf, -math.inf, -math.inf, math.nan, 1.0]
    histogram = filled(torch.tensor(values))
    assert histogram.apart() == {
        "zeros": 2,
        "tiny": 2,
        "subnormal": 1,
        "positive_infinity": 1,
        "negative_infinity": 2,
        "nan": 1,
        "positive_overflow": 0,
        "negative_overflow": 0,
    }
    assert (histogram.zeros(), histogram.nonfinite()) == (2, 4)
    beyond = filled(torch.tensor([1e300, -1e300, -1e39, math.inf, math.nan, 1e-300], dtype=torch.float64))
    assert {k: v for k, v in beyond.apart().items() if v} == {
        "tiny": 1,
        "positive_infinity": 1,
        "nan": 1,
        "positive_overflow": 1,
        "negative_overflow": 2,
    }
    assert beyond.quantile([0.0, 0.75, 1.0]) == [-math.inf, 0.0, math.inf]
    assert beyond.quantile([0.25, 1.0], absolute=True) == [0.0, math.inf]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("max_buckets", [3, 30, 200])
def test_tensorboard_arguments_describe_the_sample(name: str, max_buckets: int) -> None:
    x = SAMPLES[name](np.random.default_rng(2)).astype(np.float32).astype(np.float64)
    found = filled(x).to_tensorboard(max_buckets=max_buckets)
    limits, counts = np.array(found["bucket_limits"]), np.array(found["bucket_counts"])
    assert len(limits) == len(counts) <= max_buckets
    assert (np.diff(limits) > 0).all()
    assert found["num"] == counts.sum() == len(x)
    # buckets hold their lower edge in magnitude, np.histogram's their left one: move values off the edges
    inside = np.nextafter(x.astype(np.float32), np.copysign(np.float32(np.inf), x)).astype(np.float64)
    want = np.histogram(inside, bins=np.concatenate([[-np.inf], limits]))[0]
    assert np.array_equal(counts, want)
    assert found["min"] <= x.min()
    assert found["max"] >= x.max()
    rel = 2.0**-4 * (1 + 1e-9)
    assert found["min"] == pytest.approx(x.min(), rel=2 * rel, abs=1e-37)
    assert found["max"] == pytest.approx(x.max(), rel=2 * rel, abs=1e-37)
    assert found["sum"] == pytest.approx(x.sum(), abs=rel * np.abs(x).sum())
    assert found["sum_squares"] == pytest.approx((x**2).sum(), rel=(1 + rel) ** 2 - 1)


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    histogram = LogHistogram(2)
    histogram.update(torch.randn(10_000, generator=torch.Generator().manual_seed(0)), layer=1)
    with SummaryWriter(str(tmp_path)) as writer:
        for layer in range(2):
            writer.add_histogram_raw(f"layer{layer}", global_step=7, **histogram.to_tensorboard(layer))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    (event,) = events.Histograms("layer1")
    want = histogram.to_tensorboard(1)
    assert event.step == 7
    assert event.histogram_value.bucket_limit == want["bucket_limits"]
    assert event.histogram_value.bucket == want["bucket_counts"]
    for name in ("min", "max", "num", "sum", "sum_squares"):
        assert getattr(event.histogram_value, name) == want[name]
    assert events.Histograms("layer0")[0].histogram_value.num == 0


def test_state_survives_a_state_dict() -> None:
    histogram = filled(torch.tensor([1.0, 2.0]))
    histogram.persistent(True)
    again = LogHistogram()
    again.load_state_dict(histogram.state_dict())
    assert torch.equal(again.counts, histogram.counts)
