"""Charts as plain data, as specifications for Vega, and as files, of values of any kind."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pictures import color_of, is_odd, pixel_of, pixels

from normzoo.report.charts import SIGNED_DECADES, Axis, Cells, Chart, Colors, Note, Panel, Rule, Series, axis_of
from normzoo.report.export import save, to_bytes
from normzoo.report.heat_maps import _color_axis
from normzoo.report.layer_maps import _color_axis as _layer_color_axis
from normzoo.report.palettes import palette
from normzoo.report.vega import specification

SCALES = ["linear", "log", "signed log"]
ANY = st.floats()
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MAGNITUDES = st.one_of(FINITE, st.sampled_from([0.0, 1e-300, 1e300, -1e300, 5e-324, 1.7e308, -1.7e308, 1.0, 1 + 2e-16]))


def series(y: list[float], **more: Any) -> Series:
    return Series("a", "a", np.arange(len(y), dtype=float), np.array(y, dtype=float), **more)


NUMBERS = axis_of(np.arange(3), "linear", "n")
CHART = Chart((Panel(NUMBERS, NUMBERS, series=(series([0.0, 1.0, 2.0]),)),))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan), st.just(math.inf)), min_size=1), st.integers(4, 60))
def test_a_thinned_line_keeps_its_ends_its_extremes_and_its_gaps(values: list[float], most: int) -> None:
    line = series(values * 4, count=np.arange(4 * len(values)))
    thinned = line.thinned(most)
    assert line.count is not None
    assert thinned.count is not None
    kept = thinned.x.astype(int).tolist()
    assert kept == sorted({*kept})
    assert (kept[0], kept[-1]) == (0, len(line.x) - 1)
    assert np.array_equal(thinned.y, line.y[kept], equal_nan=True)
    assert np.array_equal(thinned.count, line.count[kept])
    assert len(kept) <= max(most, 8) + 3
    finite = line.y[np.isfinite(line.y)]
    if finite.size:
        drawn = thinned.y[np.isfinite(thinned.y)]
        assert (drawn.min(), drawn.max()) == (finite.min(), finite.max())
    for before, after in itertools.pairwise(kept):
        joined = np.isfinite(line.y[[before, after]]).all()
        assert not joined or np.isfinite(line.y[before : after + 1]).all(), "a line across a gap"
    assert series(values[:4]).thinned(most).y.tolist() == pytest.approx(values[:4], nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 50))
def test_each_stretch_of_a_thinned_line_keeps_the_ends_of_its_band(seed: int, most: int) -> None:
    """By a loop over the stretches."""
    random = np.random.default_rng(seed)
    y = random.normal(size=int(random.integers(most + 1, 500)))
    low, high = y - random.exponential(size=len(y)), y + random.exponential(size=len(y))
    thinned = series(y.tolist(), low=low, high=high).thinned(most)
    assert thinned.low is not None
    assert thinned.high is not None
    for places in np.array_split(np.arange(len(y)), most // 2):
        within = (thinned.x >= places[0]) & (thinned.x <= places[-1])
        assert thinned.low[within].min() == low[places].min()
        assert thinned.high[within].max() == high[places].max()
    assert np.array_equal(thinned.low, low[thinned.x.astype(int)])


def test_a_band_without_ends_is_thinned_by_its_line() -> None:
    y = [*range(100)]
    nothing = np.full(100, math.nan)
    thinned = series([*map(float, y)], low=nothing, high=nothing).thinned(10)
    assert (thinned.y.min(), thinned.y.max()) == (0, 99)


def hold_axis(axis: Axis) -> None:
    low, high = axis.domain
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high
    assert axis.scale != "log" or low > 0
    assert axis.linear_to > 0
    ticks = axis.ticks
    assert ticks == sorted({*ticks})
    assert len(ticks) <= 20
    if axis.scale != "linear":
        assert len([tick for tick in ticks if low <= tick <= high]) == len(ticks) >= 2
    else:
        assert ticks == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(MAGNITUDES, ANY), max_size=4), st.sampled_from(SCALES), st.booleans())
def test_an_axis_has_room_for_values_of_any_magnitude(values: list[float], scale: str, room: bool) -> None:
    axis = axis_of(np.array(values), scale, "x", room=room)
    hold_axis(axis)
    low, high = axis.domain
    for value in values:
        placed = math.isfinite(value) and (value > 0 or axis.scale != "log")
        if placed and abs(value) <= 1e300 and (axis.scale != "log" or value >= 1e-300):
            assert low * (1 - 1e-12 * np.sign(low)) <= value <= high * (1 + 1e-12 * np.sign(high))
    finite = [value for value in values if math.isfinite(value)]
    if scale == "signed log":
        assert axis.scale == ("log" if finite and min(finite) > 0 else "signed log" if any(finite) else "linear")
    else:
        assert axis.scale == scale


@settings(max_examples=200, deadline=None)
@given(st.lists(MAGNITUDES, max_size=5), st.sampled_from([*SCALES, "diverging"]))
def test_colours_have_a_range_for_values_of_any_magnitude(values: list[float], scale: str) -> None:
    hold_axis(_color_axis(scale, np.array(values)))
    hold_axis(_layer_color_axis(np.array(values)))


@settings(max_examples=200, deadline=None)
@given(st.floats(-300, 300), st.floats(1e-12, 600), st.sampled_from([1.0, 1e-5]))
def test_a_logarithmic_axis_has_ticks_however_narrow_or_wide(low: float, decades: float, scale: float) -> None:
    """Also one of a reader's own domain, as of the edges of cells."""
    high = min(10.0 ** min(low + decades * scale, 305.0), 1e305)
    if 10.0**low < high:
        hold_axis(Axis("x", "log", (10.0**low, high)))
        hold_axis(Axis("x", "signed log", (-high, high), 10.0**low))


@pytest.mark.parametrize("value", [1e-300, 1.0, 1e30, 1e300])
def test_of_a_signed_logarithm_each_decade_has_its_share(value: float) -> None:
    """Room beyond the ends is that of the scale, not of the values, which would be decades near 0."""
    axis = axis_of(np.array([0.0, value, value * 1e-6]), "signed log", "x")
    low, high = axis.domain
    assert axis.linear_to == pytest.approx(value * 1e-6, rel=10)
    assert axis.linear_to >= value / 10.0**SIGNED_DECADES
    assert -axis.linear_to * 2 < low < 0
    assert value < high < 4 * value


def test_an_axis_with_places_has_its_ticks_there() -> None:
    assert Axis("x", "log", (1.0, 8.0), places=(3.0, 5.0)).ticks == [3.0, 5.0]
    assert Axis("x", places=(1.0,)).ticks == [1.0]


# Specifications


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    if draw(st.booleans()) and draw(st.booleans()):
        names = draw(st.lists(st.text(max_size=50), min_size=1, max_size=30))
        return Axis("names", domain=(-0.5, len(names) - 0.5), names=(*names,))
    return axis_of(np.array(draw(st.lists(ANY, max_size=3))), draw(st.sampled_from(SCALES)), draw(st.text(max_size=9)))


@st.composite
def lines(draw: st.DrawFn) -> Series:
    count = draw(st.integers(0, 5))
    columns = st.lists(ANY, min_size=count, max_size=count).map(np.array)
    x = draw(columns)
    maybe = st.none() | columns
    names = st.lists(st.text(max_size=5), min_size=count, max_size=count).map(tuple)
    return Series(
        draw(st.text(max_size=9)),
        draw(st.text(max_size=9)),
        np.sort(x),
        draw(columns),
        low=draw(maybe),
        high=draw(maybe),
        count=draw(st.none() | st.just(np.arange(count))),
        names=draw(st.just(()) | names),
        base=draw(st.none() | st.floats(1e-9, 1.0)),
        bars=draw(st.booleans()),
        color=draw(st.sampled_from(["#000000", "#D55E00"])),
        dash=draw(st.sampled_from([(), (1.5, 2)])),
        marker=draw(st.sampled_from(["", "o", "D", "x", "of a later version"])),
    )


@st.composite
def maps(draw: st.DrawFn) -> Panel:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(ANY, min_size=rows * columns, max_size=rows * columns))
    z = np.array(values).reshape(rows, columns)
    there = np.array(draw(st.lists(st.booleans(), min_size=z.size, max_size=z.size))).reshape(z.shape)
    scale = draw(st.sampled_from(SCALES))
    colors = Colors(_color_axis(scale, z[there & np.isfinite(z)]), palette("cividis", draw(st.integers(2, 80))), "z")
    x, y = (Axis("", domain=(-0.5, count - 0.5)) for count in (columns, rows))
    if draw(st.booleans()):
        y = Axis("", domain=y.domain, names=tuple(map(str, range(rows))))
    cells = Cells(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, z, there, colors, draw(st.booleans()))
    return Panel(x, y, draw(st.text(max_size=9)), rules=(Rule(0.0, "x", outlined=True),), cells=cells)


@st.composite
def panels(draw: st.DrawFn) -> Panel:
    if draw(st.booleans()):
        return draw(maps())
    x, y = draw(axes()), draw(axes())
    rules = draw(st.lists(st.builds(Rule, ANY, st.sampled_from("xy"), st.text(max_size=5)), max_size=2))
    notes = draw(st.lists(st.builds(Note, ANY, ANY, st.text(max_size=5), cross=st.booleans()), max_size=2))
    return Panel(x, y, draw(st.text(max_size=9)), (*draw(st.lists(lines(), max_size=3)),), (*rules,), (*notes,))


CHARTS = st.builds(
    Chart,
    st.lists(panels(), min_size=1, max_size=4).map(tuple),
    st.text(max_size=9),
    st.booleans(),
    over_steps=st.booleans(),
)


def hold_specification(chart: Chart) -> None:
    for live in (False, True):
        text = json.dumps(specification(chart, live=live), allow_nan=False)
        assert json.loads(text) == specification(chart, live=live)


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CHARTS)
def test_a_specification_is_json_without_nan(chart: Chart) -> None:
    hold_specification(chart)


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CHARTS)
def test_a_specification_is_drawn(chart: Chart) -> None:
    assert to_bytes(chart, "svg").startswith(b"<svg")


@pytest.mark.slow
@settings(max_examples=250, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CHARTS)
def test_any_specification_is_drawn(chart: Chart) -> None:
    hold_specification(chart)
    assert to_bytes(chart, "svg").decode().startswith("<svg")


@pytest.mark.parametrize(
    "text", ["\x00", "\x1b[31m", "\x7f", "\ufffe", "\udc80", "\U0001f600", "a\nb\tc", "]]>&#0;", "\U0001f600" * 200]
)
def test_texts_that_are_no_xml_are_drawn(text: str) -> None:
    """They would end the process."""
    line = replace(series([0.0, 1.0]), label=f"<{text}>", run=text)
    panel = replace(CHART.panels[0], title=text, series=(line,), notes=(Note(0.0, 0.0, text),))
    drawn = to_bytes(Chart((panel,), text), "svg").decode()
    named = Axis(text, domain=(-0.5, 0.5), names=(text,))
    assert to_bytes(Chart((replace(panel, x=named),)), "png").startswith(b"\x89PNG")
    ET.fromstring(drawn)  # is XML


@settings(max_examples=40, deadline=None)
@given(maps())
def test_each_pixel_in_the_middle_of_a_cell_has_the_colour_of_its_value(panel: Panel) -> None:
    cells = panel.cells
    assert cells is not None
    image = pixels(cells, panel)
    for i, j in np.ndindex(cells.z.shape):
        color = tuple(image[pixel_of(cells, panel, i, j, image.shape)])
        if not cells.there[i, j]:
            assert color[3] == 0
        elif math.isfinite(cells.z[i, j]):
            assert color in color_of(cells.z[i, j], cells.colors)
        else:
            assert is_odd(color)


def test_what_has_no_place_is_not_in_the_data() -> None:
    """Nor does a point of no place stand at 0."""
    line = Series("a", "a", np.array([1.0, math.inf, 3.0]), np.array([5.0, 6.0, -7.0]), low=np.array([2.0, 2.0, -8.0]))
    panel = Panel(Axis(domain=(0.0, 4.0)), Axis(scale="log", domain=(1.0, 10.0)), series=(line,))
    [points, *_] = specification(Chart((panel,)), live=True)["data"]
    assert points["columns"] == {"s": [0, 0, 0], "x": [1, None, 3], "y": [5, None, None], "l": [2, None, None]}


# Files


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<svg "), ("PDF", b"%PDF-")])
def test_a_chart_is_written_as_what_its_ending_says(tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"figure.of.{ending}"
    assert save(CHART, path) == path
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["figure.gif", "figure", "figure.svg.txt", ".png"])
def test_another_ending_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^a chart is written as \.svg, \.png, \.pdf, not as ") as error:
        save(CHART, tmp_path / name)
    assert repr(name) in str(error.value)
    assert [*tmp_path.iterdir()] == []


def test_a_file_has_the_size_that_is_asked_for() -> None:
    sizes = [int.from_bytes(to_bytes(CHART, "png", scale)[16:20]) for scale in (1.0, 2.0)]
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=2)
    assert sizes[0] >= 900


DRAW_IN_A_FORK = """
import os, sys
import numpy as np
from normzoo.report.charts import Chart, Panel, Series, axis_of
from normzoo.report.export import to_bytes
axis = axis_of(np.arange(3), "linear", "n")
chart = Chart((Panel(axis, axis, series=(Series("a", "a", np.arange(3), np.arange(3.0)),)),))
first = to_bytes(chart, "svg")
child = os.fork()
if child == 0:
    os._exit(0 if to_bytes(chart, "svg") == first else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_of_a_process_that_has_drawn_draws_too() -> None:
    """The library that draws would wait forever there."""
    process = subprocess.Popen([sys.executable, "-c", DRAW_IN_A_FORK], start_new_session=True)
    try:
        assert process.wait(timeout=100) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
