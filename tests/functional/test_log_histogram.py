"""Buckets against a loop over the values' bits."""

from __future__ import annotations

import math
import struct
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normzoo.functional import _chunks, buckets
from normzoo.functional.buckets import Layout, bucket_counts, bucket_counts_all
from normzoo.functional.log_histogram import apart, bucket_edges

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 5e-39, -1e-38, 1.2e-38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 1.0]
WIDE = [2.0**128, -(2.0**128), 2.0**128 - 2.0**80, 1e300, -1e300, 1e-300, -1e-300, 5e-324, 1 - 2**-53, 2.0**-126]


def bucket_of(value: float, m: int) -> int:
    """By comparing with the edges, in exact arithmetic."""
    half, top = 1 << (8 + m), 255 << m
    extra = top + 1 if m >= 2 else 2 * half
    if math.isnan(value):
        return extra
    if value == 0:
        return 0
    sign = half * (value < 0)
    if math.isinf(value):
        return top + sign
    if abs(value) >= 2.0**128:
        return extra + (2 if value < 0 else 1)
    mantissa, exponent = math.frexp(abs(value))  # 0.5 <= mantissa < 1
    if exponent - 1 >= -126:
        return sign + ((exponent + 126) << m) + int((2 * mantissa - 1) * 2**m)
    inside = int(math.ldexp(abs(value), 126 + m))
    return sign + inside if inside else half


def counted(values: list[float], m: int) -> np.ndarray:
    counts = np.zeros(Layout(m).size, dtype=np.int64)
    for value in values:
        counts[bucket_of(value, m)] += 1
    return counts


@pytest.fixture(params=["together", "groups", "bits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of counting on samples of any size."""
    if request.param == "groups":
        monkeypatch.setattr(buckets, "TOGETHER", 6)
    if request.param == "bits":
        monkeypatch.setattr(_chunks, "LARGE", 1)
        monkeypatch.setattr(buckets, "CHUNK", 4)
        monkeypatch.setattr(_chunks, "CHUNK", 4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("m", range(8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, m: int) -> None:
    values = SPECIAL + (WIDE if dtype == torch.float64 else [])
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    got = bucket_counts_all([x, x[:0], x[:5]], m)
    assert np.array_equal(got[0].numpy(), counted(x.double().tolist(), m))
    assert np.array_equal(got[2].numpy(), counted(x[:5].double().tolist(), m))
    assert int(got[1].sum()) == 0
    assert int(got.sum()) == len(values) + 5, "each value is counted once"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", [16, 32, 64])
def test_every_value_is_in_the_bucket_of_its_bits(width: int) -> None:
    patterns = hnp.arrays(np.dtype(f"u{width // 8}"), st.integers(1, 40))  # any bits: subnormal, NaN, ...
    if width == 64:  # more of those near float32's range
        near = st.floats(2.0**-151, 2.0**-125) | st.floats(2.0**127, 2.0**129)
        patterns |= hnp.arrays(np.float64, st.integers(1, 40), elements=near).map(lambda x: x.view(np.uint64))
    arrays = patterns.map(lambda bits: bits.view(f"f{width // 8}"))

    @given(st.lists(arrays, min_size=1, max_size=4), st.integers(0, 7))
    @settings(max_examples=60, deadline=None)
    def check(parts: list[np.ndarray], m: int) -> None:
        got = bucket_counts_all([torch.from_numpy(p) for p in parts], m)
        for row, part in zip(got, parts, strict=True):
            assert np.array_equal(row.numpy(), counted(torch.from_numpy(part).double().tolist(), m))

    check()


def test_layout_for_normal_numbers_is_their_leading_bits() -> None:
    for m in range(8):
        for value in (1.0, -1.0, 0.3, -3e38, 2.0**-126, -1.7e-20):
            (pattern,) = struct.unpack("<I", struct.pack("<f", value))
            assert int(bucket_counts(torch.tensor(value), m)[pattern >> (23 - m)]) == 1


def test_edges_are_the_floats_where_buckets_start() -> None:
    edges = bucket_edges(3)
    for i in (1, 8, 700, 1016, 2039):
        inside, below = edges[i].float(), torch.nextafter(edges[i].float(), torch.tensor(0.0))
        assert bucket_counts(inside)[i] == 1
        assert bucket_counts(below)[i - 1 if i > 1 else Layout(3).half] == 1
    assert edges[-1] == 2.0**128


def test_a_nan_is_one_whatever_its_payload() -> None:
    patterns = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    x = patterns.view(torch.float32)
    double = torch.tensor([0x7FF0000000000001, 0x7FF8000000000000, -1], dtype=torch.int64).view(torch.float64)
    for m in range(8):
        for sample in (x, x.repeat(10_000), double, double.repeat(10_000)):
            assert int(apart(bucket_counts(sample, m), m)["nan"]) == sample.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_on_threads_equal_one_thread(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 300_001, 0, 1_000_003, 77, 9000]
    tensors = [torch.from_numpy(rng.standard_t(2, n) * (rng.random(n) < 0.9)).to(dtype) for n in sizes]
    tensors[1][7], tensors[3][:2] = math.nan, math.inf
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        before = threading.active_count()
        found.append(bucket_counts_all(tensors))
        assert threading.active_count() == before
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[0].sum(1).tolist() == sizes
    assert apart(found[0], 3)["zeros"].tolist() == [int((t == 0).sum()) for t in tensors]
    for row, x in zip(found[0], tensors, strict=True):
        pattern = torch.from_numpy(np.ascontiguousarray(x.float().numpy() if dtype != torch.float64 else x.numpy()))
        assert torch.equal(
            row, bucket_counts_all([x.view(-1, 1) if x.numel() else x for x in pattern.split(1000)]).sum(0)
        )


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 5, 6, 7)])
def test_memory_layout_does_not_matter(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = bucket_counts(x)
    for same in (
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 2),
        x.flatten().flip(0),
        torch.stack([x, x], -1)[..., 0],
    ):
        assert torch.equal(bucket_counts(same), want)
    expanded = x[:1].expand(3, *x.shape[1:])
    assert torch.equal(bucket_counts(expanded), 3 * bucket_counts(x[0]))
    assert torch.equal(bucket_counts(x.requires_grad_()), want)


def test_a_gpu_path_reads_nothing_back() -> None:
    """Its operations run on the meta device, where any read of a value raises."""
    for dtype in DTYPES:
        tensors = [torch.empty(n, dtype=dtype, device="meta") for n in (5, 7)]
        assert bucket_counts_all(tensors).shape == (2, 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_counts_as_the_cpu_without_synchronizing(dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL + WIDE, dtype=torch.float64).to(dtype)
    tensors = [x, torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)]
    on_gpu = [t.cuda() for t in tensors]
    bucket_counts_all(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = bucket_counts_all(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), bucket_counts_all(tensors))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        bucket_counts_all([])
    with pytest.raises(ValueError, match="mantissa_bits must be from 0 to 7, not 8"):
        bucket_counts(torch.ones(1), 8)
    with pytest.raises(ValueError, match="floating point values, not torch.int64"):
        bucket_counts(torch.arange(3))
