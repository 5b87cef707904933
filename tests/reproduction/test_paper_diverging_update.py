"""Channels along one update that makes a deep network diverge: the paper's figure on layers 8, 44 and 80, small."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo.data import FashionMNIST
from normzoo.functional.channel_moments import channel_moments
from normzoo.models import create_model

RATE, BATCH, NETWORKS = 0.05, 64, 4
SHALLOW, DEEP = "layer1.1.conv1", "layer3.6.conv1"  # layers 4 and 50 of 56
# Over ten seeds the effect is 23.4 +- 7.0 decades (from 9.3 to 32.8), by the slow test below: torch 2.15.0, Intel Xeon
# 2.8 GHz, one thread. Three standard deviations below its mean are 2.4 decades.
MARGIN = 2.0


def images(seed: int) -> tuple[Tensor, Tensor]:
    """A mini-batch of embedded images, at a quarter of their size, to save time: (BATCH, 1, 7, 7)."""
    pixels, labels = FashionMNIST().load("train")
    assert isinstance(pixels, Tensor)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:BATCH]
    return F.avg_pool2d((pixels[chosen].float() / 255 - 0.286) / 0.353, 4), labels[chosen]


def decades(norm: str, seed: int) -> float:
    """By how many decades more the largest variance of a channel rises in the deep layer, a mean over networks."""
    return statistics.mean(decades_of_one(norm, NETWORKS * seed + place) for place in range(NETWORKS))


def decades_of_one(norm: str, seed: int) -> float:
    """The same of one network, along one step from its initialization."""
    torch.manual_seed(seed)
    x, y = images(seed)
    network = create_model("resnet56_cifar", norm, in_chans=1)
    outputs: dict[str, Tensor] = {}
    for site in (SHALLOW, DEEP):
        network.get_submodule(site).register_forward_hook(
            lambda module, args, output, site=site: outputs.__setitem__(site, output.detach().double())
        )

    def variances() -> dict[str, float]:
        moments = {site: channel_moments(output) for site, output in outputs.items()}
        return {site: (m2 / count).max().item() for site, (count, _, m2) in moments.items()}

    F.cross_entropy(network(x), y).backward()
    before = variances()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= RATE * parameter.grad
        network(x)
    after = variances()
    rise = {site: math.log10(after[site] / before[site]) for site in (SHALLOW, DEEP)}
    return rise[DEEP] - rise[SHALLOW]


def check(batch: float, none: float) -> None:
    assert none > batch + MARGIN


@pytest.fixture(scope="module")
def arms() -> tuple[float, float]:
    """Decades with and without batch normalization."""
    return decades("batch", 0), decades("none", 0)


def test_one_update_without_normalization_blows_up_deep_layers_most(arms: tuple[float, float]) -> None:
    check(*arms)


def test_the_check_fails_with_the_arms_swapped(arms: tuple[float, float]) -> None:
    with pytest.raises(AssertionError):
        check(*reversed(arms))


@pytest.mark.slow
def test_the_margin_is_that_of_ten_seeds() -> None:
    effects = [decades("none", seed) - decades("batch", seed) for seed in range(10)]
    mean, deviation = statistics.mean(effects), statistics.stdev(effects)
    print(f"effect over ten seeds: {mean:.2f} +- {deviation:.2f}, from {min(effects):.2f} to {max(effects):.2f}")
    assert mean - 3 * deviation >= MARGIN > 0
