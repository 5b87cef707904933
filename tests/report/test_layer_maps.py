"""Heat maps of every layer over the steps of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import is_odd, pixels

from normzoo.report.layer_maps import LayerMap, layer_maps, page_data
from normzoo.report.logged import tidy
from normzoo.report.runs import Run


def run(name: str = "run", alarm: int | None = None, **records: pd.DataFrame) -> Run:
    alarms = {} if alarm is None else {"divergence": pd.DataFrame([{"step": alarm, "loss": 1e9, "value": 1e9}])}
    return Run(name, {}, {"state": "finished"}, {}, tidy([]), {**alarms, **records})


def frame(steps: int, layers: int = 3, **columns: Any) -> pd.DataFrame:
    rows = [
        {"step": s, "layer": f"net.{i}", "norm": 1.0 + i + s, **columns} for s in range(steps) for i in range(layers)
    ]
    return pd.DataFrame(rows)


def layer_map(z: np.ndarray, there: np.ndarray | None = None) -> LayerMap:
    there = np.ones(z.shape, dtype=bool) if there is None else there
    names = tuple(f"net.{i}" for i in range(len(z)))
    return LayerMap("run", "record: z", "z", np.arange(z.shape[1]) * 10, names, "layer", z, there, None)


def test_each_layer_and_each_column_of_numbers_of_a_record_is_there() -> None:
    values = frame(4).assign(other=lambda rows: -rows["norm"], depth=3, text="a")
    maps = {one.quantity: one for one in layer_maps([run(norms=values)])}
    assert {*maps} == {"norms: norm", "norms: other"}
    norm = maps["norms: norm"]
    assert (norm.run, norm.axis, norm.label, norm.alarm) == ("run", "layer", "norm", None)
    assert norm.names == ("net.0", "net.1", "net.2")
    assert norm.steps.tolist() == [0, 1, 2, 3]
    assert norm.z.tolist() == [[1.0 + i + s for s in range(4)] for i in range(3)]
    assert norm.there.all()
    assert maps["norms: other"].z.tolist() == (-norm.z).tolist()


def test_rows_that_differ_in_text_are_maps_of_their_own_and_of_a_cell_the_last_row_counts() -> None:
    parts = [
        frame(2).assign(of=of, norm=lambda rows, k=k: rows["norm"] * k)
        for of, k in (("gradient", 1.0), ("update", 9.0))
    ]
    values = pd.concat([*parts, parts[0].assign(norm=77.0)[:1]], ignore_index=True)
    maps = {one.quantity: one for one in layer_maps([run(norms=values)])}
    assert {*maps} == {"norms: norm (gradient)", "norms: norm (update)"}
    assert maps["norms: norm (gradient)"].z[0].tolist() == [77.0, 2.0]
    assert maps["norms: norm (update)"].z[2].tolist() == [27.0, 36.0]


def test_cells_without_a_row_are_not_there_and_those_that_are_not_finite_are() -> None:
    values = frame(3)
    values.loc[4, "norm"] = math.inf
    values.loc[5, "norm"] = math.nan
    [one] = layer_maps([run(norms=values.drop(index=0))])
    assert one.names == ("net.1", "net.2", "net.0")
    assert one.there.tolist() == [[True] * 3, [True] * 3, [False, True, True]]
    assert one.z[0, 1] == math.inf
    assert math.isnan(one.z[1, 1])
    [shown] = page_data([one])["maps"]
    assert shown["z"] == [[2.0, "inf", 4.0], [3.0, "nan", 5.0], [None, 2.0, 3.0]]
    json.dumps(page_data([one]), allow_nan=False)


def test_records_of_one_step_or_without_layers_have_no_map_and_the_run_with_an_alarm_comes_first() -> None:
    runs = [
        run("one step", norms=frame(1)),
        run("no layers", norms=frame(4).drop(columns="layer")),
        run("empty", norms=frame(4)[:0]),
        run("nothing finite", norms=frame(3).assign(norm=math.nan)),
        run("well", norms=frame(3), gradient_norm=frame(3)),
        run("bad", 2, norms=frame(3)),
    ]
    maps = layer_maps(runs)
    assert [(one.run, one.quantity, one.alarm) for one in maps] == [
        ("bad", "norms: norm", 2),
        ("well", "gradient_norm: norm", None),
        ("well", "norms: norm", None),
    ]
    chart = maps[0].chart()
    [panel] = chart.panels
    assert panel.title == "bad, alarm at step 2"
    assert [(rule.at, rule.along, rule.outlined) for rule in panel.rules] == [(2, "x", True)]
    assert panel.y.names == maps[0].names
    assert panel.x.domain == (-0.5, 2.5)
    assert chart.over_steps
    assert maps[1].chart().panels[0].rules == ()
    assert [shown["alarm"] for shown in page_data(maps)["maps"]] == [2, None, None]
    assert layer_maps([]) == []


CELLS = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_thinned_map_is_that_of_a_loop_over_cells(rows: int, columns: int, most: int, data: st.DataObject) -> None:
    """Of each stretch of steps the value farthest from the layer's median; first of all one that is not finite."""
    z = np.array(data.draw(st.lists(CELLS, min_size=rows * columns, max_size=rows * columns))).reshape(rows, columns)
    there = np.array(data.draw(st.lists(st.booleans(), min_size=z.size, max_size=z.size))).reshape(z.shape)
    thinned = layer_map(z, there).thinned(most)
    if columns <= most:
        assert np.array_equal(thinned.z, z, equal_nan=True)
        return
    stretches = np.array_split(range(columns), most)
    assert thinned.z.shape == thinned.there.shape == (rows, most)
    assert thinned.steps.tolist() == [10 * part[0] for part in stretches]
    for i in range(rows):
        finite = sorted(z[i, j] for j in range(columns) if there[i, j] and math.isfinite(z[i, j]))
        half = len(finite) // 2
        median = (finite[half] + finite[-half - 1]) / 2 if finite else math.nan
        for k, part in enumerate(stretches):
            values = [z[i, j] for j in part if there[i, j]]
            kept = thinned.z[i, k]
            assert bool(thinned.there[i, k]) == bool(values)
            if not values:
                continue
            if all(map(math.isfinite, values)):
                assert kept in values
                assert abs(kept - median) == pytest.approx(max(abs(value - median) for value in values), abs=1e-9)
            else:
                assert not math.isfinite(kept)


def test_of_many_steps_one_cell_that_is_not_finite_and_one_spike_are_seen() -> None:
    values = frame(3000, layers=20)
    rows = len(values)
    values["norm"] = 1.0 + np.arange(rows) % 7 / 10
    values.loc[20 * 1234 + 7, "norm"] = math.nan
    values.loc[20 * 2345 + 3, "norm"] = 1e6
    [one] = layer_maps([run(norms=values)])
    assert one.z.shape[0] == 20
    assert 8 <= one.z.shape[1] <= 96
    assert np.argwhere(~np.isfinite(one.z)).tolist() == [[7, int(np.searchsorted(one.steps, 1234, "right")) - 1]]
    assert np.argwhere(one.z == 1e6).tolist() == [[3, int(np.searchsorted(one.steps, 2345, "right")) - 1]]
    panel = one.chart().panels[0]
    assert panel.cells is not None
    assert is_odd(pixels(panel.cells, panel)).any()


def test_a_page_of_many_maps_has_fewer_columns_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normzoo.report.layer_maps._MOST_CELLS", 4000)
    maps = layer_maps([run(f"{i}", norms=frame(50, layers=20)) for i in range(6)])
    assert {one.z.shape for one in maps} == {(20, 33)}  # 4000 cells in all
    data = page_data(maps)
    assert len(data["rowNames"]) == 1  # which all have
    assert {shown["names"] for shown in data["maps"]} == {0}


def test_each_map_says_its_colours() -> None:
    cases = [
        ([1.0, 1.5], "linear"),
        ([1.0, 100.0], "log"),
        ([-1.0, 0.0, 1.0], "linear"),
        ([-1e6, 1e-3, 1e-3], "signed log"),
    ]
    for values, scale in cases:
        one = layer_map(np.array([values]))
        assert one.colors.axis.scale == scale
        [shown] = page_data([one])["maps"]
        assert shown["scale"] == scale
        assert shown["ends"] == pytest.approx([min(values), max(values)])
        assert shown["ticks"] == one.colors.axis.ticks
    assert page_data([layer_map(np.full((2, 2), 3.0))])["maps"][0]["ends"] == [1.5, 4.5]
