"""NoiseScale: ratios of averages, over updates and merges."""

from __future__ import annotations

import math

import pytest
import torch

from normzoo.functional import noise_scale, update_noise_bound
from normzoo.functional.noise import FACTORS
from normzoo.metrics import NoiseScale


def norms(steps: int, small: int, ratio: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Gaussian gradients with |G|^2 = 4 and tr(Sigma) = 50: (steps, ratio) and (steps,)."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.full((4,), 1.0, dtype=torch.float64)
    noise = torch.randn(steps, ratio, 4, generator=generator, dtype=torch.float64) * math.sqrt(12.5 / small)
    g = mean + noise
    return g.square().sum(-1), g.mean(1).square().sum(-1)


def test_it_averages_norms_before_dividing() -> None:
    small, big = norms(50, 2, 4)
    metric = NoiseScale(2, 8)
    for s, b in zip(small, big, strict=True):
        metric.update(s, b)
    want = noise_scale(small.mean(), big.mean(), 2, 8)
    found = metric.compute()
    for got, expected in zip(found, want, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metric.bound(0.1, 16).item() == update_noise_bound(found.trace, 0.1, 16).item()
    for factor in FACTORS:
        want_bound = update_noise_bound(found.trace, 0.1, 16, 40, factor)
        assert metric.bound(0.1, 16, 40, factor).item() == want_bound.item()


def test_the_factor_by_default_warns_as_it_was_another() -> None:
    metric = NoiseScale(1, 2)
    metric.update(torch.tensor(3.0), torch.tensor(2.0))
    with pytest.warns(FutureWarning, match="'\\(N-b\\)/N' by default now") as caught:
        found = metric.bound(0.1, 16, 40)
    assert found.item() == metric.bound(0.1, 16, 40, "(N-b)/N").item()
    assert {warning.filename for warning in caught} == {__file__}


def test_estimates_are_unbiased() -> None:
    """Each step's estimates, averaged, within 4 standard errors of the known values; the ratio of one step is not."""
    small, big = norms(20_000, 2, 4)
    each = noise_scale(small.mean(1), big, 2, 8)
    for estimates, known in ((each.gradient_sq, 4.0), (each.trace, 50.0)):
        error = estimates.std() / math.sqrt(len(estimates))
        assert abs(estimates.mean() - known) < 4 * error
    metric = NoiseScale(2, 8)
    metric.update(small, big)
    assert metric.compute().scale.item() == pytest.approx(12.5, rel=0.1)


def test_moving_average_equals_the_loop_and_needs_no_warm_up() -> None:
    small, big = norms(30, 1, 2)
    metric = NoiseScale(1, 2, decay=0.9)
    weights = torch.tensor([0.9 ** (29 - i) for i in range(30)], dtype=torch.float64)
    for s, b in zip(small, big, strict=True):
        metric.update(s, b)
    means = [(weights * v).sum() / weights.sum() for v in (small.mean(1), big)]
    assert metric.compute().trace.item() == pytest.approx(noise_scale(*means, 1, 2).trace.item(), rel=1e-12)
    first = NoiseScale(1, 2, decay=0.9)
    first.update(small[0], big[0])
    want = noise_scale(small[0].mean(), big[0], 1, 2)
    assert first.compute().gradient_sq.item() == pytest.approx(want.gradient_sq.item(), rel=1e-12)


def test_merging_is_updating_together_and_refused_for_moving_averages() -> None:
    small, big = norms(4, 1, 2)
    a, b, both = (NoiseScale(1, 2) for _ in range(3))
    for i, metric in enumerate((a, a, b, b)):
        metric.update(small[i], big[i])
        both.update(small[i], big[i])
    a.merge_state(b)
    assert a.compute().scale.item() == pytest.approx(both.compute().scale.item(), rel=1e-12)
    with pytest.raises(RuntimeError, match="merge_state"):
        NoiseScale(1, 2, decay=0.5).merge_state(NoiseScale(1, 2, decay=0.5))


@pytest.mark.parametrize("decay", [None, 0.5])
def test_forward_gives_this_step_and_keeps_the_average(decay: float | None) -> None:
    small, big = norms(3, 1, 2)
    calls, updates = NoiseScale(1, 2, decay), NoiseScale(1, 2, decay)
    for s, b in zip(small, big, strict=True):
        now = calls(s, b)
        updates.update(s, b)
        assert now.trace.item() == pytest.approx(noise_scale(s.mean(), b, 1, 2).trace.item(), rel=1e-12)
    assert calls.compute().trace.item() == pytest.approx(updates.compute().trace.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseScale(4, 4), "0 < small_batch < big_batch, not 4 and 4"),
        (lambda: NoiseScale(1, 2, decay=1.0), "decay must be between 0 and 1, not 1.0"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
