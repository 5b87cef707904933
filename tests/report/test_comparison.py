"""Curves with bands, where runs end, and that against what differs among them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import normzoo
from normzoo._errors import UnknownNameError
from normzoo.report.comparison import OUTCOMES, Comparison, outcome
from normzoo.report.csv_files import write_csv
from normzoo.report.independent import axes_of
from normzoo.report.logged import tidy
from normzoo.report.run import Run

VALUE = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


def run_of(config: Mapping[str, Any], *rows: Mapping[str, float], state: str = "finished", **more: Any) -> Run:
    alarm = more.pop("alarm", None)
    records = {} if alarm is None else {"divergence": pd.DataFrame([{"step": alarm}])}
    name = ",".join(f"{key}={value}" for key, value in config.items())
    return Run(name, {**config}, {"state": state}, {}, tidy(rows), records, **more)


def curve(values: Sequence[float], metric: str = "acc") -> list[dict[str, float]]:
    return [{"step": step, metric: value} for step, value in enumerate(values)]


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)


def check(row: Any, values: Sequence[float]) -> None:
    """The statistics of a row are those of the values."""
    n = len(values)
    assert row.n == n
    assert same(row.mean, statistics.fmean(values) if n else math.nan)
    assert same(row.spread, statistics.stdev(values) if n > 1 else math.nan)
    assert same(row.low, min(values, default=math.nan))
    assert same(row.high, max(values, default=math.nan))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.integers(0, 3)),
        st.lists(st.tuples(st.integers(0, 6), VALUE), max_size=7),
        min_size=1,
        max_size=6,
    )
)
def test_curves_are_those_of_a_search_by_hand(logged: dict[tuple[str, int], list[tuple[int, float]]]) -> None:
    runs = [
        run_of({"norm": norm, "seed": seed}, *({"step": s, "acc": v} for s, v in rows))
        for (norm, seed), rows in logged.items()
    ]
    comparison = Comparison(runs)
    if not any(logged.values()):
        with pytest.raises(UnknownNameError):
            comparison.curves("acc")
        return
    table = comparison.curves("acc")
    found = {(row.group, row.step): row for row in table.itertuples()}
    assert len(found) == len(table)
    expected = 0
    for group in comparison.groups:
        of_group = [logged[run.config["norm"], run.config["seed"]] for run in group.runs]
        for step in {s for rows in of_group for s, _ in rows}:
            finite = [[v for s, v in rows if s == step and math.isfinite(v)] for rows in of_group]
            check(found[group.label, step], [statistics.fmean(values) for values in finite if values])
            assert found[group.label, step].runs == len(group.runs)
            expected += 1
    assert len(table) == expected
    for _, part in table.groupby("group"):
        assert part["step"].is_monotonic_increasing


def test_a_run_that_ends_early_leaves_the_band() -> None:
    runs = [
        run_of({"seed": 0}, *curve([1.0, 2.0, 3.0])),
        run_of({"seed": 1}, *curve([2.0])),
        run_of({"seed": 2}, *curve([3.0, 4.0, math.nan]), alarm=2),
    ]
    table = Comparison(runs).curves("acc")
    assert [*table] == ["group", "step", "mean", "spread", "low", "high", "n", "runs"]
    assert table["n"].tolist() == [3, 2, 1]
    assert table["runs"].tolist() == [3, 3, 3]
    assert table["mean"].tolist() == [2.0, 3.0, 3.0]
    assert table["spread"].iloc[0] == 1.0
    assert math.isnan(table["spread"].iloc[2])
    assert table.dtypes[["step", "n", "runs"]].tolist() == [np.int64] * 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.lists(VALUE, max_size=4),
            st.sampled_from(["finished", "failed", "diverged", "interrupted", "running"]),
            st.sampled_from([None, None, 3]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["last", "min", "max"]),
)
def test_every_run_counts_once_and_ends_are_those_of_a_search_by_hand(
    made: list[tuple[str, list[float], str, int | None]], kind: str
) -> None:
    runs = [
        run_of({"norm": norm, "seed": seed}, {"step": 0, "other": 1.0}, *curve(values), state=state, alarm=alarm)
        for seed, (norm, values, state, alarm) in enumerate(made)
    ]
    comparison = Comparison(runs)
    if not any(values for _, values, _, _ in made):
        return
    table = comparison.ends("acc", kind)
    assert (table["runs"] == table[["n", *OUTCOMES]].sum(axis=1)).all()
    assert table["runs"].sum() == len(runs)
    for row, group in zip(table.itertuples(), comparison.groups, strict=True):
        ends = []
        for run in group.runs:
            _, values, state, alarm = made[run.config["seed"]]
            finite = [v for v in values if math.isfinite(v)]
            if state == "finished" and alarm is None and finite and (kind != "last" or math.isfinite(values[-1])):
                ends.append({"last": values[-1], "min": min(finite), "max": max(finite)}[kind])
        check(row, ends)
        of_group = [made[run.config["seed"]] for run in group.runs]
        assert row.diverged == sum(state == "diverged" or alarm is not None for _, _, state, alarm in of_group)
        assert row.failed == sum(state == "failed" and alarm is None for _, _, state, alarm in of_group)
        assert row.unfinished == sum(s in ("interrupted", "running") and a is None for _, _, s, a in of_group)


def test_a_loss_that_ended_as_nan_counts_as_diverged_where_nobody_watched() -> None:
    lost = run_of({"seed": 0}, {"step": 0, "loss": 1.0, "acc": 0.5}, {"step": 1, "loss": math.nan, "acc": 0.1})
    assert outcome(lost, 0.1) == "diverged"
    watched = run_of({"callbacks": ["divergence"]}, {"step": 1, "loss": math.nan, "acc": 0.1})
    assert outcome(watched, 0.1) is None
    log = run_of({"lr": 1}, {"step": 0, "val_loss": math.inf}, {"step": 1, "val_loss": 1.0}, of_recipe=False)
    assert outcome(log, 1.0) is None  # it came back
    assert outcome(log, None) == "missing"


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"kind": "exception", "step": 3, "error": "ValueError: no"}, "failed"),
        ({"kind": "signal", "step": 3}, "unfinished"),
        ({"kind": "exception", "step": 0, "error": "ValueError: no"}, None),  # it went on to step 1
        ({"kind": "divergence", "step": 1}, None),
    ],
)
def test_a_log_tells_by_a_capsule_that_it_was_cut_short(about: dict[str, Any], expected: str | None) -> None:
    capsule = SimpleNamespace(about=about)
    records = {"gradient_norm": pd.DataFrame({"step": [0, 1]})}
    log = Run("r", {}, {}, {}, tidy(curve([0.5])), records, [capsule], of_recipe=False)  # type: ignore[list-item]
    assert (log.trouble, outcome(log, 0.5), log.completed) == (expected, expected, expected is None)


def researcher(folder: Path) -> dict[tuple[str, int, int], list[float]]:
    """Logs of three norms and a layer of one's own, at three batch sizes, with three seeds; some of them diverge."""
    ends = {}
    points = itertools.product(("batch", "group", "layer", "mine.Mine"), (2, 8, 128), range(3))
    for version, (norm, size, seed) in enumerate(points):
        path = folder / "lightning_logs" / f"version_{version}"
        path.mkdir(parents=True)
        options = "norm_groups: 4\n" if norm == "group" else ""
        path.joinpath("hparams.yaml").write_text(f"batch_size: {size}\nnorm: {norm}\nseed: {seed}\nwidth: 8\n{options}")
        values = [0.5 + version / 100, 0.6 + version / 100 + seed / 10]
        loss = "nan" if (norm, size) == ("batch", 2) and seed else "1.0"
        rows = [f"{step},{step},,{value!r}\n{step},{step},{loss}," for step, value in enumerate(values)]
        path.joinpath("metrics.csv").write_text("\n".join(["epoch,step,train_loss,val_acc", *rows, ""]))
        ends[norm, size, seed] = values
    return ends


def test_norms_over_batch_sizes_with_seeds(tmp_path: Path) -> None:
    ends = researcher(tmp_path)
    runs = normzoo.load_runs(tmp_path)
    comparison = runs.comparison
    assert [(axis.key, axis.numeric, axis.values, axis.along) for axis in comparison.axes] == [
        ("batch_size", True, [2, 8, 128], ()),
        ("norm", False, ["batch", "group", "layer", "mine.Mine"], ("norm_groups",)),
    ]
    table = comparison.against("batch_size", "val_acc")
    assert [*table] == [
        *("batch_size", "norm", "norm_groups", "group", "runs", "n", "mean", "spread", "low", "high"),
        *OUTCOMES,
    ]
    norms = ("batch", "group", "layer", "mine.Mine")
    assert table[["norm", "batch_size"]].values.tolist() == [[n, s] for n in norms for s in (2, 8, 128)]
    assert table["norm_groups"].dropna().tolist() == [4, 4, 4]
    for row in table.itertuples():
        lost = row.norm == "batch" and row.batch_size == 2
        check(row, [ends[row.norm, row.batch_size, seed][-1] for seed in range(1 if lost else 3)])
        assert (row.runs, row.diverged, row.missing) == (3, 2 if lost else 0, 0)
    by_norm = comparison.against("norm", "val_acc", "max")
    assert by_norm[["batch_size", "norm"]].values.tolist() == [[s, n] for s in (2, 8, 128) for n in norms]
    assert [*by_norm][:3] == ["norm", "norm_groups", "batch_size"]
    curves = comparison.curves("val_acc")
    assert len(curves) == 12 * 2
    assert curves["n"].unique().tolist() == [3]
    assert len(runs.metrics) == 36 * 4
    assert len(runs.runs) == 36
    paths = write_csv(runs, tmp_path / "csv")
    assert [path.name for path in paths] == ["runs.csv", "metrics.csv"]
    read = pd.read_csv(paths[1], float_precision="round_trip")
    read = read[read["metric"] == "val_acc"].drop_duplicates("run", keep="last")
    by_hand = read.groupby(["norm", "batch_size"])["value"].agg(["mean", "std"])
    for row in table.itertuples():
        if row.diverged == 0:
            assert same(row.mean, by_hand.loc[(row.norm, row.batch_size), "mean"])
            assert same(row.spread, by_hand.loc[(row.norm, row.batch_size), "std"])


def test_what_there_is_not_is_named_with_what_is_near() -> None:
    comparison = Comparison([run_of({"lr": lr, "seed": 0}, *curve([0.5])) for lr in (1, 2)])
    with pytest.raises(UnknownNameError, match=r"'ac' is not a known metric of these runs; did you mean 'acc'\?"):
        comparison.curves("ac")
    with pytest.raises(UnknownNameError, match="'mean' is not a known value"):
        comparison.ends("acc", "mean")
    with pytest.raises(UnknownNameError, match="'norm' is not a known setting in which the runs differ"):
        comparison.against("norm", "acc")


def test_settings_that_are_named_as_statistics_are_told_apart() -> None:
    comparison = Comparison([run_of({"n": n, "opt": {"mean": 1}, "seed": 0}, *curve([n / 2])) for n in (2, 1)])
    table = comparison.against("n", "acc")
    assert table[["recipe.n", "n", "mean"]].values.tolist() == [[1, 1, 0.5], [2, 1, 1.0]]
    assert comparison.axis("recipe.n") == comparison.axis("n")


def keys(*settings: Mapping[str, Any], sweep: Mapping[str, Any] | None = None) -> list[tuple[str, ...]]:
    return [(axis.key, *axis.along) for axis in axes_of(settings, [sweep or {}] * len(settings))]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def test_axes_of_a_grid() -> None:
    assert keys(*grid(norm="abc", lr=[1, 2], x=[1, 2])) == [("norm",), ("lr",), ("x",)]
    assert keys(*grid(norm="abc", lr=[1, 2]), sweep={"lr": [], "norm": []}) == [("lr",), ("norm",)]
    assert keys(*grid(norm="abc", lr=[1, 2])[:3]) == [("norm",), ("lr",)]  # a part of it
    assert keys() == []
    assert keys({}) == []


def test_what_moves_along_is_no_axis() -> None:
    norms = [{"m.norm": "a"}, {"m.norm": "b", "m.norm.groups": 4}, {"m.norm": "c", "m.norm.eps": 1}]
    assert keys(*norms) == [("m.norm", "m.norm.groups", "m.norm.eps")]
    crossed = [{**norm, "lr": lr} for norm in norms for lr in (1, 2)]
    assert keys(*crossed) == [("m.norm", "m.norm.groups", "m.norm.eps"), ("lr",)]
    groups = [{"norm": "a"}, {"norm": "b", "norm.groups": 4}, {"norm": "b", "norm.groups": 8}]
    assert keys(*groups) == [("norm.groups",)]
    rates = [{"epochs": 1, "lr": 0.1}, {"epochs": 2, "lr": 0.01}, {"epochs": 2, "lr": 0.001}]
    crossed = [{**rate, "norm": norm} for rate in rates for norm in "ab"]
    assert keys(*crossed) == [("lr", "epochs"), ("norm",)]
    assert keys(*rates) == [("lr",)]  # at 2 epochs: too little to tell
    assert keys(*rates, sweep={"lr, epochs": []}) == [("lr", "epochs")]
    assert keys({"norm": "a", "lr": 1}, {"norm": "b", "lr": 2}) == [("norm", "lr")]


def test_rates_at_random_do_not_hide_the_norm() -> None:
    drawn = [{"lr": 0.1 * i, "norm": "ab"[i % 2], "decay": i**2} for i in range(6)]
    assert keys(*drawn) == [("lr", "decay")]
    assert [axis.label for axis in Comparison([run_of(d) for d in drawn]).axes] == ["lr"]


def test_text_that_names_the_run_is_no_axis() -> None:
    named = [{"exp": f"e{i}", **point} for i, point in enumerate(grid(norm="ab", lr=[1, 2]))]
    assert keys(*named) == [("norm",), ("lr",)]
    assert keys({"norm": "a"}, {"norm": "b"}) == [("norm",)]
    options = [{"norm": "a", "groups": 32, "eps": 0}, {"norm": "b", "groups": 4, "eps": 0}]
    assert keys(*options, {"norm": "c", "groups": 32, "eps": 1}) == [("norm", "groups", "eps")]
    assert keys(*grid(a=[1, 2], b=[1, 2])[1:3]) == [("a", "b")]


def test_a_short_name_tells_which_setting_is_meant() -> None:
    runs = [
        run_of({"a": {"eps": e}, "b": {"eps": f}, "o": {"lr": r}, "seed": 0})
        for e, f, r in [(1, 1, 1), (2, 1, 2), (1, 2, 2)]
    ]
    comparison = Comparison(runs)
    assert comparison.axis("lr").key == "o.lr"
    assert comparison.axis("a.eps").key == "a.eps"
    with pytest.raises(UnknownNameError):
        comparison.axis("eps")
