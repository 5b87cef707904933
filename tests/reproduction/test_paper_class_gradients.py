"""Without normalization one class is pushed down in nearly every image: the paper's figure 6, small."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo import load_run, watch
from normzoo.callbacks import ClassGradients
from normzoo.data import FashionMNIST
from normzoo.models import create_model

# Over ten seeds the effect is 0.86 +- 0.15 (from 0.46 to 0.95), by the slow test below: torch 2.15.0, Intel Xeon
# 2.8 GHz, one thread. Three standard deviations below its mean are 0.42.
MARGIN = 0.4


def images(count: int = 128) -> tuple[Tensor, Tensor]:
    """Embedded images, at half of their size, to save time: (count, 1, 14, 14)."""
    pixels, labels = FashionMNIST().load("train")
    assert isinstance(pixels, Tensor)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    return F.avg_pool2d((pixels[chosen].float() / 255 - 0.286) / 0.353, 2), labels[chosen]


def led(norm: str, seed: int, folder: Path) -> float:
    """The largest share of images that one class leads, in ResNet-56 at its initialization."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(seed)
    network = create_model("resnet56_cifar", norm, in_chans=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    batch = images()
    with watch(network, optimizer, ClassGradients(1, loss=loss), dirpath=folder) as watching:
        watching.batch(batch)
        loss(network, batch).backward()
        optimizer.step()
    return load_run(folder)["class_gradients"]["led"].dropna().item()


def effect(seed: int, folder: Path) -> float:
    return led("none", seed, folder / f"none-{seed}") - led("batch", seed, folder / f"batch-{seed}")


def check(batch: float, none: float) -> None:
    assert none > batch + MARGIN


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """The share with and without batch normalization."""
    folder = tmp_path_factory.mktemp("class_gradients")
    return led("batch", 0, folder / "batch"), led("none", 0, folder / "none")


def test_without_normalization_one_class_leads_more_images(arms: tuple[float, float]) -> None:
    check(*arms)


def test_the_check_fails_with_the_arms_swapped(arms: tuple[float, float]) -> None:
    with pytest.raises(AssertionError):
        check(*reversed(arms))


@pytest.mark.slow
def test_the_margin_is_that_of_ten_seeds(tmp_path: Path) -> None:
    effects = [effect(seed, tmp_path) for seed in range(10)]
    mean, deviation = statistics.mean(effects), statistics.stdev(effects)
    print(f"effect over ten seeds: {mean:.3f} +- {deviation:.3f}, from {min(effects):.3f} to {max(effects):.3f}")
    assert mean - 3 * deviation >= MARGIN > 0
