"""Histograms and distances of the record, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from normzoo.experiments import RandomMatrices
from normzoo.experiments.random_matrices import product_singular_values
from normzoo.functional import fuss_catalan_cdf, fuss_catalan_edge


def test_rows_are_of_the_product_and_of_the_law() -> None:
    of = RandomMatrices(factors=(3,), size=20, smaller=(10,), products=1, bins=8)
    seed_everything(5, verbose=False)
    measured, law = of.rows({"factors": 3, "product": 0})
    seed_everything(5, verbose=False)
    values = {n: product_singular_values(n, 3).numpy() for n in (10, 20)}
    edges = np.linspace(0, 1.08 * fuss_catalan_edge(3), 9)
    counts, _ = np.histogram(values[20], edges)
    inside = counts.sum()
    assert np.allclose(np.array(measured["density"]) * np.diff(edges) * 20, counts)
    assert inside <= 20
    assert measured["largest"] == [values[10].max(), values[20].max()]
    for n, distance in zip((10, 20), measured["distance"], strict=True):
        probability = fuss_catalan_cdf(torch.from_numpy(np.sort(values[n])), 3).numpy()
        brute = max(max(abs((i + 1) / n - p), abs(i / n - p)) for i, p in enumerate(probability))
        assert distance == pytest.approx(brute)
    assert np.sum(np.array(law["density"]) * np.diff(edges)) == pytest.approx(1.0)
    assert law["largest"] == [fuss_catalan_edge(3)] * 2
    assert (law["source"], measured["source"]) == ("Fuss-Catalan law", "singular values")
    assert law["singular_value"] == measured["singular_value"] == ((edges[1:] + edges[:-1]) / 2).tolist()


def test_entries_have_the_variance_one_over_n() -> None:
    seed_everything(0, verbose=False)
    for factors in (1, 2, 4):  # E of the sum of squared singular values is n, whatever is multiplied
        sums = [product_singular_values(30, factors).square().sum().item() / 30 for _ in range(40)]
        assert abs(np.mean(sums) - 1) < 4 * np.std(sums) / np.sqrt(40)
        assert np.std(sums) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": ()}, "factors must be at least 1, not empty"),
        ({"factors": (1, 0)}, "factors must be at least 1, not 0"),
        ({"size": 0}, "size must be at least 1, not 0"),
        ({"smaller": (0,)}, "smaller must be at least 1, not 0"),
        ({"products": 0}, "products must be at least 1"),
        ({"bins": -1}, "bins must be at least 1, not -1"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomMatrices(**options)  # type: ignore[arg-type]


def test_there_may_be_no_smaller_sizes() -> None:
    measured, _ = RandomMatrices(size=6, smaller=()).rows({"factors": 1, "product": 0})
    assert measured["sizes"] == [6.0]
