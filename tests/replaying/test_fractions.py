"""Fractions of an update: losses and moments against passes by hand, and values that are not finite."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from fake_stage import FakeRun, FakeStage, Task
from torch import nn

from normzoo.causes import titles
from normzoo.functional.tails import excess_kurtosis
from normzoo.records.schema import Schema
from normzoo.replaying import fractions
from normzoo.replaying.calls import Watch
from normzoo.replaying.fraction_records import CHANNELS, DEPTH, LOSS, TAILS, UPDATES
from normzoo.replaying.fractions import ask
from normzoo.replaying.sites import chosen_sites, weights_of_sites
from normzoo.report.drawing import draw_figure

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AT = [part / 20 for part in range(21)]


def conv(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = ((nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)) for _ in range(depth))
    return nn.Sequential(*(m for block in blocks for m in block), nn.Flatten(), nn.Linear(192, 4))


def asked(net: nn.Module, rate: float, batches: Any = (X, X + 1), **options: Any) -> tuple[FakeStage, Any, Any]:
    stage = FakeStage(Task(net), [batches], rate)
    evidence: dict[str, Any] = {"course": {"fatal": 0}}
    records = ask(stage, evidence, **options)
    for name, value in stage.module.state_dict().items():
        torch.testing.assert_close(value, stage.first[name], rtol=0, atol=0)
    return stage, evidence["fractions"], {schema.name: pd.DataFrame(rows) for schema, rows in records}


def test_losses_and_channels_are_those_of_passes_by_hand() -> None:
    stage, facts, frames = asked(conv(), rate=50.0)
    before = stage.parameters()
    stage.train(0)
    after = stage.parameters()
    sites = {"net.1": 0, "net.4": 3, "net.7": 6}
    assert (facts["step"], facts["at"], facts["sites"]) == (0, AT, [*sites])
    frame = frames["replay_channels"].set_index(["site", "fraction", "channel"]).sort_index()
    assert len(frame) == 3 * 21 * 3
    for i, fraction in enumerate(AT[::5]):
        stage.go_to(0)
        stage.set_parameters({name: before[name] + fraction * (after[name] - before[name]) for name in before})
        inputs: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
        hooks = []
        for site, place in sites.items():
            take = partial(lambda parts, m, args, output: parts.append(output.detach().clone()), inputs[site])
            hooks.append(stage.module.get_submodule(f"net.{place}").register_forward_hook(take))
        loss, gradients = stage.backward(0)
        assert facts["loss"][5 * i] == pytest.approx(loss, rel=1e-4)
        for site, parts in inputs.items():
            x = torch.cat(parts).double()
            rows = frame.loc[site, fraction]
            assert rows["mean"].tolist() == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-3)
            assert rows["variance"].tolist() == pytest.approx(x.var((0, 2, 3), unbiased=False).tolist(), rel=1e-3)
        tails = frames["replay_gradient_tails"].query(f"fraction == {fraction} and weight == 'net.3.weight'").iloc[0]
        g = gradients["net.3.weight"].flatten()
        sizes = g.abs().sort().values
        assert tails["q50"] == pytest.approx(sizes[math.ceil(0.5 * len(g)) - 1].item(), rel=1e-2)
        assert tails["max"] == pytest.approx(sizes[-1].item(), rel=1e-2)
        assert tails["kurtosis"] == pytest.approx(excess_kurtosis(g).item(), rel=0.05, abs=0.05)
        for hook in hooks:
            hook.remove()


def test_facts_of_a_loss_that_falls_and_rises() -> None:
    """The loss of one weight w on x = 1 is w^2: the update goes from 1 to -3, and 0 is at a quarter of it."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    _, facts, frames = asked(net, rate=2.0, batches=(torch.ones(1, 1),))
    assert facts["loss"] == pytest.approx([(1 - 4 * f) ** 2 for f in AT])
    assert facts["largest_that_holds"] == pytest.approx(0.5)
    assert facts["rise_at"] == 0.65
    assert facts["update_by_layer"] == [{"layer": "net.weight", "relative_update": 4.0}]
    (row,) = frames["replay_updates"].to_dict("records")
    assert (row["weight"], row["update"], row["matrix"]) == (1.0, 4.0, True)
    _, facts, _ = asked(net, rate=0.1, batches=(torch.ones(1, 1),))
    assert (facts["largest_that_holds"], facts["rise_at"]) == (1.0, None)


def test_values_that_are_not_finite_stand_in_evidence_and_records_and_are_drawn() -> None:
    _, facts, frames = asked(conv(), rate=1e38)
    assert [math.isfinite(loss) for loss in facts["loss"]] == [True, *[False] * 20]
    assert (facts["largest_that_holds"], facts["rise_at"]) == (0.0, 0.05)
    assert facts["moments_rise"]["net.7"] == math.inf
    channels, depth = frames["replay_channels"], frames["replay_depth"]
    assert not channels[(channels.site == "net.7") & (channels.fraction == 1)]["variance"].map(math.isfinite).any()
    assert not frames["replay_fractions"]["largest"].map(math.isfinite).iloc[1:].any()
    assert depth["fraction"].unique().tolist() == [0.0, 0.5, 1.0]
    last = depth[depth.fraction == 1].iloc[-1]
    assert (last["module"], last["depth"], math.isfinite(last["max"])) == ("net.10", 10, False)
    assert math.isnan(last["mean"])
    for schema in (LOSS, CHANNELS, DEPTH, TAILS, UPDATES):
        assert {*frames[schema.name].columns} == {column.name for column in schema.columns}
        for figure in schema.figures:
            assert draw_figure(figure, {"": frames[schema.name]}) is not None, figure.title


def test_an_update_to_weights_that_are_not_finite_ends_there_exactly() -> None:
    _, facts, _ = asked(nn.Linear(2, 1), rate=math.inf, batches=(torch.ones(1, 2),))
    assert math.isfinite(facts["loss"][0])
    assert not math.isfinite(facts["loss"][-1])
    assert facts["update_by_layer"][0]["relative_update"] == math.inf
    half = fractions._between(torch.ones(2).half(), torch.tensor([3.0, 2.0]).half(), 0.25)
    assert (half.dtype, half.tolist()) == (torch.float16, [1.5, 1.25])


def sites_of(net: nn.Module, batch: Any = X, sites: Any = None) -> tuple[dict[str, str], dict[str, str]]:
    task = Task(net)
    with Watch(FakeRun(task), sides=()) as watch:
        task.training_step(batch, 0)
    chosen = chosen_sites(FakeRun(task), watch.calls, sites)
    return chosen, weights_of_sites(FakeRun(task), watch.calls, chosen)


def test_default_sites_are_those_of_the_paper() -> None:
    chosen, weights = sites_of(conv(110))
    assert chosen == {f"net.{3 * (layer - 1) + 1}": "input" for layer in (8, 44, 80)}
    assert list(weights.values()) == [f"net.{3 * (layer - 1)}.weight" for layer in (8, 44, 80)]
    assert list(sites_of(conv(109))[0]) == list(chosen)  # a ResNet-110 for CIFAR has 109 normalization layers
    linear, weights = sites_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert linear == {"net.0": "output", "net.2": "output"}
    assert list(weights.values()) == ["net.0.weight", "net.2.weight"]
    assert sites_of(nn.Sequential(nn.ReLU())) == ({}, {})


def test_default_sites_come_in_the_order_of_calls_and_are_called() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.never = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(self.linear(x)))

    assert [*sites_of(Backwards())[0]] == ["net.first", "net.last"]


def test_sites_may_be_named() -> None:
    assert sites_of(conv(), sites="net.[03]")[0] == {"net.0": "output", "net.3": "output"}
    assert sites_of(conv(), sites=["norms"])[0] == {f"net.{i}": "input" for i in (1, 4, 7)}
    with pytest.raises(ValueError, match=r"no module matches 'layer4'; there are net, net\.0"):
        sites_of(conv(), sites="layer4")


def test_of_many_channels_some_are_recorded_and_a_site_without_channels_is_said(monkeypatch: Any) -> None:
    monkeypatch.setattr(fractions, "MOST_CHANNELS", 2)
    net = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, -1)), nn.Linear(192, 5))
    stage, facts, frames = asked(net, 0.1, sites=["net.0", "net.2"])
    assert frames["replay_channels"]["channel"].unique().tolist() == [0, 2]
    assert stage.notes == [
        "the output of net.0 has no channels that can be followed along the update",
        "2 of the 5 channels of net.2, evenly spaced, are recorded",
    ]
    assert [*facts["moments_rise"]] == ["net.2"]


def test_without_a_fatal_step_nothing_is_asked() -> None:
    for course, kind in (({}, "divergence"), ({"fatal": 7}, "divergence"), ({"fatal": 0}, "exception")):
        stage = FakeStage(Task(nn.Linear(1, 1)), [[torch.ones(1, 1)]])
        stage.capsule.about["kind"] = kind
        evidence: dict[str, Any] = {"course": course}
        records: list[tuple[Schema, Any]] = ask(stage, evidence)
        assert (records, evidence["fractions"]) == ([], None)


def test_figures_have_the_titles_that_findings_point_at() -> None:
    drawn = {figure.title for schema in (LOSS, CHANNELS, DEPTH) for figure in schema.figures}
    assert {titles.FRACTIONS, titles.CHANNELS, titles.DEPTH} <= drawn
