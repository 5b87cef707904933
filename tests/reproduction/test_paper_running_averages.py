"""``paper_running_averages`` at small scale: 40 steps of a network of two convolutions on the embedded images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from experiments_small import FewImages, SmallTask, record_of
from lightning.pytorch import seed_everything

from normzoo.experiments import RunningAverages

# Over the seeds 0 to 9, mean and standard deviation: evaluation 0.254 and 0.050, training 0.391 and 0.096
# (test_margins_are_three_standard_deviations_from_the_effects)
MARGINS = {"evaluation": 0.07, "training": 0.07}
BATCH, RUNNING = "trained on batch statistics", "trained on running averages"
BY_BATCH, BY_RUNNING, BY_AGAIN = (
    f"tested on {by}" for by in ("batch statistics", "running averages", "re-estimated averages")
)


def record(seed: int) -> pd.DataFrame:
    seed_everything(seed, verbose=False)
    data = FewImages(seed=seed, test_images=256)
    return record_of(RunningAverages(data, SmallTask(lr=1.0), 40, (1, 64), draws=2, reestimate_batches=4, seed=seed))


def effects(table: pd.DataFrame) -> dict[str, float]:
    """Differences in accuracy of re-estimated averages over single images, and of batch statistics over averages."""
    first = table.dropna(subset="evaluation").assign(first=lambda rows: rows["accuracy"].str[0])
    mean = first.groupby(["training", "evaluation"])["first"].mean()
    return {
        "evaluation": mean[BATCH, BY_AGAIN] - mean[BATCH, BY_BATCH],
        "training": mean[BATCH, BY_RUNNING] - mean[RUNNING, BY_RUNNING],
    }


def check(table: pd.DataFrame) -> None:
    for name, effect in effects(table).items():
        assert effect > MARGINS[name], name


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return record(0)


def test_evaluation_needs_averages_and_training_the_batch(table: pd.DataFrame) -> None:
    check(table)


def test_training_on_frozen_averages_diverges(table: pd.DataFrame) -> None:
    diverged = table.dropna(subset="diverged")["training"].tolist()
    assert diverged == ["trained on frozen averages"]


@pytest.mark.parametrize(
    ("column", "arms"),
    [("evaluation", {BY_AGAIN: BY_BATCH, BY_BATCH: BY_AGAIN}), ("training", {BATCH: RUNNING, RUNNING: BATCH})],
)
def test_swapped_arms_fail(table: pd.DataFrame, column: str, arms: dict[str, str]) -> None:
    swapped = table.copy()
    rows = swapped["evaluation"].isin([*arms, BY_RUNNING])  # of both ways to train
    swapped.loc[rows, column] = swapped.loc[rows, column].replace(arms)
    if column == "training":  # the other accuracies are of one way only
        others = table["evaluation"].isin([BY_BATCH, BY_AGAIN])
        swapped = pd.concat([swapped[~others], table[others]])
    with pytest.raises(AssertionError, match=column):
        check(swapped)


@pytest.mark.slow
def test_margins_are_three_standard_deviations_from_the_effects() -> None:
    tables = [record(seed) for seed in range(10)]
    found = pd.DataFrame([effects(table) for table in tables])
    print(found.agg(["mean", "std"]))
    for name, margin in MARGINS.items():
        assert np.mean(found[name]) - 3 * np.std(found[name], ddof=1) > margin > 0
    for table in tables:
        assert "trained on frozen averages" in table.dropna(subset="diverged")["training"].tolist()
