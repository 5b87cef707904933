"""``paper_random_matrices`` at small scale: 32 rows and columns, four products of one and of five matrices."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from experiments_small import record_of

from normzoo.experiments import RandomMatrices

# Over the seeds 0 to 9, mean and standard deviation: distance 0.091 and 0.016, mass 1.84 and 0.09
# (test_margins_are_three_standard_deviations_from_the_effects)
MARGINS = {"distance": 0.035, "mass": 1.4}


def record(seed: int) -> pd.DataFrame:
    return record_of(RandomMatrices(factors=(1, 5), size=32, smaller=(), products=4, bins=20, seed=seed))


def effects(table: pd.DataFrame) -> dict[str, float]:
    """How much further independent values are from the law, and how much more of five matrices' values is near 0."""
    firsts = table.assign(distance=table["distance"].str[0], mass=table["density"].str[0])
    means = firsts.groupby(["source", "factors"])[["distance", "mass"]].mean()
    distances = means["distance"].groupby("source").mean()
    return {
        "distance": distances["Fuss-Catalan law"] - distances["singular values"],
        "mass": means["mass"]["singular values", "5 matrices"] - means["mass"]["singular values", "1 matrix"],
    }


def check(table: pd.DataFrame) -> None:
    for name, effect in effects(table).items():
        assert effect > MARGINS[name], name


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return record(0)


def test_products_follow_the_law_closer_than_independent_values_and_have_their_mass_at_zero(
    table: pd.DataFrame,
) -> None:
    check(table)


@pytest.mark.parametrize(
    "swapped",
    [
        {"Fuss-Catalan law": "singular values", "singular values": "Fuss-Catalan law"},
        {"1 matrix": "5 matrices", "5 matrices": "1 matrix"},
    ],
)
def test_swapped_arms_fail(table: pd.DataFrame, swapped: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(table.replace(swapped))


@pytest.mark.slow
def test_margins_are_three_standard_deviations_from_the_effects() -> None:
    found = pd.DataFrame([effects(record(seed)) for seed in range(10)])
    print(found.agg(["mean", "std"]))
    for name, margin in MARGINS.items():
        assert np.mean(found[name]) - 3 * np.std(found[name], ddof=1) > margin > 0
