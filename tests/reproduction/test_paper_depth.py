"""Channels' deviations over depth at initialization, which grow without batch normalization: figure 5, small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reproduction_small import SEEDS, first_step

from normzoo.callbacks import ChannelMoments

# Of ResNet-32: by how much more log10 of the channels' mean deviation grows without batch norm, from the first six
# convolutions in its blocks to the last six. Over ten seeds, by the slow test below (torch 2.15.0, Intel Xeon 2.8 GHz,
# one thread): 1.50 +- 0.24, from 1.23 to 1.93. Three standard deviations below the mean are 0.78.
MARGIN = 0.7


def growth(folder: Path, norm: str, seed: int) -> float:
    record = first_step(folder, norm, seed, ChannelMoments(1, sites="*conv*", where="output")).sort_values("depth")
    logs = np.log10(record["deviation"].to_numpy())
    return float(logs[-6:].mean() - logs[1:7].mean())


def effect(arms: dict[str, float]) -> float:
    return arms["none"] - arms["batch"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return {norm: growth(tmp_path_factory.mktemp(norm), norm, 0) for norm in ("none", "batch")}


def test_deviations_grow_with_depth_without_batch_normalization(arms: dict[str, float]) -> None:
    assert effect(arms) > MARGIN


def test_with_the_arms_swapped_the_effect_is_missing(arms: dict[str, float]) -> None:
    assert not effect({"none": arms["batch"], "batch": arms["none"]}) > MARGIN


@pytest.mark.slow
def test_the_margin_is_three_standard_deviations_below_the_mean_of_ten_seeds(tmp_path: Path) -> None:
    found = [effect({n: growth(tmp_path / f"{n}{s}", n, s) for n in ("none", "batch")}) for s in SEEDS]
    print(f"{np.mean(found):.3g} +- {np.std(found, ddof=1):.2g}, from {min(found):.3g} to {max(found):.3g}")
    assert np.mean(found) - 3 * np.std(found, ddof=1) > MARGIN
