"""Means of random batches: against the vectors themselves, and against all batches that there are."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from torch.testing import assert_close

from normzoo.functional import draw_batches, gradient_noise, squared_deviations, update_noise_bound


def vectors(n: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 2


@pytest.mark.parametrize("batch_size", [1, 3, 9])
@pytest.mark.parametrize("replacement", [False, True])
def test_deviations_are_those_of_the_vectors(batch_size, replacement):
    g = vectors(9)
    batches = draw_batches(20, 9, batch_size, replacement=replacement, generator=torch.Generator().manual_seed(1))
    brute = torch.stack([(sum(g[i] for i in batch) / batch_size - g.mean(0)).square().sum() for batch in batches])
    assert_close(squared_deviations(g @ g.T, batches), brute, rtol=1e-9, atol=1e-12)
    centered = g - g.mean(0)
    assert_close(squared_deviations(centered @ centered.T, batches), brute, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_over_all_batches_one_factor_is_exact_for_each_way_to_draw(batch_size):
    n, g, alpha = 6, vectors(6), 0.3
    c = gradient_noise(g)
    for ways, factor in (
        (itertools.combinations(range(n), batch_size), "(N-b)/(N-1)"),
        (itertools.product(range(n), repeat=batch_size), "1"),
    ):
        mean = alpha**2 * squared_deviations(g @ g.T, torch.tensor(list(ways))).mean()
        assert_close(mean, update_noise_bound(c, alpha, batch_size, n, factor), rtol=1e-9, atol=1e-12)


def test_batches_without_replacement_are_all_equally_likely():
    draws = draw_batches(20_000, 5, 2, generator=torch.Generator().manual_seed(2)).sort(1).values
    counts = collections.Counter(map(tuple, draws.tolist()))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    expected = 20_000 / 10
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 27.9  # chi^2 of 9 degrees, p = 0.001


def test_batches_with_replacement_draw_each_sample_alone():
    draws = draw_batches(20_000, 3, 2, replacement=True, generator=torch.Generator().manual_seed(3))
    counts = collections.Counter(map(tuple, draws.tolist()))
    assert set(counts) == set(itertools.product(range(3), repeat=2))
    expected = 20_000 / 9
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26.1  # of 8 degrees


def test_a_generator_gives_the_same_batches_again():
    first, again = (draw_batches(4, 10, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert draw_batches(2, 3, 7, replacement=True).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 2), "count must be at least 1, not 0"),
        ((1, 4, 5), r"batch_size must be from 1 to the population \(4\), not 5"),
        ((1, 4, 0), r"batch_size must be from 1 to the population \(4\), not 0"),
    ],
)
def test_impossible_draws_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_batches(*arguments)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"products must be \(N, N\) and batches \(count, b\), not of shapes \(2, 3\)"):
        squared_deviations(torch.ones(2, 3), torch.zeros(1, 1, dtype=torch.int64))
