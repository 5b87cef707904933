"""Channel moments against float64 numpy on the same values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from normzoo.functional import (
    _pieces,
    channel_moments,
    dead_channels,
    merge_moments,
    moment_drift,
    moments_variance,
)


def twin(x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """In numpy's extended precision, where it has one."""
    rows = np.moveaxis(x.detach().double().numpy(), channel_dim, 0).reshape(x.shape[channel_dim], -1)
    rows = rows.astype(np.longdouble)
    mean = rows.mean(1, keepdims=True)
    packed = [np.full(len(rows), rows.shape[1]), mean[:, 0], ((rows - mean) ** 2).sum(1)]
    return torch.from_numpy(np.stack([np.asarray(p, dtype=np.float64) for p in packed]))


def close(got: torch.Tensor, want: torch.Tensor, rel: float) -> None:
    """Counts exactly; mean in units of the spread and the rounding of the mean; variance relatively."""
    (n, mean, squares), (want_n, want_mean, want_squares) = got, want
    assert torch.equal(n, want_n)
    assert got.dtype == torch.float64
    spread = (want_squares / n).sqrt()
    assert ((mean - want_mean).abs() <= rel * spread + 4e-16 * want_mean.abs()).all()
    # merged means are rounded to 2^-53 of the offset, and M2 is off by twice that in units of the spread
    assert ((squares - want_squares).abs() <= (20 * rel + 4 * 2.0**-53 * want_mean.abs() / spread) * want_squares).all()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((64, 5), 1), ((16, 5, 6, 7), 1), ((8, 9, 5), -1), ((5, 99), 0)])
def test_large_offsets_lose_no_digits(shape, channel_dim, dtype, offset, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(_pieces, "PIECE", 50)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 20 + offset).to(dtype)
    rel = 1e-6 if dtype == torch.float32 else 1e-13
    close(channel_moments(x, channel_dim), twin(x, channel_dim), rel)
    if x.ndim == 4:
        close(channel_moments(x.to(memory_format=torch.channels_last), channel_dim), twin(x, channel_dim), rel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    x = (torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    assert_close(channel_moments(x), channel_moments(x.float()), rtol=0, atol=0)
    close(channel_moments(x), twin(x, 1), 1e-6)


samples = st.lists(st.integers(0, 2**31), min_size=1, max_size=6)


@given(samples, st.sampled_from([0.0, 1e4, 1e6, 1e8]), st.randoms(use_true_random=False))
def test_the_order_of_merging_matters_only_by_rounding(seeds, offset, random):
    parts = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        parts.append(torch.from_numpy(rng.standard_normal((int(rng.integers(0, 9)), 3)) + offset))
    whole = torch.cat(parts)
    if not len(whole):
        assert merge_moments(torch.stack([channel_moments(p) for p in parts])).count_nonzero() == 0
        return
    want = twin(whole, 1)
    packed = [channel_moments(p) for p in parts]
    together = merge_moments(torch.stack(packed))
    random.shuffle(packed)
    while len(packed) > 1:  # a random tree
        random.shuffle(packed)
        packed.append(merge_moments(torch.stack([packed.pop(), packed.pop()])))
    for got in (together, packed[0]):
        assert torch.equal(got[0], want[0])
        # means are rounded to 2^-53 of the offset, 1e-8 at 1e8
        rounding = 8 * 2.0**-53 * (offset + 5)
        assert_close(got[1], want[1], rtol=0, atol=rounding)
        assert_close(got[2], want[2], rtol=1e-12, atol=1e-12 + 10 * len(whole) * rounding**2 + 40 * rounding)


def test_a_planted_formula_would_fail():
    """E[x^2] - E[x]^2 loses all digits where the merge loses none."""
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e8
    naive = (x.square().mean(0) - x.mean(0).square()).item()
    want = x.numpy().var()
    assert abs(naive / want - 1) > 0.1
    assert moments_variance(channel_moments(x)).item() == pytest.approx(want, rel=1e-9)


def test_empty_samples_and_single_values():
    empty = channel_moments(torch.empty(0, 2))
    assert torch.equal(empty, torch.zeros(3, 2, dtype=torch.float64))
    one = channel_moments(torch.tensor([[5.0, -1.0]]))
    assert torch.equal(merge_moments(torch.stack([empty, one, empty])), one)
    assert moments_variance(one).tolist() == [0.0, 0.0]
    assert moments_variance(one, unbiased=True).isnan().all()
    assert moments_variance(empty).isnan().all()
    assert channel_moments(torch.tensor([1.0, 2.0]), 0).tolist() == [[1.0, 1.0], [1.0, 2.0], [0.0, 0.0]]


def test_a_value_that_is_not_finite_shows_in_its_channel_alone():
    got = channel_moments(torch.tensor([[1.0, math.nan], [2.0, 3.0]]))
    assert got[:, 0].tolist() == [2.0, 1.5, 0.5]
    assert got[1:, 1].isnan().all()


def test_counts_beyond_float32():
    half = torch.tensor([[2.0**24 + 1], [0.5], [1.0]], dtype=torch.float64)
    assert merge_moments(torch.stack([half, half]))[0].item() == 2**25 + 2


def test_drift_in_standard_deviations():
    mean, std = moment_drift(*(torch.tensor(v) for v in ([3.0, 1.0], [4.0, 9.0], [1.0, 1.0], [1.0, 9.0])))
    assert (mean.tolist(), std.tolist()) == ([2.0, 0.0], [1.0, 0.0])
    mean, std = moment_drift(*(torch.tensor(v) for v in ([1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0])))
    assert mean[0].item() == std[0].item() == math.inf
    assert mean[1].isnan()
    assert std[1].isnan()


def test_dead_channels():
    var = torch.tensor([0.0, 1e-12, 1e-3, math.nan])
    assert dead_channels(var).tolist() == [True, False, False, False]
    assert dead_channels(var, 1e-6).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="threshold must be at least 0, not -1"):
        dead_channels(var, -1)
