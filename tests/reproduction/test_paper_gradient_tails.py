"""Heavy tails of a middle kernel's gradient at initialization without batch normalization: figure 2, small."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from reproduction_small import SEEDS, first_step

from normzoo.callbacks import GradientTails

# Of ResNet-32, whose kernel of layer 17 is looked at: by how much log10 of the 99.9 % quantile over the median of its
# gradient's magnitude is larger without batch norm. Over ten seeds, by the slow test below (torch 2.15.0, Intel Xeon
# 2.8 GHz, one thread): 1.33 +- 0.18, from 0.99 to 1.60. Three standard deviations below the mean are 0.79.
KERNEL = "model.layer2.2.conv2.weight"
MARGIN = 0.7


def log_tail_ratio(folder: Path, norm: str, seed: int) -> float:
    [row] = first_step(folder, norm, seed, GradientTails(1, parameters=KERNEL)).to_dict("records")
    return math.log10(row["tail_ratio"])


def effect(arms: dict[str, float]) -> float:
    return arms["none"] - arms["batch"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return {norm: log_tail_ratio(tmp_path_factory.mktemp(norm), norm, 0) for norm in ("none", "batch")}


def test_tails_are_heavier_without_batch_normalization(arms: dict[str, float]) -> None:
    assert effect(arms) > MARGIN


def test_with_the_arms_swapped_the_effect_is_missing(arms: dict[str, float]) -> None:
    assert not effect({"none": arms["batch"], "batch": arms["none"]}) > MARGIN


@pytest.mark.slow
def test_the_margin_is_three_standard_deviations_below_the_mean_of_ten_seeds(tmp_path: Path) -> None:
    found = [effect({n: log_tail_ratio(tmp_path / f"{n}{s}", n, s) for n in ("none", "batch")}) for s in SEEDS]
    print(f"{np.mean(found):.3g} +- {np.std(found, ddof=1):.2g}, from {min(found):.3g} to {max(found):.3g}")
    assert np.mean(found) - 3 * np.std(found, ddof=1) > MARGIN
