"""The printed table of runs, and the command's files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run

import normzoo
from normzoo._errors import UnknownNameError
from normzoo.cli.main import main
from normzoo.report import summary_rows, write_page
from normzoo.report.comparison import Comparison
from normzoo.report.csv_files import write_csv
from normzoo.report.frames import Runs
from normzoo.report.logged import tidy
from normzoo.report.overview import Overview, fitted, overview
from normzoo.report.run import Run

NO_FIGURES = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page takes longer than all else."""

    def write(runs: Any, target: Path, damaged: Any = ()) -> Path:
        target.write_text(f"{len(runs)} runs")
        return target

    monkeypatch.setattr("normzoo.cli.report.write_page", write)


def run_of(name: str, config: Mapping[str, Any], acc: float | None = None, loss: float = 1.0, **more: Any) -> Run:
    alarm, state = more.pop("alarm", None), more.pop("state", "finished")
    records = {} if alarm is None else {"divergence": pd.DataFrame([{"step": alarm}])}
    rows = [{"step": 0, "train/loss": loss}] + ([] if acc is None else [{"step": 0, "test/accuracy": acc}])
    return Run(name, {**config}, {"state": state, "seconds": 10.0}, {}, tidy(rows), records, **more)


def sweep(norms: Sequence[str], sizes: Sequence[int], seeds: int) -> list[Run]:
    runs = []
    for norm in norms:
        for size in sizes:
            for seed in range(seeds):
                name = f"{len(runs) + 1:02d}-norm={norm},batch_size={size},seed={seed}"
                runs.append(run_of(name, {"norm": norm, "batch_size": size, "seed": seed}, (len(runs) % 17) / 20))
    return runs


def table_of(runs: Sequence[Run], **more: Any) -> Overview:
    return overview(Comparison(runs), [{}] * len(runs), **more)


def test_seeds_are_a_row_and_settings_are_columns() -> None:
    runs = sweep(["batch", "group"], [2, 8], 3)
    runs[3] = run_of(runs[3].name, runs[3].config, 0.9, alarm=7, state="diverged")
    table = table_of(runs)
    assert table.rows[0] == {
        "run": "04-06",
        "norm": "batch",
        "batch_size": "8",
        "n": "2 of 3",
        "test/accuracy": "22.5% ± 3.5%",
        "train/loss": "1 ± 0",
        "state": "1 diverged",
        "diverged at": "7",
        "seconds": "10",
    }
    assert [row["run"] for row in table.rows] == ["04-06", "01-03", "07-09", "10-12"]
    assert table.troubled == [True, False, False, False]
    assert table.rows[1]["n"] == "3"
    assert table.notes == ["values: mean ± standard deviation over the n seeds that finished and did not diverge"]


def test_failed_and_diverged_runs_are_on_top() -> None:
    runs = [
        run_of("fine", {"lr": 1}, 0.5),
        run_of("lost", {"lr": 2}, 0.5, math.nan),
        run_of("cut", {"lr": 3}, 0.5, state="interrupted"),
        run_of("wild", {"lr": 4}, 0.5, alarm=3),
        run_of("broken", {"lr": 5}, 0.5, state="failed"),
    ]
    table = table_of(runs)
    assert [row["run"] for row in table.rows] == ["broken", "lost", "wild", "cut", "fine"]
    assert table.troubled == [True, True, True, False, False]
    assert [row["test/accuracy"] for row in table.rows] == ["50.0%"] * 5  # of single runs, whatever became of them
    assert [row["train/loss"] for row in table.rows] == ["1", "nan", "1", "1", "1"]
    assert [row["diverged at"] for row in table.rows] == ["not watched", "0", "3", "not watched", "not watched"]


def test_many_rows_are_cut_and_the_best_are_kept() -> None:
    runs = sweep(["a", "b", "c", "d", "e"], range(40), 1)
    runs[7] = run_of(runs[7].name, runs[7].config, state="failed")
    table = table_of(runs, most=10)
    assert len(table.rows) == 10
    assert table.rows[0]["run"] == "08"
    values = [float(row["test/accuracy"].rstrip("%")) for row in table.rows[1:]]
    everything = [
        float(r["test/accuracy"].rstrip("%"))
        for r in table_of(runs).rows
        if "test/accuracy" in r and r["test/accuracy"] != "–"
    ]
    assert values == sorted(everything, reverse=True)[:9]
    [note] = table.notes
    assert note == (
        "190 of 200 rows are left out (the failed and diverged first, then the best by test/accuracy); --all prints all"
    )


def test_other_metrics_and_many_settings() -> None:
    runs = [run_of(f"{i}", {**{f"s{j}": i * j for j in range(1, 8)}, "n": i}, 0.5, loss=i) for i in range(3)]
    runs += [run_of("x", {**{f"s{j}": 5 + j**2 for j in range(1, 8)}, "n": 5})]
    table = table_of(runs, metrics=["train/loss"])
    assert [*table.rows[0]][-2:] == ["train/loss", "seconds"]
    assert [row["train/loss"] for row in table.rows] == ["0", "1", "2", "1"]
    with pytest.raises(UnknownNameError, match="did you mean 'train/loss'"):
        table_of(runs, metrics=["train/los"])
    mixed = [run_of(f"{i}", {f"s{j}": (i >> j) & 1 for j in range(6)}, 0.5) for i in range(64)]
    table = table_of(mixed)
    assert {*table.rows[0]} >= {"s0", "s1", "s2", "s3"}
    assert table.notes == ["2 more settings differ: s4, s5; report.html and --csv have all"]


def test_a_setting_that_is_named_as_a_column_is_told_apart() -> None:
    table = table_of([run_of("a", {"n": 1, "state": "x"}, 0.5), run_of("b", {"n": 2, "state": "y"}, 0.5)])
    assert [row["recipe.n"] for row in table.rows] == ["1, state=x", "2, state=y"]


def test_columns_without_room_are_left_out_and_told() -> None:
    table = table_of(sweep(["batch", "group"], [2, 8], 3))
    assert fitted(table, 200) is table
    narrow = fitted(table, 60)
    assert {*table.rows[0]} - {*narrow.rows[0]} == {"seconds", "train/loss"}
    assert narrow.notes[-1] == (
        "columns without room in 60 characters: seconds, train/loss; report.html and --csv have all"
    )
    assert "test/accuracy" in fitted(table, 1).rows[0]


@NO_FIGURES
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_command_is_readable_in_80_characters(
    seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    number = 0
    for norm in ("batch_renorm", "group", "layer", "mine.Mine"):
        for size in (2, 8, 128) if seeds == 3 else range(15):
            for seed in range(seeds):
                number += 1
                recipe = f"seed: {seed}\nmodel: {{norm: {norm}}}\ndata: {{batch_size: {size}}}\n"
                name = f"{number:02d}-norm={norm},batch_size={size},seed={seed}"
                folder = make_run(tmp_path / name, recipe=recipe, tails=False)
                metrics = folder / "metrics" / "metrics.csv"
                metrics.write_text(metrics.read_text().replace("nan,inf", "1.0,0.5"))
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-4])) <= 80
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].rstrip("0123456789-") == ""]
    rows = [row for row in rows if row[0][:1].isdigit() and row[1] != "of"]
    assert len(rows) == (12 if seeds == 3 else 40)
    assert all(row[1] in ("batch_renorm", "group", "layer", "mine.Mine") for row in rows)
    assert ("20 of 60 rows are left out" in "\n".join(lines)) == (seeds == 1)
    assert main(["report", "--all", str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out


@NO_FIGURES
def test_several_folders_have_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / name / "01-lr=1", recipe=f"model: {{norm: {name}}}\n", tails=False)
    assert main(["report", "a", "b"]) == 0
    assert "report: report.html" in capsys.readouterr().out
    assert Path("report.html").read_text() == "2 runs"
    assert main(["report", "a", "b", "--out", "a/both.html"]) == 0
    assert Path("a/both.html").read_text() == "2 runs"
    assert main(["report", "a"]) == 0
    assert Path("a/report.html").read_text() == "1 runs"
    assert main(["report", "a", "b", "--out", "nowhere/both.html"]) == 2
    assert main(["report", "a", "nothing"]) == 2
    assert main(["report", "a", "--metric", "test/acuracy"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no runs in nothing" in errors[1]
    assert errors[2].startswith("normzoo: --metric: 'test/acuracy' is not a known metric of these runs; did you mean")


@NO_FIGURES
def test_the_command_writes_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lr in (0.1, 0.3):
        make_run(tmp_path / "sweep" / f"{lr}", recipe=f"optimizer: {{lr: {lr}}}\nseed: 0\n", diverged=7)
    target = tmp_path / "new" / "csv"
    assert main(["report", str(tmp_path / "sweep"), "--csv", str(target)]) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    names = ["runs", "metrics", "records/divergence", "records/gradient_tails", "records/relative_loss"]
    assert {str(p.relative_to(target)) for p in target.rglob("*.*")} == {f"{name}.csv" for name in names}
    assert all(f"{name}.csv" in printed for name in names)
    runs = normzoo.load_runs(tmp_path / "sweep")
    losses = pd.read_csv(target / "records" / "relative_loss.csv", float_precision="round_trip")
    assert losses["optimizer.lr"].tolist() == [0.1, 0.3]
    assert [json.loads(text) for text in losses["multiples"]] == [[0.0, 0.5, 1.0]] * 2
    assert math.isnan(json.loads(losses["relative"][0])[2])
    tails = pd.read_csv(target / "records" / "gradient_tails.csv", float_precision="round_trip")
    written = [json.loads(text) for text in tails["histogram"]]
    assert written == [rows.tolist() for rows in runs.records["gradient_tails"]["histogram"]]
    os.chmod(target / "runs.csv", 0o644)
    (target / "metrics.csv").unlink()
    (target / "metrics.csv").mkdir()
    assert main(["report", str(tmp_path / "sweep"), "--csv", str(target)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not [*target.rglob("*.part")]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
SETTING = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), TEXT, st.booleans(), st.none())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(["a", "b.c", "step", "x,y"]), SETTING),
            st.lists(st.tuples(st.integers(0, 2**62), st.sampled_from(["m", 'q"/,é']), st.floats()), max_size=5),
            st.lists(st.tuples(st.floats(width=32), st.lists(st.floats(), max_size=3)), max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_csv_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[dict[str, Any], Any, Any]]
) -> None:
    runs = []
    for place, (config, rows, record) in enumerate(made):
        frame = pd.DataFrame(
            {
                "step": np.arange(len(record)),
                "norm": np.array([value for value, _ in record], dtype=np.float32),
                "curve": pd.Series([np.array(curve) for _, curve in record], dtype=object),
            }
        )
        metrics = tidy({"step": step, metric: value} for step, metric, value in rows)
        runs.append(Run(f"r{place}", config, {}, {}, metrics, {"measured": frame}))
    frames = Runs(runs)
    folder = tmp_path_factory.mktemp("csv")
    paths = write_csv(frames, folder)
    assert [path.stem for path in paths] == ["runs", "metrics", "measured"]
    for path, frame in zip(paths, (frames.runs, frames.metrics, frames.records["measured"]), strict=True):
        options: dict[str, Any] = {"float_precision": "round_trip", "keep_default_na": False, "lineterminator": "\n"}
        read = pd.read_csv(path, na_values={name: [""] for name in frame if frame[name].dtype.kind == "f"}, **options)
        texts = pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator="\n")
        assert [*read] == [*frame]
        assert len(read) == len(frame)
        for name in frame:
            if frame[name].dtype.kind == "f":
                wide = frame[name].to_numpy().astype(np.float64)
                back = read[name].to_numpy(dtype=np.float64)
                assert np.array_equal(np.isnan(back), np.isnan(wide))
                there = ~np.isnan(wide)
                assert back[there].tobytes() == wide[there].tobytes()
            elif frame[name].dtype.kind == "i":
                assert [int(text) if text else None for text in texts[name]] == [
                    None if pd.isna(value) else int(value) for value in frame[name]
                ]
        if "curve" in frame:
            for text, curve in zip(read["curve"], frame["curve"], strict=True):
                assert np.array(json.loads(text)).tobytes() == curve.tobytes() or np.isnan(curve).any()


def test_a_loss_that_ends_as_nan_is_told_in_every_part_of_the_page(tmp_path: Path) -> None:
    for seed in range(3):
        folder = tmp_path / f"version_{seed}"
        folder.mkdir()
        (folder / "hparams.yaml").write_text(f"lr: 0.1\nseed: {seed}\n")
        losses = ["1.0", "0.5", "nan" if seed == 1 else "0.25"]
        rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses))
        (folder / "metrics.csv").write_text(f"step,train_loss\n{rows}")
    runs = normzoo.load_runs(tmp_path)
    assert [row["diverged at"] for row in summary_rows(runs)] == ["not watched", "2", "not watched"]
    page = write_page(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "3 runs: 1 diverged at some step." in page
    one_by_one = page[page.index("The 3 runs one by one") :]
    assert one_by_one.index("<td>version_1</td>") < one_by_one.index("<td>version_0</td>")
