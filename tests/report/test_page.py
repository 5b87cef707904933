"""What the file of a page holds: a policy, pictures, data, and names that stay text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from report_pages import Page
from report_runs import make_run, record

from normzoo.report import load_runs, write_page
from normzoo.report.figures import draw
from normzoo.report.runs import Run

NAMES = ("</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'", "{{x}}", "]]>", "${data}", "<!--")


def rows() -> list[dict[str, object]]:
    return [
        {
            "step": s,
            "layer": f"net.{i}",
            "depth": i,
            "dimensions": 2,
            "optimizer": 0,
            "nonfinite": 0,
            "weight": 1.0 + i,
            "relative_update": 0.01,
            "gradient": math.inf if (s, i) == (3, 1) else 2.0**s,
        }
        for s in range(4)
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """With names that would end an element, an attribute or a script."""
    folder = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(NAMES):
        recipe = f"callbacks: [{{name: divergence}}]\nmodel: {json.dumps({'norm': name})}\n"
        run = make_run(folder / f"{i}", recipe=recipe, tails=False, diverged=5 if i == 4 else None)
        record(run, "parameter_norms", *rows())
    return [
        replace(run, name=name, status={**run.status, "state": state})
        for run, name, state in zip(load_runs(folder), NAMES, ["finished", "failed", *["finished"] * 5], strict=True)
    ]


@pytest.fixture(scope="module")
def page(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_page(runs, tmp_path_factory.mktemp("page") / "report.html"))


def test_the_policy_names_the_scripts_and_allows_nothing_else(page: Page) -> None:
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["img-src"] == "data:"
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert directives["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert len(run) == 2
    assert {*directives} == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}


def test_nothing_is_loaded(page: Page) -> None:
    assert page.loads == []
    assert not re.search(r"@import|url\(", page.styles)
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    addresses = [(name, value) for _, name, value in page.attributes if re.match(r"(https?:)?//|javascript:", value)]
    assert {name for name, _ in addresses} <= {"xmlns", "xmlns:xlink"}
    for _, text in page.scripts[2:]:
        assert not re.search(
            r"\bfetch\(|XMLHttpRequest|import\(|WebSocket|eval\(|new Function|innerHTML|document\.write", text
        )


def test_names_cannot_get_out_of_their_places(page: Page) -> None:
    assert [attributes.get("id") for attributes, _ in page.scripts] == ["data", None, None]
    assert "img" not in page.tags
    groups = [value for tag, name, value in page.attributes if (tag, name) == ("tr", "data-group")]
    assert {*groups} == {*NAMES}
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == page.tags.count("figure")
    assert "alert(1)" not in page.scripts[2][1]


def test_each_figure_is_there_without_a_script(page: Page, runs: list[Run]) -> None:
    figures = page.tags.count("figure")
    assert figures == len(draw(runs)) + 1  # and that of every layer
    assert page.tags.count("svg") == figures
    charts = page.data["charts"]
    ids = [value for tag, name, value in page.attributes if (tag, name) == ("figure", "id")]
    assert [chart["id"] for chart in charts] == ids
    assert len({*ids}) == figures


def test_the_data_hold_what_the_charts_hold(page: Page, runs: list[Run]) -> None:
    by_title = {chart["title"]: chart for chart in page.data["charts"]}
    for title, chart in draw(runs).items():
        shown = by_title[title]
        assert [entry["label"] for entry in shown["legend"]][: len(chart.legend())] == [m.label for m in chart.legend()]
        assert shown["steps"] == chart.over_steps
        first = 0
        for k, panel in enumerate(chart.panels):
            assert (shown["panels"][k]["x"], shown["panels"][k]["y"]) == (panel.x.label, panel.y.label)
            [columns] = [data["columns"] for data in shown["spec"]["data"] if data["name"] == f"p{k}"] or [None]
            for place, series in enumerate(panel.series):
                mine = np.array(columns["s"]) == first + place
                y = np.array([math.nan if y is None else y for y in columns["y"]])[mine]
                expected = np.where(np.isfinite(series.y), series.y, math.nan)
                expected = np.where(expected > 0, expected, math.nan) if panel.y.scale == "log" else expected
                np.testing.assert_allclose(y, expected, rtol=1e-4)
                np.testing.assert_allclose(np.array(columns["x"], dtype=float)[mine], series.x, rtol=1e-4)
            first += len(panel.series)
        [styles] = [signal["value"] for signal in shown["spec"]["signals"] if signal["name"] == "S"]
        every = [series for panel in chart.panels for series in panel.series]
        assert [(s["label"], s["run"], s["color"]) for s in styles] == [(s.label, s.run, s.color) for s in every]
    assert page.data["groups"] == [*NAMES]
    [axis] = page.data["axes"]
    assert axis == {"name": "norm", "values": dict(zip(NAMES, NAMES, strict=True))}
    maps = [one for one in page.data["maps"] if one["quantity"] == "parameter_norms: gradient"]
    assert {one["run"] for one in maps} == {*NAMES}
    assert maps[0]["z"] == [[1, 2, 4, 8], [1, 2, 4, "inf"]]
    assert [page.data["rowNames"][one["names"]] for one in maps] == [["net.0", "net.1"]] * len(NAMES)


def test_runs_that_failed_or_diverged_stand_first(page: Page) -> None:
    states = [value for tag, name, value in page.attributes if (tag, name) == ("tr", "class")]
    groups = [value for tag, name, value in page.attributes if (tag, name) == ("tr", "data-group")]
    assert states[0] == "failed"
    assert groups == [NAMES[1], NAMES[4], *(name for i, name in enumerate(NAMES) if i not in (1, 4))]
