"""Figures of records of any measurement, drawn from what the record says of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from normzoo.records.schema import Column, Figure, Schema
from normzoo.records.segments import Segment
from normzoo.report import draw, load_runs
from normzoo.report.drawing import draw_figure

NORMS = Figure("Norms of weights", "line", x="step", y="norm", lines=("layer",), y_scale="log")


@pytest.mark.parametrize("layers", [12, 13, 60])
def test_a_figure_has_room_for_the_lines_of_many_layers(layers: int) -> None:
    frame = pd.DataFrame(
        {"step": step, "layer": f"block.{i}", "norm": i + 1.0} for step in (0, 1) for i in range(layers)
    )
    figure = draw_figure(NORMS, {"run": frame})
    assert figure is not None
    [axes] = figure.axes
    assert len(axes.lines) == layers
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == layers
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    shown = range(layers) if layers == 12 else range(layers - 1, layers - 7, -1)  # those that end highest
    assert names == [f"run, block.{i}" for i in shown]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that there is no room for the axes
        figure.savefig(BytesIO(), format="svg")


def test_colours_tell_runs_apart_or_the_lines_of_a_run_that_is_alone() -> None:
    frame = pd.DataFrame({"step": step, "layer": f"{i}", "norm": i + 1.0} for step in (0, 1) for i in range(3))
    for runs, colors in ((["a"], 3), (["a", "b"], 2)):
        figure = draw_figure(NORMS, dict.fromkeys(runs, frame))
        assert figure is not None
        assert len({line.get_color() for line in figure.axes[0].lines}) == colors


def test_of_many_lines_one_that_ends_at_no_number_is_named_first() -> None:
    """Infinity is; of curves, which do not end, the first, the middle and the last are named."""
    ends = [*range(12), math.inf]
    rows = [{"step": s, "layer": f"{i}", "norm": end if s else 1.0} for i, end in enumerate(ends) for s in (0, 1)]
    figure = draw_figure(NORMS, {"": pd.DataFrame(rows)})
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["12", "11", "10", "9", "8", "7"]
    curves = pd.DataFrame({"layer": f"{i}", "step": [0.0, 1.0], "norm": [1.0, 2.0]} for i in range(13))
    figure = draw_figure(replace(NORMS, kind="curve"), {"": curves})
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "6", "12"]


def test_samples_of_different_steps_name_their_steps_in_the_legend() -> None:
    """As the last ones of two runs, of which one has ended early."""
    profile = Figure("Profile", "profile", x="depth", y="v")
    frames = {
        name: pd.DataFrame([{"step": s, "depth": d, "v": 1.0 + d} for s in steps for d in range(2)])
        for name, steps in {"early": [0], "late": [0, 50]}.items()
    }
    figure = draw_figure(profile, frames)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["first sample (step 0)", "last sample"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["early, last sample at step 0", "late, last sample at step 50"]


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
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert figure.get_suptitle() == "median over samples, with their range"
    assert [axes.lines[0].get_ydata().tolist() for axes in figure.axes] == [[1.0, 2.0], [5.0, 6.0]]
    assert draw_figure(curves, {"": frame[4:]}) is None
    assert draw_figure(curves, {"": frame[:0]}) is None


def test_a_legend_of_long_labels_has_one_column() -> None:
    named = Figure("Named", "line", x="step", y="y", lines=("of",))
    for length, columns in ((60, 2), (61, 1)):
        rows = [{"step": s, "of": of * length, "y": 1.0} for of in "ab" for s in (0, 1)]
        figure = draw_figure(named, {"": pd.DataFrame(rows)})
        assert figure is not None
        assert figure.legends[0]._ncols == columns


def test_whole_numbers_on_a_logarithmic_axis_are_written_out() -> None:
    sizes = Figure("Sizes", "line", x="size", y="y", x_scale="log")
    for factor, labels in ((1, ["5", "10", "20", "50", "100"]), (1.1, None)):
        figure = draw_figure(sizes, {"": pd.DataFrame({"step": 0, "size": [4 * factor, 9, 128], "y": [1.0, 2.0, 3.0]})})
        assert figure is not None
        figure.canvas.draw()
        [axes] = figure.axes
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        shown = [label.get_text() for x, label in ticks if low <= x <= high]
        minor = [label.get_text() for label in axes.get_xticklabels(minor=True)]
        assert (shown == labels and not any(minor)) == (factor == 1)


def test_curves_of_many_points_have_no_markers() -> None:
    curves = Figure("Curves", "curve", x="x", y="y")
    for count, marker in ((29, "o"), (30, "")):
        figure = draw_figure(curves, {"": pd.DataFrame([{"step": 0, "x": [*range(count)], "y": [1.0] * count}])})
        assert figure is not None
        assert figure.axes[0].lines[0].get_marker() == marker


def test_a_run_whose_values_end_in_nan_says_so_in_the_title() -> None:
    """Not one whose last value is finite, nor lines that never had a value."""
    steps = range(4)
    broken = [{"step": s, "layer": "a", "norm": 1.0 + s if s < 2 else math.nan} for s in steps]
    never = [{"step": s, "layer": "b", "norm": math.nan} for s in range(9)]
    whole = [{"step": s, "layer": "a", "norm": 5.0 if s != 2 else math.inf} for s in steps]
    frames = {"x": pd.DataFrame([*broken, *never]), "y": pd.DataFrame(whole)}
    figure = draw_figure(NORMS, frames)
    assert figure is not None
    assert figure.axes[0].get_title() == "layer a, x: no finite value after step 1"


def test_the_alarm_of_each_run_is_marked_in_figures_over_steps() -> None:
    frame = pd.DataFrame({"step": range(9), "layer": "a", "norm": 2.0})
    frames = {"healthy": frame, "high": frame, "long": frame}
    figure = draw_figure(NORMS, frames, {"high": 3, "long": 7})
    assert figure is not None
    [axes] = figure.axes
    marks = {line.get_label(): line for line in axes.lines if "alarm" in str(line.get_label())}
    assert {label: line.get_xdata()[0] for label, line in marks.items()} == {
        "high, alarm at step 3": 3,
        "long, alarm at step 7": 7,
    }
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    assert colors["high, alarm at step 3"] == colors["high"] != colors["long"]
    assert axes.get_ylim()[0] > 0.9  # as without the mark, which has no height of its own
    over_norms = replace(NORMS, x="norm", y="step")
    figure = draw_figure(over_norms, {"high": frame}, {"high": 3})
    assert figure is not None
    assert len(figure.axes[0].lines) == 1


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
        assert len(drawn.axes[0].lines) == 2
        assert "gradient" not in [text.get_text() for legend in drawn.legends for text in legend.get_texts()]


def test_values_that_are_nearly_the_same_have_room_and_an_empty_name_is_no_title() -> None:
    frame = pd.DataFrame({"step": range(4), "layer": "", "norm": [1.0, 0.999999, 1.000001, 1.0]})
    figure = draw_figure(NORMS, {"run": frame})
    assert figure is not None
    [axes] = figure.axes
    low, high = axes.get_ylim()
    assert low < 0.6
    assert high > 1.9
    assert axes.get_title() == ""
    frame["norm"] = [1.0, 0.8, 1.5, 1.0]  # which differ enough to be drawn as close as they are
    close = draw_figure(NORMS, {"run": frame})
    assert close is not None
    assert close.axes[0].get_ylim()[0] > 0.6


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
    [axes] = figure.axes
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    labelled = [t.get_text() for t in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)) if t.get_text()]
    assert labelled
    assert any(low <= y <= high for minor in (False, True) for y in axes.get_yticks(minor=minor))


def test_curves_of_single_steps_have_a_panel_for_each_step_and_of_many_four_from_first_to_last() -> None:
    what = Figure("Single", "curve", x="s", y="loss", facet="step")
    for steps, expected in (([6, 0, 3], [0, 3, 6]), (range(10), [0, 3, 6, 9])):
        frame = pd.DataFrame({"step": step, "s": [1.0, 2.0], "loss": [1.0, float(step)]} for step in steps)
        figure = draw_figure(what, {"a": frame, "b": frame[frame["step"] > 0]})
        assert figure is not None
        assert [axes.get_title() for axes in figure.axes] == [f"step {step}" for step in expected]
        assert [np.asarray(axes.lines[0].get_ydata())[1] for axes in figure.axes] == expected
        assert len(figure.axes[-1].lines) == 2


def test_the_mean_over_seeds_is_that_of_logarithms_on_a_logarithmic_axis() -> None:
    frames = {f"{v}": pd.DataFrame({"step": [0, 1], "layer": "a", "norm": [1.0, v]}) for v in (1.0, 100.0)}
    for scale, mean in (("log", 10.0), ("linear", 50.5)):
        figure = draw_figure(replace(NORMS, y_scale=scale), frames, groups={"both": [*frames]})
        assert figure is not None
        assert np.asarray(figure.axes[0].lines[0].get_ydata()) == pytest.approx([1.0, mean])
