"""The pass that Numba compiles: counts as by PyTorch's functions, moments as in extended precision."""

from __future__ import annotations

import builtins
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ranks import run_function
from sweeps import few
from torch import Tensor

from normzoo.functional import _one_pass, buckets
from normzoo.functional.buckets import Layout, add_by_histc, add_by_scatter, bucket_counts_all
from normzoo.functional.central_moments import central_moments
from normzoo.functional.histogram_and_moments import histogram_and_moments, prepare

# Float32 values at which a bucket ends, or that are counted apart
FLOATS = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -3e-39, 1.1754942e-38, 1.17549435e-38, -1.17549435e-38, 1.0, -1.125]
FLOATS += [3.4028235e38, -3.4028235e38, math.inf, -math.inf, math.nan]
DOUBLES = [5e-324, -1e-310, 2.0**-134, -(2.0**-133), 2.0**-126 * (1 - 2.0**-52), 1e-40, -1e-39, 1 + 2.0**-40]
DOUBLES += [2.0**128, -(2.0**128), 2.0**128 * (1 - 2.0**-53), 1e39, -1e300]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
rng = np.random.default_rng(0)


def special_values(dtype: torch.dtype) -> Tensor:
    """Also every pattern of bits, of half precision, and patterns of all exponents, of others."""
    values = [torch.tensor(FLOATS, dtype=torch.float64).to(dtype)]
    if dtype == torch.float64:
        values.append(torch.tensor(DOUBLES, dtype=dtype))
    if dtype.itemsize == 2:
        values.append(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype))
    else:
        whole = torch.int32 if dtype == torch.float32 else torch.int64
        patterns = np.frombuffer(rng.bytes(4000 * dtype.itemsize), f"int{8 * dtype.itemsize}").copy()
        values.append(torch.from_numpy(patterns).to(whole).view(dtype))
    return torch.cat(values)


def reference_bucket(value: float, layout: Layout) -> int:
    """The bucket of a value, by exact arithmetic on Python's numbers."""
    m, negative = layout.mantissa_bits, math.copysign(1.0, value) < 0
    if math.isnan(value):
        return layout.nan
    if value == 0:
        return 0
    if math.isinf(value):
        return layout.infinity + layout.half * negative
    if abs(value) >= 2.0**128:
        return layout.overflow + negative
    mantissa, exponent = math.frexp(abs(value))  # abs(value) = mantissa 2^exponent, mantissa from 0.5 to 1
    if exponent - 1 < -126:
        magnitude = math.floor(math.ldexp(mantissa, exponent + 126 + m))
    else:
        magnitude = ((exponent + 126) << m) + math.floor((2 * mantissa - 1) * 2**m)
    return (magnitude + layout.half * negative) if magnitude else layout.half


def twin(x: Tensor) -> np.ndarray:
    """The moments in extended precision."""
    values = x.double().numpy().astype(np.longdouble)
    d = values - values.mean()
    return np.array(
        [len(d), values.min(), values.max(), values.mean(), (d**2).sum(), (d**3).sum(), (d**4).sum(), (values**2).sum()]
    )


def assert_moments(found: Tensor, x: Tensor, rtol: float = 1e-12) -> None:
    expected = twin(x)
    assert found[:3].tolist() == [float(v) for v in expected[:3]]
    values = x.double().numpy().astype(np.longdouble)
    d = np.abs(values - values.mean())
    # Mean and third moment are sums of both signs, which may cancel: they are exact beside the sums of magnitudes
    scale = [np.abs(values).mean(), expected[4], (d**3).sum(), expected[6], expected[7]]
    for value, right, size in zip(found[3:].tolist(), expected[3:], scale, strict=True):
        assert abs(value - right) <= rtol * size


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors, too, by Numba, in pieces that are shared out among threads."""
    monkeypatch.setattr(_one_pass, "WORTHWHILE", 1)
    monkeypatch.setattr(_one_pass, "PIECE", 5000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mantissa_bits", few(range(8), 0, 3, 7))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("eager")
def test_special_values_are_counted_as_pytorchs_functions_do(dtype: torch.dtype, mantissa_bits: int) -> None:
    x = special_values(dtype)
    tensors = [x, torch.from_numpy(rng.normal(size=12_345) * 1e-3).to(dtype), x[:1], x[x.isfinite()]]
    counts, _ = histogram_and_moments(tensors, mantissa_bits)
    assert torch.equal(counts, histogram_and_moments(tensors, mantissa_bits, compiled=False)[0])
    layout = Layout(mantissa_bits)
    expected = np.bincount([reference_bucket(v, layout) for v in x.tolist()], minlength=layout.size)
    assert counts[0].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("eager")
def test_a_processor_that_flushes_subnormal_numbers_counts_the_same(dtype: torch.dtype) -> None:
    x = special_values(dtype)
    large = x.repeat(1 + 2 * 2**13 // len(x))
    expected = [bucket_counts_all([x, large], m) for m in (0, 3, 7)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        assert float(torch.tensor([1e-40]) * 1) == 0
        compiled = [histogram_and_moments([x, large], m)[0] for m in (0, 3, 7)]
        by_torch = [bucket_counts_all([x, large], m) for m in (0, 3, 7)]
    finally:
        torch.set_flush_denormal(False)
    for with_numba, without, right in zip(compiled, by_torch, expected, strict=True):
        assert torch.equal(with_numba, right)
        assert torch.equal(without, right)


@pytest.mark.usefixtures("eager")
def test_threads_flush_subnormal_numbers_only_while_the_caller_does() -> None:
    x = torch.from_numpy(rng.normal(size=40_000) * 1e-38).float()
    expected = histogram_and_moments([x])[1].tolist()
    _one_pass._threads.cache_clear()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        flushed = [histogram_and_moments([x])[1].tolist() for _ in range(20)]
    finally:
        torch.set_flush_denormal(False)
    assert expected not in flushed
    assert all(moments == flushed[0] for moments in flushed)
    assert all(histogram_and_moments([x])[1].tolist() == expected for _ in range(20))


@settings(max_examples=60)
@given(
    x=hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=True, allow_infinity=True)),
    single=st.booleans(),
    mantissa_bits=st.integers(0, 7),
)
def test_any_values_are_counted_as_pytorchs_functions_do(x: np.ndarray, single: bool, mantissa_bits: int) -> None:
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(x.astype(np.float32) if single else x)
    counts, moments, others = _one_pass.one_pass([tensor], Layout(mantissa_bits))
    assert torch.equal(counts, bucket_counts_all([tensor], mantissa_bits))
    finite, largest = bool(tensor.isfinite().all()), float(tensor.double().abs().max())
    assert finite or others == [0]
    if finite and (single or largest == 0 or 1e-60 < largest < 1e60):
        assert others == []
        assert moments[0, :3].tolist() == [len(x), float(tensor.min()), float(tensor.max())]


SAMPLES = {
    "gaussian": rng.normal(size=30_000) * 1e-3,
    "cauchy": rng.standard_cauchy(30_000),
    "offset": rng.normal(size=30_000) + 5e3,
    "far outlier": np.concatenate([[1e6], rng.normal(size=9_000)]),
    "drifting": rng.normal(size=30_000) + np.arange(30_000),
    "tiny": rng.normal(size=9_000) * 1e-35,
    "huge": rng.normal(size=9_000) * 1e36,
    "two": np.array([1.0, 1.0 + 2.0**-20]),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.usefixtures("eager")
def test_moments_are_those_of_extended_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(SAMPLES[name]).to(dtype)
    before = x.clone()
    moments = histogram_and_moments([x, x.flip(0)])[1]
    assert torch.equal(x, before)
    assert_moments(moments[0], x)
    assert_moments(moments[1], x.flip(0))
    # PyTorch's functions sum float32 tensors in float32, and float64 tensors as exactly as the pass
    assert_moments(histogram_and_moments([x], compiled=False)[1][0], x, 1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.usefixtures("eager")
def test_values_beyond_the_range_of_the_pass_have_the_moments_of_pytorchs_functions() -> None:
    huge = torch.from_numpy(rng.normal(size=9_000) * 1e120)
    odd = [huge, huge * 1e-250, torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0]), torch.ones(9).half()]
    tensors = [torch.ones(20), *odd, torch.arange(7.0)]
    moments = histogram_and_moments(tensors)[1]
    assert moments[1:6].nan_to_num(-7).tolist() == central_moments(odd).nan_to_num(-7).tolist()
    assert_moments(moments[6], tensors[6])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.usefixtures("eager")
def test_equal_values_have_no_moments_but_the_mean(dtype: torch.dtype) -> None:
    x = torch.full((12_345,), 0.1, dtype=dtype)
    assert histogram_and_moments([x])[1][0, 1:7].tolist() == [x[0].item()] * 3 + [0.0] * 3


@pytest.mark.usefixtures("eager")
def test_any_layout_in_memory_is_read() -> None:
    x = torch.from_numpy(rng.normal(size=(30, 20, 24))).float()
    tensors = [x, x.transpose(0, 2), x[:, ::2], x.requires_grad_(), torch.tensor(2.0)]
    counts, moments = histogram_and_moments(tensors)
    assert torch.equal(counts, bucket_counts_all(tensors))
    for row, t in zip(moments, tensors, strict=True):
        assert_moments(row, t.detach().flatten())


@pytest.mark.parametrize("size", [15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 16_383, 16_384, 20_001, 70_000])
def test_every_place_in_a_piece_is_counted_once(size: int) -> None:
    values = rng.normal(size=size).astype(np.float32)
    values = np.where(rng.random(size) < 0.9, values, rng.choice(FLOATS[:11], size).astype(np.float32))
    values[[0, -1]] = 0.0, 1e-45
    x = torch.from_numpy(values)
    tensors = [x, x.abs(), -x.abs(), x[x.abs() > 1e-3], x[1:] * 0]
    for m in (0, 3):
        counts, moments, others = _one_pass.one_pass(tensors, Layout(m))
        assert torch.equal(counts, bucket_counts_all(tensors, m))
        assert others == []
        for row, t in zip(moments, tensors, strict=True):
            assert_moments(row, t)


@pytest.mark.usefixtures("eager")
def test_tensors_of_all_sizes_are_told_apart() -> None:
    sizes = [1, 4096, 4097, 64, 12_000, *range(2, 150)]
    tensors = [torch.from_numpy(rng.normal(i, 1, n)).to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    counts, moments = histogram_and_moments(tensors)
    assert torch.equal(counts, bucket_counts_all(tensors))
    for i, t in enumerate(tensors):
        alone = histogram_and_moments([t])[1][0]
        assert moments[i].tolist() == alone.tolist()
        assert_moments(alone, t, 1e-12 if t.dtype != torch.float16 else 1e-10)


def test_several_threads_of_the_program_may_measure_at_once() -> None:
    prepare([torch.empty(_one_pass.WORTHWHILE)])
    x = torch.from_numpy(rng.normal(size=_one_pass.PIECE + 3)).float()
    expected = histogram_and_moments([x, x[:99]])
    found: list[Any] = []

    def measure() -> None:
        found.extend(histogram_and_moments([x, x[:99]]) for _ in range(3))

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(torch.equal(c, expected[0]) and torch.equal(m, expected[1]) for c, m in found)


def in_a_fork() -> None:
    import os

    import torch

    from normzoo.functional.histogram_and_moments import histogram_and_moments

    torch.set_num_threads(2)  # of which the second one is not there in a fork
    x = torch.linspace(-1, 1, 2**20)
    expected = histogram_and_moments([x])  # in this process, which then has nothing else that a fork would lack
    child = os.fork()
    if not child:
        found = histogram_and_moments([x])
        os._exit(0 if all(map(torch.equal, found, expected)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_measures_on(tmp_path: Path) -> None:
    run_function(tmp_path, in_a_fork, 1)


def test_one_thread_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def kernel(*arguments: Any) -> None:
        seen.add(threading.get_ident())
        arguments[-1][:] = True

    monkeypatch.setattr(_one_pass, "kernel", lambda dtype: kernel)
    monkeypatch.setattr(_one_pass, "PIECE", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _one_pass.one_pass([torch.ones(100)], Layout(3))
    finally:
        torch.set_num_threads(threads)
    assert seen == {threading.get_ident()}


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Barrier(2)

    def work() -> None:
        started.wait(60)
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MemoryError, match="no room"):
        _one_pass._in_threads(work, 2 * _one_pass.PIECE)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "numba":
            raise ImportError("no module named numba")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    _one_pass.available.cache_clear()
    yield
    _one_pass.available.cache_clear()


@pytest.mark.usefixtures("without_numba")
def test_without_numba_all_is_measured_by_pytorchs_functions() -> None:
    tensors = [torch.from_numpy(rng.normal(size=_one_pass.WORTHWHILE)).float()]
    prepare(tensors)
    assert not _one_pass.available()
    expected = bucket_counts_all(tensors), central_moments(tensors)
    assert all(map(torch.equal, histogram_and_moments(tensors), expected))


def test_numba_that_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    _one_pass.available.cache_clear()
    assert not _one_pass.available()
    monkeypatch.undo()
    _one_pass.available.cache_clear()
    assert _one_pass.available()


def with_small_tensors() -> None:
    import sys

    import torch

    from normzoo.functional.histogram_and_moments import histogram_and_moments, prepare

    tensors = [torch.ones(1000)]
    prepare(tensors)
    histogram_and_moments(tensors)
    assert "numba" not in sys.modules


def test_small_models_do_not_import_numba(tmp_path: Path) -> None:
    run_function(tmp_path, with_small_tensors, 1)


@pytest.mark.parametrize("error", [RuntimeError("cannot cache function"), OSError("no space left on device")])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from normzoo.functional import _kernels

    asked = []

    def njit(signature: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise error
        return lambda function: function

    monkeypatch.setattr(_kernels.numba, "njit", njit)
    assert _kernels.of_float32() is _kernels._of_float32
    assert asked == [True, False]


@pytest.mark.parametrize("mantissa_bits", few(range(8), 0, 3, 7))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_to_count_on_a_gpu_agree(
    dtype: torch.dtype, mantissa_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = special_values(dtype)
    tensors = [(0, x), (2, x[:7]), (2, torch.arange(3.0).to(dtype))]
    layout = Layout(mantissa_bits)
    found = []
    for add in (add_by_scatter, add_by_histc):
        monkeypatch.setattr(buckets, "_ADD", add)
        counts = torch.zeros(3, layout.size, dtype=torch.int64)
        buckets.count_small(tensors, counts, layout)
        found.append(counts)
    assert torch.equal(*found)
    assert found[0].sum(1).tolist() == [len(x), 0, 10]
