"""``paper_noise_bound`` at small scale: 32 of the embedded images, and a network of two convolutions."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from experiments_small import FewImages, SmallTask, record_of
from lightning.pytorch import seed_everything

from normzoo.experiments import NoiseBound

# Over the seeds 0 to 9, mean and standard deviation: factor 16.1 and 1.6 standard errors, below_bound 0.484 and 0.002
# (test_margins_are_three_standard_deviations_from_the_effects)
MARGINS = {"factor": 8.0, "below_bound": 0.4}


def record(seed: int) -> pd.DataFrame:
    seed_everything(seed, verbose=False)
    task, sizes = SmallTask(norm=False), (4, 8, 16)
    return record_of(
        NoiseBound(FewImages(seed=seed), task, 32, batch_sizes=sizes, learning_rates=(0.1,), draws=20_000, seed=seed)
    )


def effects(table: pd.DataFrame) -> dict[str, float]:
    """How many standard errors (N-b)/N is further off than (N-b)/(N-1); how far draws without replacement are below.

    The latter is a share of the noise of batches of half of the images, drawn with replacement.
    """
    off = table.dropna(subset="deviation").groupby("curve")["deviation"].sum().abs() / math.sqrt(3)
    half = table[(table["batch_size"] == 16) & (table["curve"] == "measured")].set_index("sampling")["value"]
    return {
        "factor": off["(N-b)/N"] - off["(N-b)/(N-1)"],
        "below_bound": 1 - half["without replacement"] / half["with replacement"],
    }


def check(table: pd.DataFrame) -> None:
    for name, effect in effects(table).items():
        assert effect > MARGINS[name], name


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return record(0)


def test_draws_without_replacement_have_less_noise_by_the_factor_of_n_less_one(table: pd.DataFrame) -> None:
    check(table)


def test_the_bound_holds_and_its_points_follow_one_over_b(table: pd.DataFrame) -> None:
    """Within six standard errors, of draws with replacement exactly."""
    lines = table.set_index(["sampling", "curve"])
    for sampling in ("without replacement", "with replacement"):
        measured, bound = (lines.loc[(sampling, curve)] for curve in ("measured", "alpha^2 C / b"))
        assert (measured["value"].to_numpy() < bound["value"].to_numpy() + 6 * measured["error"].to_numpy()).all()
    assert np.allclose(bound["value"] * bound["batch_size"], (bound["value"] * bound["batch_size"]).iloc[0])
    assert (np.abs(measured["value"].to_numpy() - bound["value"].to_numpy()) < 6 * measured["error"].to_numpy()).all()


@pytest.mark.parametrize(
    "swapped",
    [
        {"(N-b)/N": "(N-b)/(N-1)", "(N-b)/(N-1)": "(N-b)/N"},
        {"with replacement": "without replacement", "without replacement": "with replacement"},
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
