"""Runs that differ only in their seed, and where runs end against what was swept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run, tail

from normzoo.cli.main import main
from normzoo.records.schema import Figure
from normzoo.report import load_runs, write_page
from normzoo.report.averages import over_seeds
from normzoo.report.axes import draw_axes
from normzoo.report.charts import Chart, Panel, Rule
from normzoo.report.drawing import draw_figure, magnitude_density
from normzoo.report.figures import draw
from normzoo.report.logged import tidy
from normzoo.report.runs import Run
from normzoo.report.seeds import seed_groups
from normzoo.report.settings import differing_keys

NORMS = Figure("Norm", "line", x="step", y="norm", lines=("layer",))


def run(
    name: str, config: Mapping[str, Any], accuracy: float | None = None, alarm: int | None = None, **status: Any
) -> Run:
    """A run whose accuracy at steps 0, 1 is half of the last one, and the last one; and its loss 1 less that."""
    values = [] if accuracy is None else [accuracy / 2, accuracy]
    metrics = [{"step": s, "test/accuracy": v, "train/accuracy": v, "train/loss": 1 - v} for s, v in enumerate(values)]
    records = {} if alarm is None else {"divergence": pd.DataFrame([{"step": alarm, "loss": 1e9, "value": 1e9}])}
    return Run(name, {**config}, {"state": "finished", **status}, {}, tidy(metrics), records)


def recipe(norm: Any, lr: float, seed: int) -> dict[str, Any]:
    return {"seed": seed, "model": {"arch": "resnet20_cifar", "norm": norm}, "optimizer": {"name": "sgd", "lr": lr}}


def sweep() -> list[Run]:
    """Two norms at two rates, three seeds each; without norm at 1.0 two of three diverge."""
    runs = []
    ends = {("batch", 0.01): 0.4, ("batch", 1.0): 0.8, ("none", 0.01): 0.3, ("none", 1.0): 0.2}
    for (norm, lr), end in ends.items():
        for seed in range(3):
            alarm = 5 + seed if (norm, lr) == ("none", 1.0) and seed else None
            name = f"{len(runs) + 1:02d}-norm={norm},lr={lr},seed={seed}"
            runs.append(run(name, recipe(norm, lr, seed), end + (0.0, 0.02, 0.1)[seed], alarm))
    return runs


def drawn(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    return {line.label: (line.x.tolist(), line.y.tolist()) for line in panel.series}


def bands(panel: Panel) -> list[tuple[float, float]]:
    """The lowest and the highest value of each band."""
    found = [(line.low, line.high) for line in panel.series if line.low is not None and line.high is not None]
    return [(float(low.min()), float(high.max())) for low, high in found]


def alone(chart: Chart) -> Panel:
    [panel] = chart.panels
    return panel


def test_runs_of_several_seeds_are_one_group() -> None:
    runs = sweep()
    groups = seed_groups(runs)
    assert [group.label for group in groups] == [
        f"norm={norm},lr={lr}" for norm in ("batch", "none") for lr in (0.01, 1.0)
    ]
    assert [group.runs for group in groups] == [runs[i : i + 3] for i in (0, 3, 6, 9)]
    assert groups[0].name == "norm=batch,lr=0.01 (3 seeds)"
    assert [r.name for r in groups[3].diverged] == ["11-norm=none,lr=1.0,seed=1", "12-norm=none,lr=1.0,seed=2"]


def test_runs_that_differ_in_more_or_in_nothing_are_alone() -> None:
    plain = recipe("batch", 0.1, 0)
    runs = [
        run("first", plain),
        run("same seed", plain),
        run("another rate", recipe("batch", 0.2, 1)),
        run("another section", {**recipe("batch", 0.1, 1), "callbacks": ["gradient_norm"]}),
        run("no seed", {key: value for key, value in plain.items() if key != "seed"}),
        Run("callbacks only", {}, {}, {}, tidy([]), {}, of_recipe=False),
        Run("callbacks only, too", {}, {}, {}, tidy([]), {}, of_recipe=False),
    ]
    groups = seed_groups(runs)
    assert [(group.name, group.runs) for group in groups] == [(r.name, [r]) for r in runs]
    both = seed_groups([run("a", plain), run("b", recipe("batch", 0.1, 1))])
    assert [group.name for group in both] == ["a to b (2 seeds)"]  # names that have nothing in common


@settings(max_examples=30)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 6), st.floats(-1e3, 1e3), min_size=1),
        min_size=2,
        max_size=4,
    )
)
def test_mean_and_range_are_those_of_the_seeds_that_have_a_value(seeds: list[dict[int, float]]) -> None:
    table = over_seeds([([*values], [*values.values()]) for values in seeds])
    assert table["x"].tolist() == sorted({x for values in seeds for x in values})
    for x, mean, low, high in table[["x", "mean", "low", "high"]].itertuples(index=False):
        there = [values[x] for values in seeds if x in values]
        assert math.isclose(mean, math.fsum(there) / len(there), rel_tol=1e-12, abs_tol=1e-9)
        assert (low, high) == (min(there), max(there))


def test_several_values_of_a_seed_count_once_and_text_keeps_its_order() -> None:
    table = over_seeds([(["fc", "conv", "fc"], [1.0, 7.0, 3.0]), (["fc", "conv"], [8.0, 9.0])])
    assert table["x"].tolist() == ["fc", "conv"]
    assert table["mean"].tolist() == [5.0, 8.0]  # of 2 and 8, of 7 and 9
    assert table["low"].tolist() == [2.0, 7.0]


def test_curves_are_means_with_bands() -> None:
    figures = draw(sweep())
    accuracy = drawn(figures["Accuracy"].panels[1])
    assert [panel.title for panel in figures["Accuracy"].panels] == [
        "test/accuracy",
        "train/accuracy (mini-batches, smoothed)",
    ]
    assert len(accuracy) == 4
    [first, *_] = accuracy.values()
    assert first == ([0, 1], pytest.approx([0.22, 0.33]))  # of accuracies 0.22 and 0.44, smoothed
    test = figures["Accuracy"].panels[0]
    assert drawn(test)["norm=batch,lr=0.01 (3 seeds)"] == ([0, 1], pytest.approx([0.22, 0.44]))
    assert bands(test)[0] == pytest.approx((0.2, 0.5))
    assert [line.count.tolist() for line in test.series if line.count is not None] == [[3, 3]] * 4
    assert {line.bars for line in test.series} == {False}
    loss = alone(figures["Training loss"])
    assert drawn(loss)["norm=batch,lr=0.01 (3 seeds)"][1] == pytest.approx([0.78, 0.56])
    crosses = [note for note in loss.notes if note.cross]
    assert [(note.x, note.run) for note in crosses] == [(6, loss.series[3].run), (7, loss.series[3].run)]
    assert {note.color for note in crosses} == {loss.series[3].color}


def test_a_single_seed_is_drawn_as_it_was() -> None:
    one = [r for r in sweep() if r.config["seed"] == 0]
    figures = draw(one)
    test, train = figures["Accuracy"].panels
    assert drawn(test)["04-norm=batch,lr=1.0,seed=0"] == ([0, 1], [0.4, 0.8])
    assert drawn(train)["04-norm=batch,lr=1.0,seed=0"] == ([0, 1], [0.4, pytest.approx(0.6)])
    assert bands(test) == bands(train) == []


def test_ends_against_the_learning_rate() -> None:
    figures = draw(sweep())
    assert [*figures][:2] == ["Test accuracy against norm", "Test accuracy against lr"]
    panel = alone(figures["Test accuracy against lr"])
    assert panel.x.scale == "log"
    assert panel.x.ticks == [0.01, 1.0]
    assert panel.y.domain == (0.0, 1.0)
    lines = {line.label: line for line in panel.series}
    assert [*lines] == ["norm=batch", "norm=none"]
    batch, none = lines.values()
    assert (batch.x.tolist(), batch.y.tolist()) == ([0.01, 1.0], pytest.approx([0.44, 0.84]))
    # at 1.0 of the one seed that did not diverge
    assert (none.x.tolist(), none.y.tolist()) == ([0.01, 1.0], pytest.approx([0.34, 0.2]))
    assert batch.bars
    assert batch.low == pytest.approx([0.4, 0.8])
    assert batch.high == pytest.approx([0.5, 0.9])
    assert [line.count.tolist() for line in panel.series if line.count is not None] == [[3, 3], [3, 1]]
    assert [(note.text, note.x, note.run, note.cross) for note in panel.notes] == [("2 of 3", 1.0, "norm=none", True)]
    assert "mean and range over 3 seeds" in panel.title
    assert "×: seeds that have diverged, of all" in panel.title


def test_a_rate_at_which_all_diverge_has_a_cross_and_no_point() -> None:
    runs = [run(f"{lr}", recipe("none", lr, 0), 0.5, alarm=3 if lr > 1 else None) for lr in (0.5, 1.0, 2.0)]
    panel = alone(draw_axes(seed_groups(runs))["Test accuracy against lr"])
    assert panel.x.scale == "linear"
    assert panel.series[0].x.tolist() == [0.5, 1.0]
    assert [(note.text, note.x) for note in panel.notes] == [("1 of 1", 2.0)]
    nothing = [run(f"{lr}", recipe("none", lr, 0), 0.5, alarm=3) for lr in (0.5, 1.0)]  # all have diverged
    panel = alone(draw_axes(seed_groups(nothing))["Test accuracy against lr"])
    assert [(note.text, note.x) for note in panel.notes] == [("1 of 1", 0.5), ("1 of 1", 1.0)]
    assert panel.series[0].x.size == 0


def test_what_moves_together_with_another_key_has_no_figure_of_its_own() -> None:
    runs = [run("a", recipe("batch", 0.1, 0), 0.5), run("b", recipe("none", 0.001, 0), 0.4)]
    assert [*draw_axes(seed_groups(runs))] == ["Test accuracy against norm, lr"]
    runs.append(run("c", {**recipe("batch", 0.2, 0), "trainer": {"max_epochs": 7}}, 0.4))
    assert draw_axes(seed_groups(runs)) == {}  # no two of which differ in one setting alone


def test_ends_against_a_setting_that_is_a_name() -> None:
    """Lines stand beside each other at each name, in the order of the runs, and do not join."""
    panel = alone(draw_axes(seed_groups(sweep()))["Test accuracy against norm"])
    assert panel.x.names == ("batch", "none")
    assert panel.x.domain == (-0.5, 1.5)
    slow, fast = panel.series
    assert (slow.label, fast.label) == ("lr=0.01", "lr=1.0")
    assert (slow.width, fast.width) == (0.0, 0.0)
    assert slow.x == pytest.approx([-0.125, 0.875])
    assert fast.x == pytest.approx([0.125, 1.125])
    assert slow.y == pytest.approx([0.44, 0.34])
    assert fast.y == pytest.approx([0.84, 0.2])
    assert [(note.text, note.x, note.run) for note in panel.notes] == [("2 of 3", pytest.approx(1.125), "lr=1.0")]


@pytest.mark.parametrize(("count", "there"), [(24, True), (25, False)])
def test_a_setting_of_too_many_names_has_no_figure(count: int, there: bool) -> None:
    runs = [run(f"{i}", recipe(f"norm{i}", 0.1, 0), 0.5) for i in range(count)]
    assert bool(draw_axes(seed_groups(runs))) == there


def test_numbers_that_move_together_are_one_axis() -> None:
    runs = []
    for norm in ("batch", "none"):
        for lr, epochs in ((0.1, 10), (0.01, 100), (0.001, 1000)):
            config = {**recipe(norm, lr, 0), "trainer": {"max_epochs": epochs}, "lr_scheduler": [epochs // 2]}
            runs.append(run(f"{norm} {lr}", config, 0.5))
    figures = draw_axes(seed_groups(runs))
    assert [*figures] == ["Test accuracy against norm", "Test accuracy against lr"]
    panel = alone(figures["Test accuracy against lr"])
    assert [line.label for line in panel.series] == ["norm=batch", "norm=none"]
    assert panel.series[0].x.tolist() == [0.001, 0.01, 0.1]
    runs.append(run("more epochs", {**runs[0].config, "trainer": {"max_epochs": 20}}, 0.6))
    figures = draw_axes(seed_groups(runs))  # the rate has other epochs now
    assert [*figures] == ["Test accuracy against norm", "Test accuracy against max_epochs"]
    points = {line.label: line.x.tolist() for line in alone(figures["Test accuracy against max_epochs"]).series}
    assert points["norm=batch, lr=0.1, lr_scheduler.0=5"] == [10, 20]
    assert {len(x) for label, x in points.items() if label != "norm=batch, lr=0.1, lr_scheduler.0=5"} == {1}


def test_a_run_that_did_not_finish_has_no_end() -> None:
    runs = [run(f"{lr}", recipe("batch", lr, 0), 0.5, state=state) for lr, state in ((1, "finished"), (2, "running"))]
    panel = alone(draw_axes(seed_groups(runs))["Test accuracy against lr"])
    assert panel.series[0].x.tolist() == [1]


def test_keys_that_differ() -> None:
    values: list[dict[str, Any]] = [{"a": 1, "b": "x"}, {"a": 1, "b": None}, {"a": 1, "c": [2]}]
    assert differing_keys(values) == ["b", "c"]
    options = [
        run("1", {**recipe({"name": "group", "groups": 4}, 0.1, 0)}, 0.3),
        run("2", {**recipe({"name": "group", "groups": 8}, 0.1, 0)}, 0.4),
        run("3", {**recipe("batch", 0.1, 0)}, 0.5),
        run("4", {**recipe("batch", 0.1, 0), "trainer": {"max_epochs": True}}, 0.5),
    ]
    figures = draw_axes(seed_groups(options))
    assert [*figures] == ["Test accuracy against groups"]
    assert [line.label for line in alone(figures["Test accuracy against groups"]).series] == ["norm=group"]


def test_a_record_of_several_seeds_is_one_line_for_each_layer() -> None:
    frames = {
        f"seed {seed}": pd.DataFrame(
            [
                {"step": step, "layer": layer, "norm": (1.0 + seed) * (step + 1) * scale}
                for layer, scale in (("a", 1.0), ("b", 10.0))
                for step in range(4 - seed)  # later seeds end earlier
            ]
        )
        for seed in range(3)
    }
    groups = {"three": [*frames]}
    figure = draw_figure(NORMS, frames, {"seed 1": 3, "seed 2": 2}, groups)
    assert figure is not None
    lines = drawn(alone(figure))
    assert lines["three, a"] == ([0, 1, 2, 3], [2.0, 4.0, 4.5, 4.0])
    assert lines["three, b"][1] == [20.0, 40.0, 45.0, 40.0]
    assert bands(alone(figure))[0] == (1.0, 6.0)
    alarms = [(rule.at, rule.along, rule.label, rule.run) for rule in alone(figure).rules]
    assert alarms == [(2, "x", "three, alarm at steps 2, 3", "three"), (3, "x", "", "three")]
    assert isinstance(figure.legend()[-1], Rule)
    apart = draw_figure(NORMS, frames)
    assert apart is not None
    assert len(alone(apart).series) == 6
    mixed = draw_figure(NORMS, {**frames, "other": frames["seed 0"]}, None, groups)
    assert mixed is not None
    assert [*drawn(alone(mixed))] == ["three, a", "three, b", "other, a", "other, b"]


def test_a_profile_of_several_seeds() -> None:
    frames = {
        f"{seed}": pd.DataFrame({"step": 0, "depth": [1, 2, 3], "norm": [1.0 + seed, 2.0, 3.0 * seed]})
        for seed in range(2)
    }
    figure = draw_figure(Figure("Depth", "profile", x="depth", y="norm"), frames, None, {"both": ["0", "1"]})
    assert figure is not None
    assert drawn(alone(figure))["both"] == ([1, 2, 3], [1.5, 2.0, 1.5])
    assert bands(alone(figure)) == [(0.0, 3.0)]


def test_a_histogram_of_several_seeds_is_that_of_all_values() -> None:
    values = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32) * np.float32([[1], [100]])
    rows = [tail(0, "w", x, of="gradient") for x in values]
    what = Figure("Density", "histogram", x="step", y="histogram")
    figure = draw_figure(what, {str(i): pd.DataFrame([row]) for i, row in enumerate(rows)}, None, {"both": ["0", "1"]})
    together = tail(0, "w", values.ravel())
    assert figure is not None
    magnitude, density = magnitude_density(together["histogram"], 3)
    x, y = drawn(alone(figure))["both"]
    assert x == magnitude.tolist()
    assert np.array_equal(y, density, equal_nan=True)


def test_the_page_and_the_terminal_have_a_table_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        folder = make_run(
            tmp_path / f"{seed}-norm=batch,seed={seed}",
            recipe=f"seed: {seed}\nmodel: {{norm: batch}}\n",
            tails=False,
            diverged=7 if seed == 2 else None,
        )
        metrics = folder / "metrics" / "metrics.csv"
        metrics.write_text(metrics.read_text().replace("nan,inf,0.5", f"1.0,inf,{0.5 + seed / 10}"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "other" / "status.json").write_text(json.dumps({"state": "running"}))
    assert "55.0% ± 7.1%" in write_page(load_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert "55.0% ± 7.1%" in capsys.readouterr().out


def test_many_settings_that_go_together_have_a_short_name() -> None:
    configs = [{**recipe(norm, lr, 0), "trainer": {"max_epochs": n}} for norm, lr, n in (("a", 0.1, 1), ("b", 0.2, 2))]
    [title] = draw_axes(seed_groups([run(str(i), config, 0.5) for i, config in enumerate(configs)]))
    assert title == "Test accuracy against norm, lr, ..."


def test_a_loss_that_ends_as_nan_is_marked_where_it_does() -> None:
    runs = [run("a", recipe("batch", 0.1, 0), 0.5), run("b", recipe("none", 0.1, 0), 0.5)]
    lost = pd.DataFrame([{"step": 2, "epoch": 0.0, "metric": "train/loss", "value": float("nan")}])
    runs[1] = dataclasses.replace(runs[1], metrics=pd.concat([runs[1].metrics, lost], ignore_index=True), config={})
    panel = alone(draw(runs)["Training loss"])
    assert [(note.x, note.y, note.run) for note in panel.notes if note.cross] == [(2, 0.5, "b")]
