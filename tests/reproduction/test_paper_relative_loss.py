"""How far along the gradient the loss stays below its start: figure 3, small."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from reproduction_small import SEEDS, first_step

from normzoo.callbacks import RelativeLoss

# Of ResNet-32: by how many decades the step up to which the loss stays below its start is longer with batch norm, as
# far as the grid tells. Over ten seeds, by the slow test below (torch 2.15.0, Intel Xeon 2.8 GHz, one thread):
# 1.20 +- 0.28, from 0.60 to 1.48. Three standard deviations below the mean are 0.36.
STEP_SIZES = [0.004 * 2.0**k for k in range(7)]
MARGIN = 0.3


def log_headroom(folder: Path, norm: str, seed: int) -> float:
    measurement = RelativeLoss(1, along="gradient", step_sizes=STEP_SIZES)
    [row] = first_step(folder, norm, seed, measurement).to_dict("records")
    return math.log10(row["headroom"] * row["lr"])


def effect(arms: dict[str, float]) -> float:
    return arms["batch"] - arms["none"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return {norm: log_headroom(tmp_path_factory.mktemp(norm), norm, 0) for norm in ("none", "batch")}


def test_longer_steps_lower_the_loss_with_batch_normalization(arms: dict[str, float]) -> None:
    assert effect(arms) > MARGIN


def test_with_the_arms_swapped_the_effect_is_missing(arms: dict[str, float]) -> None:
    assert not effect({"none": arms["batch"], "batch": arms["none"]}) > MARGIN


@pytest.mark.slow
def test_the_margin_is_three_standard_deviations_below_the_mean_of_ten_seeds(tmp_path: Path) -> None:
    found = [effect({n: log_headroom(tmp_path / f"{n}{s}", n, s) for n in ("none", "batch")}) for s in SEEDS]
    print(f"{np.mean(found):.3g} +- {np.std(found, ddof=1):.2g}, from {min(found):.3g} to {max(found):.3g}")
    assert np.mean(found) - 3 * np.std(found, ddof=1) > MARGIN
