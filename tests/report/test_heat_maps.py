"""Heat maps of records, and the images of them on a page."""

from __future__ import annotations

import base64
import html
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
from pictures import color_of, is_odd, pixel_of, pixels

from normzoo.records.reading import load_run
from normzoo.records.schema import FIGURES, Column, Figure, Schema, read_figures
from normzoo.records.segments import Segment
from normzoo.report.charts import Chart
from normzoo.report.drawing import draw_figure
from normzoo.report.elements import inline_svg
from normzoo.report.export import pixels as image_of
from normzoo.report.export import to_bytes
from normzoo.report.palettes import palette

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


def drawn(what: Figure, *frames: pd.DataFrame, marks: Mapping[str, int] | None = None) -> Chart:
    figure = draw_figure(what, {f"{place or ''}": frame for place, frame in enumerate(frames)}, marks)
    assert figure is not None
    assert all(panel.cells is not None for panel in figure.panels)
    return figure


def titles(chart: Chart) -> list[str]:
    return [panel.title for panel in chart.panels]


def ranges(chart: Chart) -> list[tuple[float, float]]:
    return [panel.cells.colors.axis.domain for panel in chart.panels if panel.cells is not None]


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
    [panel] = figure.panels
    cells = panel.cells
    assert cells is not None
    expected = {(row["x"], row["y"]): row["z"] for row in rows}
    columns = sorted({row["x"] for row in rows})
    lines = [*dict.fromkeys(row["y"] for row in rows)] if text else sorted({row["y"] for row in rows})
    assert cells.z.shape == (len(lines), len(columns))
    assert panel.y.names == (tuple(lines) if text else ())
    image, odd = pixels(cells, panel), 0
    lowest, highest = cells.colors.axis.domain
    for i, y in enumerate(lines):
        for j, x in enumerate(columns):
            value = expected.get((x, y))
            color = tuple(image[pixel_of(cells, panel, i, j, image.shape)])
            assert bool(cells.there[i, j]) == (value is not None)
            if value is None:
                assert color[3] == 0  # nothing
            elif not math.isfinite(value):
                odd += 1
                assert is_odd(color)
            else:
                assert cells.z[i, j] == value
                assert lowest <= value <= highest or (scale == "log" and value <= 0)
                assert color in color_of(value, cells.colors)
    assert (f"{odd} of {len(expected)} not finite" in panel.title) == bool(odd)
    assert is_odd(image).any() == bool(odd)


@pytest.mark.parametrize(
    ("scale", "value"),
    [("linear", 0.0), ("linear", -2.0), ("log", 1e-300), ("log", 1e300), ("log", math.nan), ("signed log", 0.0)]
    + [("diverging", value) for value in (0.0, -2.0, 1e-300, 1e300, math.nan)],
)
def test_a_single_value_is_drawn(scale: str, value: float) -> None:
    axis = "linear" if scale == "diverging" else scale
    what = Figure("One", "heat map", x="fraction", y="channel", z="variance", z_scale=scale, y_scale=axis)
    figure = drawn(what, frame({"a": np.array([[value]])}))
    assert b"<image" in to_bytes(figure, "svg")
    [(low, high)] = ranges(figure)
    assert low < high
    assert low <= value <= high or math.isnan(value) or value == 1e-300  # which a logarithm does not show


def test_values_that_are_not_finite_are_marked_and_told() -> None:
    values = np.ones((3, 4))
    values[1, 2:] = math.inf
    values[2, 3] = math.nan
    figure = drawn(VARIANCE, frame({"norm1": values}))
    [panel] = figure.panels
    assert panel.title == "norm1\n3 of 12 not finite\nfirst at 0.2"
    cells = panel.cells
    assert cells is not None
    image = pixels(cells, panel)
    hatched = is_odd(image)
    assert len({tuple(color) for color in image[hatched]}) == 2
    width, height = image.shape[1], image.shape[0]
    middles = (np.arange(width) + 0.5) / width * 0.4 - 0.05, (height - np.arange(height) - 0.5) / height * 3 - 0.5
    x, y = np.meshgrid(*middles)
    assert np.array_equal(hatched, ((y > 0.5) & (y < 1.5) & (x > 0.15)) | ((y > 1.5) & (x > 0.25)))
    assert "not finite" in to_bytes(figure, "svg").decode()
    finite = drawn(VARIANCE, frame({"norm1": np.ones((3, 4))}))
    assert "not finite" not in to_bytes(finite, "svg").decode()


def test_zeros_have_the_lowest_colour_of_a_logarithm() -> None:
    figure = drawn(VARIANCE, frame({"norm1": np.array([[0.0, 1e-3, 10.0]])}))
    [panel] = figure.panels
    assert panel.cells is not None
    assert panel.cells.colors.below
    assert "(and below)" in to_bytes(figure, "svg").decode()
    image = pixels(panel.cells, panel)
    first, second, _ = (tuple(image[pixel_of(panel.cells, panel, 0, j, image.shape)]) for j in range(3))
    assert first == second == (*bytes.fromhex(panel.cells.colors.palette[0][1:]), 255)
    assert ranges(figure) == [(1e-3, 10.0)]
    nothing = drawn(VARIANCE, frame({"norm1": np.zeros((2, 2))}))
    assert titles(nothing) == ["norm1\nno value above 0"]
    assert [panel.cells.bar for panel in nothing.panels if panel.cells] == [False]  # that says which colour is which


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
    assert [panel.cells.bar for panel in figure.panels if panel.cells] == ([False, True] if shared else [True, True])


@pytest.mark.parametrize("values", [[-3.0, 1.0], [-1.0, 3.0], [2.0, 3.0], [-3.0, -2.0], [0.0, 0.0]])
def test_a_diverging_scale_has_white_at_zero_and_a_colour_for_each_sign(values: list[float]) -> None:
    what = Figure("z", "heat map", x="fraction", y="channel", z="variance", z_scale="diverging")
    figure = drawn(what, frame({"a": np.array([values])}))
    largest = max(map(abs, values)) or 1.0
    assert ranges(figure) == [(-largest, largest)]
    [panel] = figure.panels
    assert panel.cells is not None
    colors = panel.cells.colors
    assert colors.palette == palette("red-blue", 65)
    image = pixels(panel.cells, panel)
    red, _, blue, _ = np.transpose([color_of(value, colors)[0] for value in (-largest, 0.0, largest)]).astype(int)
    assert red[0] < blue[0]
    assert red[2] > blue[2]
    assert min(red[1], blue[1]) > 0.95 * 255
    for j, value in enumerate(values):
        r, _, b, _ = image[pixel_of(panel.cells, panel, 0, j, image.shape)]
        assert (r > b) == (value > 0) or value == 0


def test_a_scale_of_a_later_version_is_left_out_and_no_reason_to_fail() -> None:
    now = {"title": "T", "kind": "heat map", "x": "a", "y": "b", "z": "c"}
    given = [now, {**now, "z_scale": "diverging"}, {**now, "z_scale": "polar"}, {**now, "y_scale": "diverging"}]
    figures = read_figures({FIGURES: json.dumps(given)})
    assert [figure.z_scale for figure in figures] == ["linear", "diverging"]


def test_of_more_than_four_panels_some_are_drawn_from_first_to_last() -> None:
    values = {f"norm{i}": np.full((2, 2), 1.0 + i) for i in range(8)}
    figure = drawn(VARIANCE, frame(values))
    assert titles(figure) == ["norm0", "norm2", "norm4", "norm7"]
    assert figure.heading == "4 of 8 panels, from first to last"
    figure = drawn(VARIANCE, frame({"a": np.ones((2, 2))}), frame({"a": np.ones((2, 2)), "b": np.ones((3, 2))}))
    assert titles(figure) == ["a", "1, a", "1, b"]


def test_text_stands_from_top_to_bottom_and_long_names_are_shortened() -> None:
    names = [f"encoder.layers.{i}.a_module_with_a_long_name" for i in range(40)]
    rows = pd.DataFrame({"fraction": 0.5, "channel": names, "variance": range(40)})
    figure = drawn(Figure("z", "heat map", x="fraction", y="channel", z="variance"), rows)
    [panel] = figure.panels
    assert panel.y.names == (*names,)
    texts = re.findall(
        r"<text[^>]*translate\([^,]*,([^)]*)\)[^>]*>([^<]*module[^<]*)</text>", to_bytes(figure, "svg").decode()
    )
    heights = [float(height) for height, _ in texts]
    assert heights == sorted(heights)  # downwards
    labels = [html.unescape(label) for _, label in texts]
    assert labels == [f"…{name[-31:]}" for name in names[::2]]
    assert len(labels) <= 24
    assert panel.cells is not None
    image = pixels(panel.cells, panel)
    colors = (tuple(image[row, 0]) for row in (0, -1))
    assert [*colors] == [(*bytes.fromhex(panel.cells.colors.palette[end][1:]), 255) for end in (0, -1)]


def test_alarms_are_marked_over_steps() -> None:
    rows = pd.DataFrame({"step": [1, 2], "channel": 0, "variance": [1.0, 2.0]})
    over_steps = Figure("z", "heat map", x="step", y="channel", z="variance")
    figure = drawn(over_steps, rows, marks={"": 2})
    assert [(rule.label, rule.at, rule.along) for rule in figure.panels[0].rules] == [("alarm at step 2", 2, "x")]
    assert figure.over_steps
    swapped = drawn(Figure("z", "heat map", x="channel", y="step", z="variance"), rows, marks={"": 2})
    assert swapped.panels[0].rules == ()
    assert not swapped.over_steps


def test_no_rows_are_no_figure() -> None:
    assert draw_figure(VARIANCE, {"": frame({"a": np.ones((1, 1))})[:0]}) is None
    assert draw_figure(VARIANCE, {}) is None


def test_colours_grow_lighter_so_that_a_grey_page_can_be_read() -> None:
    for name in ("cividis", "viridis"):
        colors = np.array([[*bytes.fromhex(color[1:])] for color in palette(name, 64)])
        assert (np.diff(colors @ [0.2126, 0.7152, 0.0722]) > 0).all()


def _images(svg: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(r"base64,\s*([^\"]*)\"", svg)]


def test_a_heat_map_of_noise_is_small_on_a_page() -> None:
    values = np.exp(3 * np.random.default_rng(0).normal(size=(512, 50)))
    figure = drawn(VARIANCE, frame({"norm1": values}))
    page = inline_svg("noise", figure)
    assert len(page) < 100_000
    image, bar = _images(page)
    assert len(base64.b64encode(image)) < 60_000
    assert len(bar) < 2_000


@pytest.mark.parametrize(("channels", "columns"), [(512, 20), (5000, 20), (3, 5000)])
def test_one_cell_of_many_is_seen_if_it_is_not_finite(channels: int, columns: int) -> None:
    """In a picture that has fewer pixels on a screen than there are cells."""
    values = np.ones((channels, columns))
    values[2 * channels // 3, columns // 3] = math.nan
    figure = drawn(VARIANCE, frame({"a": values}))
    [panel] = figure.panels
    assert panel.cells is not None
    odd = is_odd(pixels(panel.cells, panel))
    assert odd.any(axis=1).sum() >= len(odd) / 250
    assert odd.any(axis=0).sum() >= odd.shape[1] / 250
    on_screen = image_of(figure).astype(int)
    assert (np.abs(on_screen - [0xD5, 0x5E, 0x00]).sum(axis=2) < 30)[: on_screen.shape[0] - 25].any()


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
