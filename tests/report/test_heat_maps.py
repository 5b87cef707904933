"""Heat maps of records, and the images of them on a page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure as Drawn
from PIL import Image

from normzoo.records.reading import load_run
from normzoo.records.schema import FIGURES, Column, Figure, Schema, read_figures
from normzoo.records.segments import Segment
from normzoo.report.drawing import draw_figure
from normzoo.report.elements import _with_palette, inline_svg
from normzoo.report.heat_maps import _COLORS

VARIANCE = Figure(
    "Variance of channels", "heat map", x="fraction", y="channel", z="variance", facet="site", z_scale="log"
)


def frame(values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Rows of sites, of which each has variances of shape (channels, fractions)."""
    rows = [
        {"site": site, "channel": channel, "fraction": place / 10, "variance": value}
        for site, array in values.items()
        for channel, row in enumerate(array)
        for place, value in enumerate(row)
    ]
    return pd.DataFrame(rows)


def drawn(what: Figure, *frames: pd.DataFrame, marks: Mapping[str, int] | None = None) -> Drawn:
    figure = draw_figure(what, {f"{place or ''}": frame for place, frame in enumerate(frames)}, marks)
    assert figure is not None
    return figure


def panels(figure: Drawn) -> list[Axes]:
    return [
        axes for axes in figure.axes if any(isinstance(c, QuadMesh) for c in axes.collections) and axes.get_xlabel()
    ]


def mesh(axes: Axes) -> QuadMesh:
    return next(c for c in axes.collections if isinstance(c, QuadMesh))


def ranges(figure: Drawn) -> list[tuple[float, float]]:
    return [(float(mesh(a).norm.vmin or 0), float(mesh(a).norm.vmax or 0)) for a in panels(figure)]


FLOATS = st.floats(width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.5, 1, 2, 8]), FLOATS), min_size=1, max_size=12),
    scale=st.sampled_from(["linear", "log", "signed log", "diverging"]),
    text=st.booleans(),
)
def test_each_cell_has_the_colour_of_its_last_row(
    cells: list[tuple[int, float, float]], scale: str, text: bool
) -> None:
    rows = [{"x": x, "y": f"m{y}" if text else y, "z": z} for y, x, z in cells]
    figure = drawn(Figure("Cells", "heat map", x="x", y="y", z="z", z_scale=scale, x_scale="log"), pd.DataFrame(rows))
    [axes] = panels(figure)
    expected = {(row["x"], row["y"]): row["z"] for row in rows}
    columns = sorted({row["x"] for row in rows})
    lines = [*dict.fromkeys(row["y"] for row in rows)] if text else sorted({row["y"] for row in rows})
    array = mesh(axes).get_array()
    assert array is not None
    assert array.shape == (len(lines), len(columns))
    norm, odd = mesh(axes).norm, 0
    for i, y in enumerate(lines):
        for j, x in enumerate(columns):
            value = expected.get((x, y), math.nan)
            odd += (x, y) in expected and not math.isfinite(value)
            assert bool(np.ma.getmaskarray(array)[i, j]) == (not math.isfinite(value))
            if math.isfinite(value):
                lowest, highest = norm.vmin or 0, norm.vmax or 0
                assert array[i, j] == min(max(value, lowest), highest)
                assert lowest <= value <= highest or (scale == "log" and value <= 0)
    title = axes.get_title()
    assert (f"{odd} of {len(expected)} not finite" in title) == bool(odd)
    assert bool(axes.patches) == bool(odd)


@pytest.mark.parametrize(
    ("scale", "value"),
    [("linear", 0.0), ("linear", -2.0), ("log", 1e-300), ("log", 1e300), ("log", math.nan), ("signed log", 0.0)]
    + [("diverging", value) for value in (0.0, -2.0, 1e-300, 1e300, math.nan)],
)
def test_a_single_value_is_drawn(scale: str, value: float) -> None:
    axis = "linear" if scale == "diverging" else scale
    what = Figure("One", "heat map", x="fraction", y="channel", z="variance", z_scale=scale, y_scale=axis)
    drawn(what, frame({"a": np.array([[value]])})).draw_without_rendering()


def test_values_that_are_not_finite_are_marked_and_told() -> None:
    values = np.ones((3, 4))
    values[1, 2:] = math.inf
    values[2, 3] = math.nan
    figure = drawn(VARIANCE, frame({"norm1": values}))
    [axes] = panels(figure)
    assert axes.get_title() == "norm1\n3 of 12 not finite\nfirst at 0.2"
    hatched = axes.patches[-1]
    assert hatched.get_hatch()
    corners = hatched.get_path().vertices
    assert corners.min(axis=0) == pytest.approx([0.15, 0.5])
    assert corners.max(axis=0) == pytest.approx([0.35, 2.5])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not finite"]


def test_zeros_have_the_lowest_colour_of_a_logarithm() -> None:
    figure = drawn(VARIANCE, frame({"norm1": np.array([[0.0, 1e-3, 10.0]])}))
    [axes] = panels(figure)
    assert mesh(axes).get_array().tolist() == [[1e-3, 1e-3, 10.0]]
    assert ranges(figure) == [(1e-3, 10.0)]
    nothing = drawn(VARIANCE, frame({"norm1": np.zeros((2, 2))}))
    assert panels(nothing)[0].get_title() == "norm1\nno value above 0"
    assert len(nothing.axes) == 1  # without a bar that says which colour is which value


@pytest.mark.parametrize(
    ("scale", "second", "shared"),
    [
        ("log", (1e-3, 1e3), True),
        ("log", (1e4, 1e6), True),  # within a decade of the first
        ("log", (1e5, 1e6), False),
        ("linear", (0.0, 9000.0), True),
        ("linear", (0.0, 20000.0), False),
        ("signed log", (-1e3, -1e2), True),
        ("signed log", (-1e6, -1e5), False),
        ("diverging", (-9000.0, 0.0), True),
        ("diverging", (-20000.0, 0.0), False),
    ],
)
def test_panels_share_their_colours_unless_one_would_have_no_more_than_one(
    scale: str, second: tuple[float, float], shared: bool
) -> None:
    values = {"a": np.array([[1.0, 1.1e3]]), "b": np.array([second])}
    what = Figure("z", "heat map", x="fraction", y="channel", z="variance", facet="site", z_scale=scale)
    figure = drawn(what, frame(values))
    assert (len(set(ranges(figure))) == 1) == shared
    assert len(figure.axes) == (3 if shared else 4)


@pytest.mark.parametrize("values", [[-3.0, 1.0], [-1.0, 3.0], [2.0, 3.0], [-3.0, -2.0], [0.0, 0.0]])
def test_a_diverging_scale_has_white_at_zero_and_a_colour_for_each_sign(values: list[float]) -> None:
    what = Figure("z", "heat map", x="fraction", y="channel", z="variance", z_scale="diverging")
    figure = drawn(what, frame({"a": np.array([values])}))
    largest = max(map(abs, values)) or 1.0
    assert ranges(figure) == [(-largest, largest)]
    colors = mesh(panels(figure)[0])
    assert colors.cmap is not _COLORS
    red, _, blue, _ = np.transpose(colors.cmap(colors.norm(np.array([-largest, *values, 0.0, largest]))))
    assert red[0] < blue[0]
    assert red[-1] > blue[-1]
    assert min(red[-2], blue[-2]) > 0.95
    for value, r, b in zip(values, red[1:], blue[1:], strict=False):
        assert (r > b) == (value > 0) or value == 0


def test_a_scale_of_a_later_version_is_left_out_and_no_reason_to_fail() -> None:
    now = {"title": "T", "kind": "heat map", "x": "a", "y": "b", "z": "c"}
    given = [now, {**now, "z_scale": "diverging"}, {**now, "z_scale": "polar"}, {**now, "y_scale": "diverging"}]
    figures = read_figures({FIGURES: json.dumps(given)})
    assert [figure.z_scale for figure in figures] == ["linear", "diverging"]


def test_of_more_than_four_panels_some_are_drawn_from_first_to_last() -> None:
    values = {f"norm{i}": np.full((2, 2), 1.0 + i) for i in range(8)}
    figure = drawn(VARIANCE, frame(values))
    assert [axes.get_title() for axes in panels(figure)] == ["norm0", "norm2", "norm4", "norm7"]
    assert figure.get_suptitle() == "4 of 8 panels, from first to last"
    figure = drawn(VARIANCE, frame({"a": np.ones((2, 2))}), frame({"a": np.ones((2, 2)), "b": np.ones((3, 2))}))
    assert [axes.get_title() for axes in panels(figure)] == ["a", "1, a", "1, b"]


def test_text_stands_from_top_to_bottom_and_long_names_are_shortened() -> None:
    names = [f"encoder.layers.{i}.a_module_with_a_long_name" for i in range(40)]
    rows = pd.DataFrame({"fraction": 0.5, "channel": names, "variance": range(40)})
    figure = drawn(Figure("z", "heat map", x="fraction", y="channel", z="variance"), rows)
    [axes] = panels(figure)
    low, high = axes.get_ylim()
    assert low > high
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == 24
    assert labels[0].startswith("…")
    assert labels[0].endswith("0.a_module_with_a_long_name")
    assert max(map(len, labels)) == 32


def test_alarms_are_marked_over_steps() -> None:
    rows = pd.DataFrame({"step": [1, 2], "channel": 0, "variance": [1.0, 2.0]})
    over_steps = Figure("z", "heat map", x="step", y="channel", z="variance")
    [axes] = panels(drawn(over_steps, rows, marks={"": 2}))
    assert [line.get_label() for line in axes.lines] == ["alarm at step 2"]
    swapped = Figure("z", "heat map", x="channel", y="step", z="variance")
    assert not panels(drawn(swapped, rows, marks={"": 2}))[0].lines


def test_no_rows_are_no_figure() -> None:
    assert draw_figure(VARIANCE, {"": frame({"a": np.ones((1, 1))})[:0]}) is None
    assert draw_figure(VARIANCE, {}) is None


def test_colours_grow_lighter_so_that_a_grey_page_can_be_read() -> None:
    red, green, blue, _ = _COLORS(np.linspace(0, 1, 64)).T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > 0).all()


def _images(svg: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(r"base64,\s*([^\"]*)\"", svg)]


def test_a_heat_map_of_noise_is_small_on_a_page_and_its_palette_has_the_same_colours() -> None:
    values = np.exp(3 * np.random.default_rng(0).normal(size=(512, 50)))
    figure = drawn(VARIANCE, frame({"norm1": values}))
    page = inline_svg("noise", figure)
    assert len(page) < 100_000
    image, bar = _images(page)
    assert len(base64.b64encode(image)) < 60_000
    assert len(bar) < 2_000


@pytest.mark.parametrize("colors", [1, 200, 256, 300])
def test_an_image_on_a_page_has_its_colours_whether_few_or_many(colors: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (colors, 4), dtype=np.uint8)[np.arange(40 * 30) % colors]
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(40, 30, 4)).save(file, "png")
    smaller = base64.b64decode(_with_palette(base64.b64encode(file.getvalue()).decode()))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(smaller)).convert("RGBA")), pixels.reshape(40, 30, 4))
    assert (Image.open(io.BytesIO(smaller)).mode == "P") == (colors <= 256)


def test_one_channel_of_many_is_seen_on_a_page_if_it_is_not_finite() -> None:
    values = np.ones((512, 20))
    values[300, 10:] = math.nan
    [image, *_] = _images(inline_svg("one", drawn(VARIANCE, frame({"a": values, "b": values, "c": values}))))
    colors = np.asarray(Image.open(io.BytesIO(image)).convert("RGBA")).reshape(-1, 4)
    assert (np.abs(colors[:, :3].astype(int) - [0xD5, 0x5E, 0x00]).sum(axis=1) < 30).sum() > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "heat map"}, "is a heat map without z; a heat map must have z"),
        ({"kind": "line", "z": "c"}, "is a line with z='c'; a heat map must have z, .* no other kind has one"),
        ({"kind": "heat map", "z": "c", "lines": ("a",)}, "has no lines; leave out what is for lines"),
        ({"kind": "heat map", "z": "c", "level": 0.0, "note": "a"}, "has no level, note; leave out"),
        ({"kind": "heat map", "z": "c", "z_scale": "root"}, "z_scale of figure 'T' must be one of linear, log"),
    ],
)
def test_what_a_heat_map_has_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Figure("T", x="a", y="b", **options)


def test_a_record_says_its_heat_map_and_nothing_that_is_by_default(tmp_path: Path) -> None:
    columns = (*(Column(name, "float", "") for name in ("fraction", "variance")), Column("channel", "int", ""))
    schema = Schema("moments", "", (*columns, Column("site", "text", "")), (VARIANCE,))
    rows = frame({"a": np.ones((3, 2))}).to_dict("records")
    Segment(tmp_path, schema, 0).append([{"step": 1, **row} for row in rows])
    [figure] = load_run(tmp_path)["moments"].attrs["figures"]
    assert figure == VARIANCE
    line = Figure("L", "line", x="step", y="variance")
    [written] = json.loads(Schema("moments", "", columns, (line,)).arrow().metadata[FIGURES.encode()])
    assert written == {"title": "L", "kind": "line", "x": "step", "y": "variance"}
    with pytest.raises(ValueError, match="is drawn from site, and the columns are"):
        Schema("moments", "", columns, (VARIANCE,))
