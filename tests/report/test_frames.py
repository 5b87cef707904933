"""Runs as data frames."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run, record

import normzoo
import normzoo.report
from normzoo.callbacks import GradientNorm
from normzoo.report.frames import Runs
from normzoo.report.logged import tidy
from normzoo.report.run import Run
from normzoo.report.settings import column, differing_settings

FIXED = ["run", "folder", "state", "error", "seconds", "last_step", "diverged_at", "not_finite_at", "seed"]


def point(folder: Path, norm: str, lr: float, seed: int, **more: Any) -> Path:
    recipe = f"seed: {seed}\nmodel: {{norm: {norm}}}\noptimizer: {{name: sgd, lr: {lr}}}\n"
    return make_run(folder / f"{norm}-{lr}-{seed}", recipe=recipe, tails=False, **more)


def log(folder: Path, name: str, hparams: str, metrics: str = "epoch,loss,step\n0,1.5,0\n") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "hparams.yaml").write_text(hparams)
    (folder / name / "metrics.csv").write_text(metrics)


def run_of(config: dict[str, Any], *rows: dict[str, float], of_recipe: bool = True) -> Run:
    return Run("r", config, {"state": "finished"}, {}, tidy(rows), {}, of_recipe=of_recipe)


def test_a_row_for_each_run(tmp_path: Path) -> None:
    point(tmp_path, "batch", 0.1, 0)
    point(tmp_path, "batch", 0.1, 1)
    folder = point(tmp_path, "none", 1.0, 0, diverged=7)
    (folder / "status.json").write_text('{"state": "diverged", "seconds": 3.0, "error": "the loss is NaN"}')
    runs = normzoo.load_runs(tmp_path)
    frame = runs.runs
    assert [*frame][: len(FIXED) + 2] == [*FIXED, "model.norm", "optimizer.lr"]
    assert runs.settings == ["model.norm", "optimizer.lr"]
    assert frame["run"].tolist() == ["batch-0.1-0", "batch-0.1-1", "none-1.0-0"]
    assert frame["folder"].tolist() == [str(tmp_path / name) for name in frame["run"]]
    assert frame["state"].tolist() == ["finished", "finished", "diverged"]
    assert frame["error"].tolist() == ["", "", "the loss is NaN"]
    assert frame["seconds"].tolist() == [12.4, 12.4, 3.0]
    assert frame["last_step"].tolist() == [9, 9, 9]
    assert frame["diverged_at"].isna().tolist() == [True, True, False]
    assert frame["diverged_at"].iloc[2] == 7
    assert frame["not_finite_at"].tolist() == [9, 9, 9]
    assert frame["seed"].tolist() == [0, 1, 0]
    assert frame["model.norm"].tolist() == ["batch", "batch", "none"]
    assert frame["optimizer.lr"].tolist() == [0.1, 0.1, 1.0]
    assert [*frame][len(FIXED) + 2 :] == [
        f"{metric} ({kind})"
        for metric in ("train/loss", "train/accuracy", "test/accuracy")
        for kind in ("last", "min", "max")
    ]
    assert frame["test/accuracy (max)"].tolist() == [0.75] * 3
    assert frame["test/accuracy (last)"].tolist() == [0.5] * 3
    assert frame["train/loss (last)"].isna().all()
    assert frame["train/loss (min)"].tolist() == [1.6] * 3
    assert frame["train/accuracy (last)"].tolist() == [math.inf] * 3
    assert frame["train/accuracy (max)"].tolist() == [0.4] * 3


def test_metrics_and_records_have_the_settings_in_front(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        folder = point(tmp_path, "batch", lr, 3)
        rows = [{"step": s, "optimizer": 0, "of": "", "norm": lr * s, "applied": 1.0} for s in range(3)]
        record(folder, "gradient_norm", *rows)
    runs = normzoo.load_runs(tmp_path)
    assert [*runs.metrics] == ["run", "seed", "optimizer.lr", "step", "epoch", "metric", "value"]
    for name, part in runs.metrics.groupby("run"):
        [run] = [run for run in runs if run.name == name]
        assert part.iloc[:, 3:].reset_index(drop=True).equals(run.metrics)
        assert part["optimizer.lr"].unique().tolist() == [run.config["optimizer"]["lr"]]
    assert {*runs.records} == {"gradient_norm", "relative_loss"}
    norms = runs.records["gradient_norm"]
    assert [*norms][:4] == ["run", "seed", "optimizer.lr", "step"]
    assert norms["norm"].tolist() == [0.0, 0.1, 0.2, 0.0, 0.2, 0.4]
    assert norms.attrs["quantity"] == "gradient_norm"
    assert "norm" in norms.attrs["meaning"]
    losses = runs.records["relative_loss"]
    assert losses["multiples"].map(list).tolist() == [[0.0, 0.5, 1.0]] * 2  # a curve in a cell
    assert losses["lr"].tolist() == [0.1, 0.1]


def test_a_record_that_some_runs_lack(tmp_path: Path) -> None:
    record(point(tmp_path, "batch", 0.1, 0), "gradient_norm", {"step": 0, "optimizer": 0, "of": "", "norm": 1.0})
    point(tmp_path, "batch", 0.2, 0)
    record(point(tmp_path, "batch", 0.3, 0), "gradient_norm")  # without a sample
    norms = normzoo.load_runs(tmp_path).records["gradient_norm"]
    assert norms[["run", "norm"]].values.tolist() == [["batch-0.1-0", 1.0]]


def test_a_setting_that_is_named_as_a_column_is_told_apart(tmp_path: Path) -> None:
    rows = {"step": 0, "lr": 0.5, "multiples": [1.0], "relative": [1.0]}
    for version, lr in enumerate((0.1, 0.2)):
        log(tmp_path, f"version_{version}", f"lr: {lr}\nname: n{version}\nvalue: {version}\nstep: {version}\n")
        path = record(tmp_path / f"version_{version}", "relative_loss", rows)
        path.rename(tmp_path / f"version_{version}" / path.name)
        (tmp_path / f"version_{version}" / "metrics").rmdir()
    runs = normzoo.load_runs(tmp_path)
    assert runs.settings == ["lr", "name", "recipe.value", "recipe.step"]
    assert runs.metrics["recipe.value"].tolist() == [0, 1]
    assert runs.metrics["value"].tolist() == [1.5, 1.5]
    assert runs.runs["name"].tolist() == ["n0", "n1"]
    losses = runs.records["relative_loss"]
    assert [*losses][:5] == ["run", "recipe.lr", "name", "recipe.value", "recipe.step"]
    assert losses[["recipe.lr", "lr"]].values.tolist() == [[0.1, 0.5], [0.2, 0.5]]


def test_metrics_of_measurements_come_last(tmp_path: Path) -> None:
    log(tmp_path, "a", "{}", "gradient_norm/norm,loss,step\n1.0,2.0,0\n")
    runs = normzoo.load_runs(tmp_path)
    assert [*runs.runs][len(FIXED) :: 3] == ["loss (last)", "gradient_norm/norm (last)"]
    assert runs.comparison.metrics == ["loss", "gradient_norm/norm"]


def test_a_folder_of_a_watched_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for folder in (None, tmp_path / "own"):
        with normzoo.watch(model, optimizer, GradientNorm(), dirpath=folder):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 3)).square().mean().backward()
                optimizer.step()
    runs = normzoo.load_runs(tmp_path)
    assert runs.runs["run"].tolist() == ["version_0", "own"]
    assert runs.records["gradient_norm"].groupby("run")["step"].nunique().tolist() == [3, 3]
    assert len(runs.metrics) == 0


def test_runs_without_metrics_records_and_settings(tmp_path: Path) -> None:
    log(tmp_path, "a", "{}", "")
    log(tmp_path, "b", "{}", "")
    runs = normzoo.load_runs(tmp_path)
    assert [*runs.runs] == FIXED
    assert runs.runs["state"].tolist() == ["unknown", "unknown"]
    assert runs.runs["seconds"].isna().all()
    assert [*runs.metrics] == ["run", "step", "epoch", "metric", "value"]
    assert len(runs.metrics) == 0
    assert runs.records == {}
    one = normzoo.load_runs(tmp_path / "a")
    assert (len(one), len(one.runs), one[0].name, repr(one)) == (1, 1, "a", "<1 runs: a>")


def test_a_damaged_run_is_named_or_left_out(tmp_path: Path) -> None:
    point(tmp_path, "batch", 0.1, 0)
    folder = point(tmp_path, "batch", 0.2, 0)
    (folder / "status.json").write_text("{")
    with pytest.raises(ValueError, match=r"status\.json is damaged"):
        normzoo.load_runs(tmp_path)
    runs = normzoo.load_runs(tmp_path, skip_damaged=True)
    assert runs.runs["run"].tolist() == ["batch-0.1-0"]
    [damaged] = runs.damaged
    assert damaged.name == "batch-0.2-0"
    with pytest.raises(TypeError, match="one or several folders"):
        normzoo.load_runs()
    with pytest.raises(ValueError, match="no runs in"):
        normzoo.load_runs(tmp_path / "nothing")


def test_the_runs_are_a_sequence_too(tmp_path: Path) -> None:
    for seed in range(4):
        point(tmp_path, "batch", 0.1, seed)
    runs = normzoo.load_runs(tmp_path)
    assert [run.name for run in runs[1:3]] == ["batch-0.1-1", "batch-0.1-2"]
    assert runs[-1] in runs
    assert repr(runs) == "<4 runs: batch-0.1-0, batch-0.1-1, batch-0.1-2, …>"
    assert normzoo.report.load_runs is normzoo.load_runs


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b/c", "d"]), st.floats()), max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_ends_are_those_of_a_search_by_hand(logged: list[list[tuple[int, str, float]]]) -> None:
    runs = Runs([run_of({}, *({"step": s, m: v} for s, m, v in rows)) for rows in logged])
    frame = runs.runs
    names = {m for rows in logged for _, m, _ in rows}
    assert {*frame} == {*FIXED} | {f"{m} ({kind})" for m in names for kind in ("last", "min", "max")}
    for place, rows in enumerate(logged):
        for name in names:
            values = [v for _, m, v in rows if m == name]
            finite = [v for v in values if math.isfinite(v)]
            expected = (
                values[-1] if values else math.nan,
                min(finite, default=math.nan),
                max(finite, default=math.nan),
            )
            found = [frame.loc[place, f"{name} ({kind})"] for kind in ("last", "min", "max")]
            assert np.array_equal(found, expected, equal_nan=True)


def test_what_only_recipes_have_does_not_differ_from_other_logs() -> None:
    recipes = [run_of({"seed": s, "model": {"norm": "batch"}, "lr": 0.1}) for s in range(2)]
    logs = [run_of({"lr": lr, "width": 8, "random_seed": 1}, of_recipe=False) for lr in (0.1, 0.1)]
    nothing = run_of({}, of_recipe=False)
    assert differing_settings([*recipes, *logs, nothing]) == []
    other = run_of({"lr": 0.3, "width": 8}, of_recipe=False)
    assert differing_settings([*recipes, *logs, nothing, other]) == ["lr"]
    assert differing_settings([*recipes, run_of({"model": {"norm": {"name": "group", "groups": 4}}})]) == [
        "model.norm",
        "lr",
        "model.norm.groups",
    ]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2], "int64", [1, 2]),
        ([1, None], "Int64", [1, pd.NA]),
        ([1, 0.5, None], "float64", [1.0, 0.5, math.nan]),
        ([True, False], "bool", [True, False]),
        ([True, None], "object", [True, None]),
        ([1, "a"], "object", [1, "a"]),
        ([2**64, 1], "object", [2**64, 1]),
        ([], "object", []),
    ],
)
def test_columns_of_settings(values: list[Any], dtype: str, expected: list[Any]) -> None:
    made = column(values)
    assert str(made.dtype) == dtype
    assert all(a is b or a == b or (a != a and b != b) for a, b in zip(made.tolist(), expected, strict=True))


def test_frames_need_no_torch(tmp_path: Path) -> None:
    point(tmp_path, "batch", 0.1, 0)
    code = (
        "import sys, normzoo\n"
        "runs = normzoo.load_runs(sys.argv[1])\n"
        "print(len(runs.metrics), *runs.records, *({'torch', 'lightning', 'tensorboard'} & sys.modules.keys()))"
    )
    printed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["14", "relative_loss"]
