"""Figures of records of any measurement, drawn from what the record says of them."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from normzoo.records.schema import Column, Figure, Schema
from normzoo.records.segments import Segment
from normzoo.report import draw, load_runs
from normzoo.report.charts import Chart, text_width
from normzoo.report.drawing import draw_figure
from normzoo.report.export import to_bytes
from normzoo.report.style import COLORS
from normzoo.report.vega import specification

NORMS = Figure("Norms of weights", "line", x="step", y="norm", lines=("layer",), y_scale="log")


def labels(chart: Chart) -> list[str]:
    return [mark.label for mark in chart.legend()]


def titles(chart: Chart) -> list[str]:
    return [panel.title for panel in chart.panels]


@pytest.mark.parametrize("layers", [12, 13, 60])
def test_a_figure_has_room_for_the_lines_of_many_layers(layers: int) -> None:
    frame = pd.DataFrame(
        {"step": step, "layer": f"block.{i}", "norm": i + 1.0} for step in (0, 1) for i in range(layers)
    )
    figure = draw_figure(NORMS, {"run": frame})
    assert figure is not None
    [panel] = figure.panels
    assert len(panel.series) == layers
    looks = {(line.color, line.dash, line.marker) for line in panel.series}
    assert len(looks) == layers
    shown = range(layers) if layers == 12 else range(layers - 1, layers - 7, -1)  # those that end highest
    assert labels(figure) == [f"run, block.{i}" for i in shown]
    assert {line.run for line in panel.series} == {"run"}
    if layers > 12:
        assert [line.color for line in panel.series if line.label] == [*COLORS[:6]]
        assert [bool(line.label) for line in panel.series] == [False] * (layers - 6) + [True] * 6  # which lie above
        assert {line.opacity for line in panel.series if not line.label} == {0.5}
    drawn = to_bytes(figure, "svg").decode()
    assert all(drawn.count(f">{name}</text>") == 1 for name in labels(figure))
    assert len(re.findall('class="mark-line', drawn)) == layers


def test_colours_tell_runs_apart_or_the_lines_of_a_run_that_is_alone() -> None:
    frame = pd.DataFrame({"step": step, "layer": f"{i}", "norm": i + 1.0} for step in (0, 1) for i in range(3))
    for runs, colors in ((["a"], 3), (["a", "b"], 2)):
        figure = draw_figure(NORMS, dict.fromkeys(runs, frame))
        assert figure is not None
        assert len({line.color for line in figure.panels[0].series}) == colors


def test_of_many_lines_one_that_ends_at_no_number_is_named_first() -> None:
    """Infinity is; of curves, which do not end, the first, the middle and the last are named."""
    ends = [*range(12), math.inf]
    rows = [{"step": s, "layer": f"{i}", "norm": end if s else 1.0} for i, end in enumerate(ends) for s in (0, 1)]
    figure = draw_figure(NORMS, {"": pd.DataFrame(rows)})
    assert figure is not None
    assert labels(figure) == ["12", "11", "10", "9", "8", "7"]
    curves = pd.DataFrame({"layer": f"{i}", "step": [0.0, 1.0], "norm": [1.0, 2.0]} for i in range(13))
    figure = draw_figure(replace(NORMS, kind="curve"), {"": curves})
    assert figure is not None
    assert labels(figure) == ["0", "6", "12"]


def test_samples_of_different_steps_name_their_steps_in_the_legend() -> None:
    """As the last ones of two runs, of which one has ended early."""
    profile = Figure("Profile", "profile", x="depth", y="v")
    frames = {
        name: pd.DataFrame([{"step": s, "depth": d, "v": 1.0 + d} for s in steps for d in range(2)])
        for name, steps in {"early": [0], "late": [0, 50]}.items()
    }
    figure = draw_figure(profile, frames)
    assert figure is not None
    assert titles(figure) == ["first sample (step 0)", "last sample"]
    assert labels(figure) == ["early, last sample at step 0", "late, last sample at step 50"]
    assert {line.run for panel in figure.panels for line in panel.series} == {"early", "late"}


def test_curves_leave_out_rows_that_have_none_and_name_their_panels() -> None:
    curves = Figure("Curves", "curve", x="x", y="y", facet="of")
    rows = [
        {"step": s, "of": of, "x": [1.0, 2.0], "y": [v, v + s]} for s in (0, 2) for of, v in (("a", 1.0), ("b", 5.0))
    ]
    frame = pd.DataFrame(
        [*rows, {"step": 3, "of": "a", "x": None, "y": None}, {"step": 4, "of": "b", "x": [], "y": []}]
    )
    figure = draw_figure(curves, {"": frame})
    assert figure is not None
    assert titles(figure) == ["a", "b"]
    assert figure.heading == "median over samples, with their range"
    lines = [line for panel in figure.panels for line in panel.series]
    assert [line.y.tolist() for line in lines] == [[1.0, 2.0], [5.0, 6.0]]
    assert [
        (line.low.tolist(), line.high.tolist()) for line in lines if line.low is not None and line.high is not None
    ] == [
        ([1.0, 1.0], [1.0, 3.0]),
        ([5.0, 5.0], [5.0, 7.0]),
    ]
    assert draw_figure(curves, {"": frame[4:]}) is None
    assert draw_figure(curves, {"": frame[:0]}) is None


@pytest.mark.parametrize("length", [1, 20, 30, 33, 59, 61, 120])
def test_labels_of_a_legend_do_not_lie_on_each_other(length: int) -> None:
    """Long ones stand below each other."""
    named = Figure("Named", "line", x="step", y="y", lines=("of",))
    rows = [{"step": s, "of": of * length, "y": 1.0} for of in "abcdefg" for s in (0, 1)]
    figure = draw_figure(named, {"": pd.DataFrame(rows)})
    assert figure is not None
    marks = specification(figure)["marks"][-1]["marks"]
    texts = [mark["encode"]["update"] for mark in marks if mark["type"] == "text"]
    places = {text["text"]["value"]: (text["x"]["value"], text["y"]["value"]) for text in texts}
    assert [*places] == labels(figure)
    assert len({*places.values()}) == 7
    for label, (x, y) in places.items():
        beside = [other for other, height in places.values() if height == y and other > x]
        assert all(x + text_width(label) < other for other in beside)
    assert (len({x for x, _ in places.values()}) == 1) == (length >= 61)


def test_numbers_on_a_logarithmic_axis_are_written_out() -> None:
    sizes = Figure("Sizes", "line", x="size", y="y", x_scale="log")
    figure = draw_figure(sizes, {"": pd.DataFrame({"step": 0, "size": [4, 9, 128], "y": [1.0, 2.0, 3.0]})})
    assert figure is not None
    assert figure.panels[0].x.ticks == [10, 30, 100]
    texts = re.findall(r">([^<]*)</text>", to_bytes(figure, "svg").decode())
    assert {"10", "30", "100"} <= {*texts}


def test_curves_of_many_points_have_no_markers() -> None:
    curves = Figure("Curves", "curve", x="x", y="y")
    for count, marker in ((29, "o"), (30, "")):
        figure = draw_figure(curves, {"": pd.DataFrame([{"step": 0, "x": [*range(count)], "y": [1.0] * count}])})
        assert figure is not None
        assert figure.panels[0].series[0].marker == marker


def test_a_run_whose_values_end_in_nan_says_so_in_the_title() -> None:
    """Not one whose last value is finite, nor lines that never had a value."""
    steps = range(4)
    broken = [{"step": s, "layer": "a", "norm": 1.0 + s if s < 2 else math.nan} for s in steps]
    never = [{"step": s, "layer": "b", "norm": math.nan} for s in range(9)]
    whole = [{"step": s, "layer": "a", "norm": 5.0 if s != 2 else math.inf} for s in steps]
    frames = {"x": pd.DataFrame([*broken, *never]), "y": pd.DataFrame(whole)}
    figure = draw_figure(NORMS, frames)
    assert figure is not None
    assert figure.panels[0].title == "layer a, x: no finite value after step 1"


def test_the_alarm_of_each_run_is_marked_in_figures_over_steps() -> None:
    frame = pd.DataFrame({"step": range(9), "layer": "a", "norm": 2.0})
    frames = {"healthy": frame, "high": frame, "long": frame}
    figure = draw_figure(NORMS, frames, {"high": 3, "long": 7})
    assert figure is not None
    [panel] = figure.panels
    assert [(rule.label, rule.along, rule.at, rule.run) for rule in panel.rules] == [
        ("high, alarm at step 3", "x", 3, "high"),
        ("long, alarm at step 7", "x", 7, "long"),
    ]
    assert labels(figure) == [*frames, "high, alarm at step 3", "long, alarm at step 7"]
    colors = {mark.label: mark.color for mark in figure.legend()}
    assert colors["high, alarm at step 3"] == colors["high"] != colors["long"]
    without = draw_figure(NORMS, frames)
    assert without is not None
    assert panel.y == without.panels[0].y  # the mark has no height of its own
    over_norms = replace(NORMS, x="norm", y="step")
    figure = draw_figure(over_norms, {"high": frame}, {"high": 3})
    assert figure is not None
    assert figure.panels[0].rules == ()
    assert labels(figure) == ["high"]


def test_an_alarm_beyond_the_last_value_has_room_and_one_of_a_run_without_values_none() -> None:
    frame = pd.DataFrame({"step": range(9), "layer": "a", "norm": 2.0})
    figure = draw_figure(NORMS, {"empty": frame[:0], "drawn": frame}, {"empty": 700, "drawn": 50})
    assert figure is not None
    [panel] = figure.panels
    assert [rule.at for rule in panel.rules] == [50]
    assert 50 < panel.x.domain[1] < 60
    figure = draw_figure(NORMS, {"empty": frame[:0], "drawn": frame, "too": frame}, {"empty": 700, "too": 5})
    assert figure is not None
    colors = [(mark.label, mark.color) for mark in figure.legend()]  # of a run's place among all
    assert colors == [("drawn", COLORS[1]), ("too", COLORS[2]), ("too, alarm at step 5", COLORS[2])]


def test_records_of_users_are_drawn_as_they_are_and_beside_each_other(tmp_path: Path) -> None:
    columns = (Column("of", "text", ""), Column("norm", "float", ""))
    figure = Figure("Norms", "line", x="step", y="norm", lines=("of",))
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    for name in ("first", "second"):
        rows = [{"step": step, "of": of, "norm": 1.0} for step in (0, 1) for of in ("a", None)]
        Segment(tmp_path, Schema(name, "", columns, (figure,)), 0).append(rows)
    figures = draw(load_runs(tmp_path))
    assert {*figures} == {"Norms", "Norms (second)"}
    for drawn in figures.values():
        assert len(drawn.panels[0].series) == 2
        assert "gradient" not in labels(drawn)


def test_values_that_are_nearly_the_same_have_room_and_an_empty_name_is_no_title() -> None:
    frame = pd.DataFrame({"step": range(4), "layer": "", "norm": [1.0, 0.999999, 1.000001, 1.0]})
    figure = draw_figure(NORMS, {"run": frame})
    assert figure is not None
    [panel] = figure.panels
    low, high = panel.y.domain
    assert low < 0.6
    assert high > 1.9
    assert panel.title == ""
    frame["norm"] = [1.0, 0.8, 1.5, 1.0]  # which differ enough to be drawn as close as they are
    close = draw_figure(NORMS, {"run": frame})
    assert close is not None
    assert close.panels[0].y.domain[0] > 0.6


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        ("log", [2.2, 2.9]),
        ("log", [1e-3, 1e3]),
        ("signed log", [2.2, 2.9]),
        ("signed log", [0.31, 0.38]),
        ("signed log", [-2.9, -2.2]),
    ],
)
def test_an_axis_within_a_decade_has_numbers(scale: str, values: list[float]) -> None:
    frame = pd.DataFrame({"step": [0, 1], "y": values})
    figure = draw_figure(Figure("Within a decade", "line", x="step", y="y", y_scale=scale), {"": frame})
    assert figure is not None
    [panel] = figure.panels
    low, high = panel.y.domain
    ticks = [tick for tick in panel.y.ticks if low <= tick <= high]
    assert len(ticks) >= 3
    assert low <= min(values) <= max(values) <= high
    texts = re.findall(r">([^<]*)</text>", to_bytes(figure, "svg").decode())
    shown = {float(text.replace("−", "-")) for text in texts if re.fullmatch(r"[−\d.e+-]+", text)}
    assert {*ticks} <= shown


def test_curves_of_single_steps_have_a_panel_for_each_step_and_of_many_four_from_first_to_last() -> None:
    what = Figure("Single", "curve", x="s", y="loss", facet="step")
    for steps, expected in (([6, 0, 3], [0, 3, 6]), (range(10), [0, 3, 6, 9])):
        frame = pd.DataFrame({"step": step, "s": [1.0, 2.0], "loss": [1.0, float(step)]} for step in steps)
        figure = draw_figure(what, {"a": frame, "b": frame[frame["step"] > 0]})
        assert figure is not None
        assert titles(figure) == [f"step {step}" for step in expected]
        assert [panel.series[0].y[1] for panel in figure.panels] == expected
        assert len(figure.panels[-1].series) == 2
        assert not figure.over_steps


def test_the_mean_over_seeds_is_that_of_logarithms_on_a_logarithmic_axis() -> None:
    frames = {f"{v}": pd.DataFrame({"step": [0, 1], "layer": "a", "norm": [1.0, v]}) for v in (1.0, 100.0)}
    for scale, mean in (("log", 10.0), ("linear", 50.5)):
        figure = draw_figure(replace(NORMS, y_scale=scale), frames, groups={"both": [*frames]})
        assert figure is not None
        [series] = figure.panels[0].series
        assert series.y == pytest.approx([1.0, mean])
        assert series.low == pytest.approx([1.0, 1.0])
        assert series.high == pytest.approx([1.0, 100.0])


def test_where_no_value_is_above_zero_a_logarithmic_figure_says_so() -> None:
    frame = pd.DataFrame({"step": [0, 1], "layer": "a", "norm": [0.0, -1.0]})
    for scale, told in (("log", ["no value above 0"]), ("linear", [])):
        figure = draw_figure(replace(NORMS, y_scale=scale), {"run": frame})
        assert figure is not None
        assert [note.text for note in figure.panels[0].notes] == told
        assert ("no value above 0" in to_bytes(figure, "svg").decode()) == bool(told)


def test_a_level_is_a_line_across_the_panel_with_room_for_it() -> None:
    """One value for all lines, or the median of a column for each, in its colour."""
    rows = [
        {"step": s, "layer": of, "norm": 1.0, "bound": b + s} for of, b in (("a", 5.0), ("b", 70.0)) for s in range(3)
    ]
    for level, expected in ((9.0, [9.0]), ("bound", [6.0, 71.0])):
        figure = draw_figure(replace(NORMS, level=level, y_scale="linear"), {"": pd.DataFrame(rows)})
        assert figure is not None
        [panel] = figure.panels
        assert [(rule.along, rule.at) for rule in panel.rules] == [("y", at) for at in expected]
        assert panel.y.domain[1] > max(expected)
        if level == "bound":
            assert [rule.color for rule in panel.rules] == [line.color for line in panel.series]


@pytest.mark.parametrize("name", ["a$b$c", "_hidden", "<b>&amp;", "{{x}}", "'", '"', "a\\b", "#fff", "ü–漢"])
def test_names_stand_in_a_picture_as_they_are(name: str) -> None:
    frame = pd.DataFrame({"step": [0, 1], "layer": [name, name], "norm": [1.0, 2.0]})
    figure = draw_figure(NORMS, {name: frame, "other": frame.assign(layer="x")})
    assert figure is not None
    texts = [html.unescape(text) for text in re.findall(r">([^<]*)</text>", to_bytes(figure, "svg").decode())]
    assert labels(figure) == [f"{name}, {name}", "other, x"]
    assert {*labels(figure)} <= {*texts}
