"""The variances that normalization layers divide by, against loops, and what of them is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_stage import FakeRun, Task
from torch import Tensor, nn

import normzoo
from normzoo.replaying.norm_statistics import MOST, NormStatistics, Statistics, layers_with_news, over_ranks, units

MAPS = torch.randn(3, 8, 4, 4) * torch.rand(8, 1, 1)
WORDS = torch.randn(3, 5, 8)


def by_loop(x: Tensor, axes: tuple[int, ...], centred: bool = True) -> Tensor:
    return x.double().var(axes, unbiased=False) if centred else x.double().square().mean(axes)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str, Callable[[Tensor], Tensor]]] = {
    "batch": (lambda: nn.BatchNorm2d(8), MAPS, "channel", lambda x: by_loop(x, (0, 2, 3))),
    "zoo's batch": (
        lambda: normzoo.create_norm("batch", 8, channel_dim=-1),
        WORDS,
        "channel",
        lambda x: by_loop(x, (0, 1)),
    ),
    "frozen": (
        lambda: normzoo.create_norm("frozen_batch", 8),
        MAPS,
        "channel",
        lambda x: torch.ones(8, dtype=torch.float64),
    ),
    "group": (
        lambda: nn.GroupNorm(2, 8),
        MAPS,
        "group",
        lambda x: by_loop(x.view(3, 2, 4, 4, 4), (2, 3, 4)).amin(0),
    ),
    "zoo's layer": (lambda: normzoo.create_norm("layer", 8), MAPS, "sample", lambda x: by_loop(x, (1, 2, 3))),
    "one group": (lambda: nn.GroupNorm(1, 8), MAPS, "sample", lambda x: by_loop(x, (1, 2, 3))),
    "instance": (
        lambda: nn.InstanceNorm2d(8),
        MAPS,
        "channel of a sample",
        lambda x: by_loop(x, (2, 3)).amin(0),
    ),
    "layer": (lambda: nn.LayerNorm(8), WORDS, "sample", lambda x: by_loop(x, (2,)).amin(1)),
    "layer over two": (lambda: nn.LayerNorm((5, 8)), WORDS, "sample", lambda x: by_loop(x, (1, 2))),
    "layer of maps": (
        lambda: normzoo.create_norm("layer_channel", 8),
        MAPS,
        "sample",
        lambda x: by_loop(x, (1,)).flatten(1).amin(1),
    ),
    "rms": (lambda: nn.RMSNorm(8), WORDS, "sample", lambda x: by_loop(x, (2,), False).amin(1)),
}


def statistics(module: nn.Module, batches: list[Tensor], loss: Any = None) -> Statistics:
    task = Task(nn.Sequential(nn.Identity(), module), loss)
    with NormStatistics(FakeRun(task)) as norms:
        for i, batch in enumerate(batches):
            task.training_step(batch.clone().requires_grad_(), i).backward()
    assert not module._forward_pre_hooks
    return norms.found["net.1"]


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_a_loop(case: str) -> None:
    make, x, unit, twin = CASES[case]
    found = statistics(make(), [x])
    assert found.unit == unit
    torch.testing.assert_close(torch.tensor(found.variance), twin(x).float(), rtol=1e-5, atol=1e-7)


def test_huge_and_tiny_channels_stand_side_by_side() -> None:
    scale = torch.tensor([3e38, 1e19, 1.0, 1e-15, 0.0]).view(5, 1)
    x = torch.randn(2, 5, 50).clamp(-1, 1) * scale
    found = torch.tensor(statistics(nn.BatchNorm1d(5), [x]).variance, dtype=torch.float64)
    torch.testing.assert_close(found, x.double().var((0, 2), unbiased=False), rtol=1e-5, atol=0)
    x[0, 2, 0] = torch.nan
    found = torch.tensor(statistics(nn.BatchNorm1d(5), [x]).variance)
    assert found.isnan().tolist() == [False, False, True, False, False]


def test_the_gradient_is_that_of_the_layer_alone() -> None:
    module, x = nn.LayerNorm(8), WORDS.clone().requires_grad_()
    (own,) = torch.autograd.grad(module(x).pow(3).sum(), x)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = module

        def forward(self, x: Tensor) -> Tensor:
            return 100 * x.sum() + self.norm(x).pow(3).sum()

    task = Task(Residual(), lambda output, _: output)
    with NormStatistics(FakeRun(task)) as norms:
        for i in range(2):
            task.training_step(x, i).backward()
    squares = own.double().square().sum((1, 2)).float()
    torch.testing.assert_close(torch.tensor(norms.found["net.norm"].gradient), torch.cat([squares, squares]))


def test_of_several_calls_the_least_variance_counts_and_a_layer_that_is_frozen_has_its_own() -> None:
    module = nn.BatchNorm2d(8)
    found = statistics(module, [MAPS, MAPS * 2, MAPS * 3])
    torch.testing.assert_close(found.variance, statistics(module, [MAPS]).variance)
    module.eval().running_var.fill_(7)
    assert statistics(module, [MAPS]).variance == [7.0] * 8


@pytest.mark.parametrize("name", normzoo.list_norms())
def test_each_layer_of_the_zoo_has_a_layout_or_no_statistics(name: str) -> None:
    module = normzoo.create_norm(name, 8, **({"groups": 2} if "groups" in normzoo.norm_info(name).options else {}))
    found = units(module, MAPS)
    if name in ("affine", "none", "derf", "dynamic_tanh", "divisive", "local_response"):
        assert found is None
    else:
        assert found is not None
        assert found[1].numel() == MAPS.numel()


def news(bad: Statistics, quiet: Statistics | None, module: nn.Module | None = None) -> list[dict[str, Any]]:
    return layers_with_news({"n": module or nn.BatchNorm2d(4)}, {"n": bad}, {} if quiet is None else {"n": quiet})


def test_of_dead_channels_the_one_that_died_and_steers_is_told() -> None:
    bad = Statistics("channel", [1.0, 0.0, 1e-9, 0.0], [1.0, 1.0, 97.0, 1.0])
    (row,) = news(bad, Statistics("channel", [1.0, 0.0, 1.0, 1.0], [1.0] * 4))
    assert (row["channels"], row["dead"], row["dead_quiet"], row["channel"]) == (4, 3, 1, 2)
    assert (row["variance"], row["variance_quiet"], row["gradient"]) == (1e-9, 1.0, 0.97)
    assert row["gradient_of_dead"] == 0.98
    assert (row["module"], row["class"], row["eps"], row["unit"]) == ("n", "BatchNorm2d", 1e-5, "channel")
    (row,) = news(Statistics("channel", bad.variance, [torch.nan] * 4), None)
    assert (row["variance_quiet"], row["gradient"], row["dead_quiet"]) == (None, None, None)


def test_a_variance_that_has_risen_or_fallen_a_thousandfold_is_told_and_no_other() -> None:
    quiet = Statistics("channel", [1.0, 1.0, 1.0, 1.0], [1.0] * 4)
    (row,) = news(Statistics("channel", [1.0, 2e3, 1e-2, 1.0], [1.0] * 4), quiet)
    assert (row["channel"], row["dead"], row["gradient"]) == (1, 0, 0.25)
    assert news(Statistics("channel", [1.0, 9e2, 2e-3, torch.nan], [1.0] * 4), quiet) == []
    samples = Statistics("sample", [2e4, 1.0], [1.0, 1.0])
    (row,) = news(samples, Statistics("sample", [1.0, 2.0, 3.0], []), nn.LayerNorm(4))
    assert (row["channel"], row["variance_quiet"]) == (0, 2.0)


def test_the_worst_come_first_and_not_all() -> None:
    layers = {f"n{i}": nn.BatchNorm2d(1) for i in range(MOST + 5)}
    bad = {name: Statistics("channel", [10.0 ** (4 + i)], [1.0]) for i, name in enumerate(layers)}
    bad["n3"] = Statistics("channel", [0.0], [1.0])
    rows = layers_with_news(layers, bad, {name: Statistics("channel", [1.0], [1.0]) for name in layers})
    assert len(rows) == MOST
    assert [row["module"] for row in rows[:3]] == ["n3", "n14", "n13"]


def test_ranks_are_taken_together() -> None:
    def both(unit: str, shared: bool) -> Statistics:
        parts = [Statistics(unit, v, [1.0, 2.0], shared) for v in ([1.0, 3.0], [2.0, 1.0])]
        return over_ranks([{"n": part} for part in parts])["n"]

    assert both("channel", False) == Statistics("channel", [1.0, 1.0], [2.0, 4.0], False)
    assert both("channel", True).variance == [1.5, 2.0]
    assert both("sample", False) == Statistics("sample", [1.0, 3.0, 2.0, 1.0], [1.0, 2.0, 1.0, 2.0], False)
    assert over_ranks([{}, {"n": Statistics("channel", [1.0])}])["n"].variance == [1.0]
