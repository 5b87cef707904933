"""Pages of reports in a browser: what a reader sees of them, and does with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, open_browser
from capsules_small import make_capsule
from report_runs import make_run, record
from selenium.webdriver.support.select import Select

from normzoo.report import load_runs, write_page
from normzoo.report.style import COLORS

RUNS = {  # name -> norm, learning rate, last loss
    "batch-slow": ("batch", 0.1, 0.25),
    "batch-fast": ("batch", 0.2, 12.0),
    "none-slow": ("none", 0.1, 2.5),
    "none-fast": ("none", 0.2, 54321.0),
}
LOSS, LAYERS = "Training loss", "Every layer over steps"
DIVERGED = 6


def write_run(folder: Path, norm: str, lr: float, last: float) -> None:
    """A run of ten steps, with the norms of two layers, of which one is infinite at step 8."""
    name = folder.name
    callbacks = "callbacks: [{name: divergence}]"
    recipe = f"{callbacks}\nmodel: {{norm: {norm}}}\noptimizer: {{lr: {lr}}}\n"
    make_run(folder, recipe=recipe, diverged=DIVERGED if name == "none-fast" else None, tails=False)
    lines = [f"0,{s},{3.0 if s < 9 else last},{s / 10}," for s in range(10)] + [f"0,9,,,{lr}"]
    header = "epoch,step,train/loss,train/accuracy,test/accuracy"
    (folder / "metrics" / "metrics.csv").write_text("\n".join([header, *lines, ""]))
    rows = [
        {
            "step": s,
            "optimizer": 0,
            "layer": f"net.{i}",
            "depth": i,
            "dimensions": 2,
            "nonfinite": 0,
            "weight": 1.0 + i,
            "relative_update": 0.01,
            "gradient": math.inf if (s, i) == (8, 1) else 2.0**s,
        }
        for s in range(10)
        for i in range(2)
    ]
    record(folder, "parameter_norms", *rows)
    if name == "none-fast":
        record(make_capsule(folder / "capsules" / "a", ranks=1), "parameter_norms", *rows[-4:])
        (folder / "capsules" / "a" / "metrics").rename(folder / "capsules" / "a" / "records")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        write_run(folder / name, *options)
    return write_page(load_runs(folder), folder / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Browser:
    """With the page, which has written nothing to the console."""
    chromium.messages()
    chromium.open(page)
    return chromium


def rgb(color: str) -> str:
    return ",".join(map(str, bytes.fromhex(color[1:])))


def rows(browser: Browser, shown: str = ":not([hidden])") -> list[str]:
    """The names of the runs in the table, from top to bottom."""
    return [cell.text for cell in browser.all(f"#runs tbody tr{shown} td:nth-child(2)")]


def pressed(browser: Browser, label: str) -> set[str | None]:
    """Of the legend entries of a run, in figures that name it, whether they are pressed."""
    return {button.get_attribute("aria-pressed") for button in browser.all(".legend button") if button.text == label}


def test_figures_come_alive_without_a_message(browser: Browser) -> None:
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    figures = browser.all("figure")
    assert len(figures) == len(browser.all("figure .static svg")) >= 8
    for figure in figures:
        browser.run("arguments[0].scrollIntoView({block: 'center'})", figure)
        browser.until(lambda figure=figure: browser.all("canvas", figure))
        browser.settle()
        assert not browser.one(".static", figure).is_displayed()
        [counts] = browser.ink(figure)
        assert len(counts) > 3  # of lines, text, or cells
        assert sum(counts.values()) > 500
    assert browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert browser.messages() == []


def test_a_point_says_its_run_and_its_values(browser: Browser) -> None:
    figure = browser.figure(LOSS)
    browser.pointer(browser.place_of(figure, 9, RUNS["none-slow"][2]))
    tip = browser.one(".tip")
    assert tip.is_displayed()
    title, *lines = tip.text.splitlines()
    assert title == "none-slow"
    assert lines == ["step: 9", "mini-batch loss (drawn up to 1e+06): 2.5"]
    [lit] = browser.all("#runs tr.lit")
    assert "none-slow" in lit.text
    assert browser.messages() == []
    browser.pointer((3, 3))
    assert not tip.is_displayed()
    assert browser.all("#runs tr.lit") == []


@pytest.mark.slow
def test_a_legend_entry_hides_its_run_in_all_figures(browser: Browser) -> None:
    accuracy, loss = browser.figure("Accuracy"), browser.figure(LOSS)
    color = rgb(COLORS[2])
    name = browser.all(".legend button", loss)[2].text
    before = [browser.ink(figure)[0][color] for figure in (accuracy, loss)]
    assert min(before) > 10
    browser.all(".legend button", loss)[2].click()
    browser.pointer((3, 3))
    browser.until(lambda: pressed(browser, name) == {"false"})
    assert [row.text.split()[0] for row in browser.all("#runs tr.off")] == [name]
    for title, count in (("Accuracy", before[0]), (LOSS, before[1])):
        assert browser.ink(browser.figure(title))[0].get(color, 0) < count / 4  # where lines of others mix
    [row] = browser.all("#runs tr.off")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", row)
    browser.one("button.swatch", row).click()
    browser.pointer((3, 3))
    browser.until(lambda: pressed(browser, name) == {"true"})
    assert browser.all("#runs tr.off") == []
    assert browser.ink(browser.figure(LOSS))[0][color] == before[1]
    assert browser.messages() == []


@pytest.mark.slow
def test_dragging_zooms_all_figures_over_steps_and_a_double_click_shows_all(browser: Browser) -> None:
    zoomed = (
        "return figures.filter((one) => one.chart.steps && one.visible).map((one) => one.views[0].view.signal('zx0'))"
    )
    figure = browser.figure(LOSS)
    before = browser.ink(figure)
    start, end = (browser.place_of(figure, step, 3.0) for step in (2, 5))
    browser.pointer(start, ((start[0] + end[0]) // 2, end[1]), end, pressed=True)
    low, high = browser.until(lambda: browser.run(zoomed)[0])
    assert (low, high) == (pytest.approx(2, abs=0.05), pytest.approx(5, abs=0.05))
    assert {tuple(zoom) for zoom in browser.run(zoomed)} == {(low, high)}
    for title in ("Accuracy", LAYERS, LOSS):
        browser.figure(title)
        assert (low, high) in {tuple(zoom) for zoom in browser.run(zoomed)}
    assert browser.ink(figure) != before
    assert not browser.one(".zoom-box", figure).is_displayed()
    browser.double_click(browser.one("canvas", figure))
    browser.until(lambda: {*map(str, browser.run(zoomed))} == {"None"})
    browser.pointer((3, 3))
    browser.until(lambda: browser.ink(figure) == before)
    assert browser.messages() == []


@pytest.mark.slow
def test_the_table_is_sorted_by_numbers(browser: Browser) -> None:
    """Those that are not there come last, upwards and downwards."""
    assert rows(browser)[0] == "none-fast"  # which has diverged
    shown = {"none-fast": "-3e+04", "batch-slow": "9.5%", "none-slow": "100.0%", "batch-fast": "–"}
    accuracy = column(browser, "test/accuracy")
    for row, name in zip(browser.all("#runs tbody tr"), rows(browser), strict=True):
        browser.run("arguments[0].cells[arguments[1]].textContent = arguments[2]", row, accuracy, shown[name])
    absent, ascending = "batch-fast", [*shown]
    head = browser.all("#runs th")[accuracy]
    for direction, order in (("ascending", ascending), ("descending", [*ascending[-2::-1], absent])):
        browser.one("button.sort", head).click()
        assert head.get_attribute("aria-sort") == direction
        assert rows(browser) == order
    browser.all("#runs th")[1].click()
    browser.one("button.sort", browser.all("#runs th")[1]).click()
    assert rows(browser) in (sorted(RUNS), sorted(RUNS, reverse=True))
    assert head.get_attribute("aria-sort") is None
    assert browser.messages() == []


def column(browser: Browser, name: str) -> int:
    return [cell.text for cell in browser.all("#runs th")].index(name)


@pytest.mark.slow
def test_search_and_filters_hide_rows_and_lines(browser: Browser) -> None:
    browser.figure(LOSS)
    search = browser.one("input[type=search]")
    search.send_keys("none slow")
    browser.until(lambda: rows(browser) == ["none-slow"])
    assert any(text.startswith("1 of 4 ") for text in browser.texts(".controls .note"))
    assert pressed(browser, "none-slow") == {"true"}
    assert pressed(browser, "batch-slow") == pressed(browser, "none-fast") == {"false"}
    browser.all(".controls button")[0].click()  # show all
    browser.until(lambda: {*rows(browser)} == {*RUNS})
    assert pressed(browser, "batch-slow") == {"true"}
    assert search.get_attribute("value") == ""
    Select(browser.one("select[aria-label='filter by norm']")).select_by_value("batch")
    browser.until(lambda: {*rows(browser)} == {"batch-slow", "batch-fast"})
    assert pressed(browser, "none-slow") == {"false"}
    assert pressed(browser, "batch-fast") == {"true"}
    assert browser.messages() == []


@pytest.mark.slow
def test_a_facet_shows_a_picture_for_each_value(browser: Browser) -> None:
    Select(browser.one("select[aria-label='facet by']")).select_by_value("norm")
    figure = browser.figure(LOSS)
    browser.until(lambda: len(browser.all("canvas", figure)) == 2)
    assert [heading.text for heading in browser.all("h4", figure)] == ["norm = batch", "norm = none"]
    batch, none = browser.ink(figure)
    labels = [button.text for button in browser.all(".legend button", figure)][:4]
    for name, color in zip(labels, COLORS, strict=False):
        assert (batch.get(rgb(color), 0) > 20) == name.startswith("batch")
        assert (none.get(rgb(color), 0) > 20) == name.startswith("none")
    Select(browser.one("select[aria-label='facet by']")).select_by_value("")
    browser.until(lambda: len(browser.all("canvas", browser.figure(LOSS))) == 1)
    assert browser.messages() == []


@pytest.mark.slow
def test_every_layer_of_each_run_and_quantity_can_be_picked(browser: Browser) -> None:
    figure = browser.figure(LAYERS)
    run, quantity = (Select(select) for select in browser.all("select", figure))
    assert run.first_selected_option.text == "none-fast"  # which has diverged
    assert {option.text for option in run.options} == {*RUNS}
    names = {f"parameter_norms: {name}" for name in ("weight", "gradient", "relative_update")}
    assert names <= {option.text for option in quantity.options}
    quantity.select_by_value("parameter_norms: gradient")
    browser.settle()
    figure = browser.figure(LAYERS)
    gradient = browser.ink(figure)[0]
    assert gradient[rgb("#D55E00")] > 100  # the cell that is not finite
    browser.pointer(browser.place_of(figure, 8, 1))
    assert browser.one(".tip").text.splitlines() == ["gradient: inf", "step: 8", "layer: net.1"]
    browser.pointer(browser.place_of(figure, 5, 0))
    assert browser.one(".tip").text.splitlines() == ["gradient: 32", "step: 5", "layer: net.0"]
    quantity.select_by_value("parameter_norms: weight")
    browser.settle()
    figure = browser.figure(LAYERS)
    assert rgb("#D55E00") not in browser.ink(figure)[0]
    browser.pointer(browser.place_of(figure, 5, 1))
    assert browser.one(".tip").text.splitlines() == ["weight: 2", "step: 5", "layer: net.1"]
    before = browser.ink(figure)
    run.select_by_value("batch-slow")
    browser.settle()
    assert browser.ink(browser.figure(LAYERS)) != before  # without the alarm
    assert browser.messages() == []


@pytest.mark.slow
def test_a_narrow_window_shows_all_without_scrolling_sideways(browser: Browser, page: Path) -> None:
    browser.command("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    try:
        browser.open(page)
        browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
        for figure in browser.all("figure"):
            browser.run("arguments[0].scrollIntoView({block: 'center'})", figure)
            browser.until(lambda figure=figure: browser.all("canvas", figure))
            browser.settle()
            assert browser.one("canvas", figure).size["width"] <= 390
        assert browser.run("return document.scrollingElement.scrollWidth") <= 390
        assert browser.run("return innerWidth") == 390
        assert browser.messages() == []
    finally:
        browser.command("Emulation.clearDeviceMetricsOverride")


@pytest.mark.slow
def test_a_reader_of_dark_pages_has_one(browser: Browser) -> None:
    def brightness(selector: str, name: str) -> float:
        color = browser.one(selector).value_of_css_property(name)
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    figure = browser.figure(LOSS)
    light = browser.ink(figure)[0]
    assert brightness("body", "background-color") > 240 > 100 > brightness("body", "color")
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        browser.until(lambda: brightness("body", "background-color") < 40)
        assert brightness("body", "color") > 200
        figure = browser.figure(LOSS)
        dark = browser.ink(figure)[0]
        assert dark.get("232,232,232", 0) > 20  # the text of axes
        assert light.get("232,232,232", 0) < 20
        assert dark[rgb(COLORS[0])] > 20  # lines have their colours
        assert browser.messages() == []
    finally:
        browser.command("Emulation.setEmulatedMedia", features=[])


@pytest.mark.slow
def test_without_a_script_pictures_are_there(chromium: Browser, page: Path) -> None:
    """Asked of the browser itself, as no script runs in the page."""
    chromium.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.driver.get(page.as_uri())
        root = chromium.command("DOM.getDocument")["root"]["nodeId"]

        def nodes(selector: str) -> list[int]:
            found: list[int] = chromium.command("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
            return found

        assert nodes("canvas") == nodes("html.ready") == nodes("figure.alive") == nodes(".controls") == []
        pictures, figures = nodes("figure .static > svg"), nodes("figure")
        assert len(pictures) == len(figures) >= 8
        folded = nodes("details figure .static > svg")
        for picture in {*pictures} - {*folded}:
            model = chromium.command("DOM.getBoxModel", nodeId=picture)["model"]
            assert model["width"] > 600
            assert model["height"] > 200
        assert len(nodes("#runs tbody tr")) == 4
    finally:
        chromium.command("Emulation.setScriptExecutionDisabled", value=False)
    assert chromium.messages() == []


NAMES = ("</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'-alert(1)-'", "{{x}}]]>", "${1}\\")


@pytest.mark.slow
def test_names_with_markup_do_nothing_but_stand_there(chromium: Browser, tmp_path: Path) -> None:
    for i in range(len(NAMES)):
        write_run(tmp_path / f"{i}", f"norm{i}", 0.1, 1.0)
    runs = [replace(run, name=name) for run, name in zip(load_runs(tmp_path), NAMES, strict=True)]
    for run in runs:
        run.records["parameter_norms"].loc[:, "layer"] = run.name
    path = write_page(runs, tmp_path / "report.html")
    chromium.messages()
    chromium.open(path)
    assert {*rows(chromium)} == {*NAMES}
    figure = chromium.figure(LOSS)
    assert [button.text for button in chromium.all(".legend button", figure)] == [*NAMES]
    chromium.pointer(chromium.place_of(figure, 9, 1.0))
    assert chromium.one(".tip strong").text in NAMES
    assert chromium.all("img") == []
    assert len(chromium.all("script")) == 3
    figure = chromium.figure(LAYERS)
    assert {option.text for option in Select(chromium.all("select", figure)[0]).options} == {*NAMES}
    for number in range(len(NAMES)):
        chromium.all(".legend button", chromium.figure(LOSS))[number].click()
        chromium.until(lambda number=number: len(chromium.all("#runs tr.off")) == number + 1)
    assert chromium.messages() == []
