"""Reports on hand-made run folders."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from report_pages import Page
from report_runs import WATCHED, make_run, record
from schemas import SCHEMAS

from normzoo.cli.main import main
from normzoo.functional.buckets import bucket_counts
from normzoo.records.schema import Schema
from normzoo.records.segments import Segment
from normzoo.report import load_runs, style, summary_rows, write_page
from normzoo.report.cell_pictures import on_scale
from normzoo.report.drawing import magnitude_density
from normzoo.report.figures import draw, tail_layer


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the figures of a page takes longer than all else, for tests that look only at its text."""
    for name in ("draw_logged", "draw_recorded"):
        monkeypatch.setattr(f"normzoo.report.page.{name}", lambda *given: {})
    monkeypatch.setattr("normzoo.report.page.layer_maps", lambda runs: [])


def test_a_run_is_read_with_its_broken_last_batch_left_out(tmp_path: Path) -> None:
    [run] = load_runs(make_run(tmp_path / "a", diverged=7))
    assert len(run.record("gradient_tails")) == 4
    assert run.curve("train/loss") == ([0, 1, 2, 3, 4], [2.0, 1.9, 1.8, 1.7, 1.6])
    assert run.curve("test/accuracy") == ([4, 9], [0.75, 0.5])
    assert (run.state, run.diverged_at, run.watched) == ("finished", 7, True)
    assert tail_layer([run]) == "l.conv2.weight"


def test_the_table(tmp_path: Path) -> None:
    make_run(tmp_path / "1", diverged=7)
    make_run(tmp_path / "2")
    make_run(tmp_path / "3", recipe="callbacks: [gradient_tails]\n", tails=False)
    rows = summary_rows(load_runs(tmp_path))
    assert [r["run"] for r in rows] == ["1", "2", "3"]
    assert [r["diverged at"] for r in rows] == ["7", "no", "9"]  # nothing watched the third, whose loss ends as NaN
    assert [r["kurtosis"] for r in rows] == ["2.5", "2.5", "–"]
    assert (rows[0]["accuracy"], rows[0]["best"]) == ("50.0%", "75.0%")
    assert (rows[0]["headroom"], rows[0]["seconds"]) == ("0.5×", "12")
    assert "low headroom" not in rows[0]  # which no run has


@pytest.mark.slow
def test_the_terminal_has_room_for_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 80 characters: columns without a value are left out, and headers of two words take two lines."""
    monkeypatch.setenv("COLUMNS", "80")
    run = make_run(tmp_path / "batch_renorm", diverged=7)
    make_run(tmp_path / "norm=batch_renorm,lr=0.1", tails=False)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "norm=batch_renorm,lr=0.1 " in printed
    assert "low" not in printed.split()
    headroom = {"headroom": 8.0, "headroom_bound": "above", "headroom_low": 1 / 64, "headroom_low_bound": "below"}
    record(run, "relative_loss", {"step": 3, "lr": 0.1, "multiples": [1.0], "relative": [1.0], "loss": 2.0, **headroom})
    assert main(["report", str(tmp_path)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("batch_renorm ")]
    assert line.split() == ["batch_renorm", "50.0%", "7", "2.5", ">8×", "<1/64×"]


def test_the_page_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    make_run(tmp_path / "a<script>&b", recipe=WATCHED + "note: </pre><script>alert(1)</script>\n")
    page = Page(write_page(load_runs(tmp_path), tmp_path / "report.html"))
    assert page.loads == []
    assert len(page.scripts) == 3  # data, Vega and the page's own
    assert page.tags.count("svg") == page.tags.count("figure") == 7
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert "a&lt;script&gt;&amp;b" in page.text
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in page.text
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_figures_only_where_there_is_data(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")
    [run] = load_runs(folder)
    assert run.state == "unfinished"
    assert Page(write_page([run], folder / "report.html")).tags.count("svg") == 0


@pytest.mark.parametrize("histogram", [[], [[0, 5]]])
def test_a_gradient_of_zeros_has_no_figure(tmp_path: Path, histogram: list[list[int]]) -> None:
    folder = make_run(tmp_path / "zeros", tails=False)
    row = {"step": 0, "layer": "w", "kurtosis": None, "mantissa_bits": 3, "histogram": histogram}
    record(folder, "gradient_tails", row)
    curves = {"Relative loss along the step", "Relative loss at single steps", "Learning-rate headroom"}
    assert draw(load_runs(folder)).keys() == {"Training loss", "Accuracy"} | curves


@pytest.mark.slow
def test_many_runs(tmp_path: Path) -> None:
    for i in range(20):
        make_run(tmp_path / f"{i:02d}")
    parsed = Page(write_page(load_runs(tmp_path), tmp_path / "report.html"))
    assert parsed.tags.count("tr") == 21


def test_lines_of_many_runs_are_told_apart() -> None:
    assert len({tuple(style.line(i).values()) for i in range(32)}) == 32


def test_a_damaged_record_is_told_in_a_sentence(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "metrics" / "gradient_tails-000.arrows"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"gradient_tails-000\.arrows is damaged: batch 1, at byte"):
        load_runs(tmp_path)


@pytest.mark.slow
def test_a_resumed_run_with_other_multiples_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    row = {"step": 5, "lr": 0.1, "multiples": [1.0, 2.0], "relative": [1.0, np.inf], "headroom": 0.5, "loss": 2.0}
    record(folder, "relative_loss", {**row, "along": "gradient"}, start=5)
    runs = load_runs(tmp_path)
    assert isinstance(runs[0].record("relative_loss"), pd.DataFrame)
    assert len(runs[0].record("relative_loss")) == 2
    figures = draw(runs)
    panels = figures["Relative loss at single steps"].panels
    assert [panel.series[0].x.tolist() for panel in panels] == [[0.0, 0.05, 0.1], [0.1, 0.2]]
    assert Page(write_page(runs, tmp_path / "report.html")).tags.count("svg") == len(figures)


def test_relative_loss_is_drawn_at_negative_and_zero_multiples_too(tmp_path: Path) -> None:
    grid = {"multiples": [-1.0, 0.0, 0.5, 1.0], "lr": 0.1, "headroom": 1.0, "loss": 2.0}
    for name, along in (("a", "gradient"), ("b", "update")):
        rows = [{"step": s, "relative": [1.5 + s, 1.0, 0.5, s], "along": along, **grid} for s in range(3)]
        record(make_run(tmp_path / name, tails=False), "relative_loss", *rows)
    figure = draw(load_runs(tmp_path))["Relative loss along the step"]
    [panel] = figure.panels
    lines = [line for line in panel.series if len(line.x) == 4]
    assert [line.label for line in lines] == ["a, gradient", "b, update"]
    for line in lines:
        assert line.x.tolist() == pytest.approx([-0.1, 0.0, 0.05, 0.1])
        assert line.y.tolist() == [2.5, 1.0, 0.5, 1.0]  # medians
    assert panel.x.scale == "signed log"
    assert [(rule.at, rule.along) for rule in panel.rules] == [(1.0, "y"), (0.0, "x")]
    assert (np.diff(on_scale(lines[0].x, panel.x)) > 0).all()
    assert panel.x.domain[0] < -0.1 < 0.1 < panel.x.domain[1]


def test_relative_loss_of_records_without_the_direction_is_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, tails=False)
        for path in (tmp_path / name / "metrics").glob("relative_loss-*"):
            path.unlink()
        curve = SCHEMAS["relative_loss"]
        first = ("step", "lr", "loss", "multiples", "relative", "headroom")  # columns of the first version
        old = Schema(curve.name, curve.row, tuple(c for c in curve.columns if c.name in first))
        row = {"step": 0, "lr": 0.1, "multiples": [1.0, 2.0], "relative": [0.5, 2.0], "headroom": 1.3, "loss": 2.0}
        Segment(tmp_path / name / "metrics", old, 0).append([row])
    record(tmp_path / "b", "relative_loss", {**row, "step": 1, "along": "update"}, start=1)
    [panel] = draw(load_runs(tmp_path))["Relative loss along the step"].panels
    assert [line.label for line in panel.series] == ["a, gradient", "b, gradient", "b, update"]
    assert panel.x.scale == "log"


def test_each_optimizer_has_a_curve_and_a_headroom_of_its_own(tmp_path: Path) -> None:
    """Also in a sample without an index, as earlier versions wrote it."""
    folder = make_run(tmp_path / "gan", tails=False)
    for path in (folder / "metrics").glob("relative_loss-*"):
        path.unlink()
    row = {"lr": 0.1, "multiples": [1.0, 2.0], "loss": 2.0, "along": "update"}
    rows = [{"step": 0, "relative": [0.5, 2.0], "headroom": 1.0}]
    rows += [{"step": s, "relative": [s, s], "headroom": float(s), "optimizer": s % 2} for s in (2, 3, 4, 5, 7)]
    record(folder, "relative_loss", *({**row, **sample} for sample in rows))
    runs = load_runs(tmp_path)
    assert summary_rows(runs)[0]["headroom"] == "2× / 5×"
    [panel] = draw(runs)["Relative loss along the step"].panels
    lines = {line.label: line for line in panel.series if len(line.x) == 2}
    first, second = (f"gan, optimizer {i}" for i in (0, 1))
    assert lines[first].y.tolist() == [2.0, 2.0]
    assert lines[second].y.tolist() == [5.0, 5.0]
    assert lines[first].marker != lines[second].marker


def test_the_first_sample_is_drawn_on_the_left_and_the_last_on_the_right(tmp_path: Path) -> None:
    variances = {0: [1.0, 2.0, 4.0], 50: [9.0, 9.0, 9.0], 100: [0.5, 30.0, 8.0]}
    for name, factor in (("a", 1.0), ("b", 10.0)):
        rows = [
            {
                "step": step,
                "layer": f"l{depth}",
                "where": where,
                "depth": depth,
                "variance": of_step[depth] * factor * way,
            }
            for step, of_step in variances.items()
            for depth in range(3)
            for where, way in (("output", 1.0), ("input", 7.0))
        ]
        record(make_run(tmp_path / name), "channel_moments", *rows)
    panels = draw(load_runs(tmp_path))["Channels over depth"].panels
    for panel, title, step in zip(panels, ("first sample", "last sample"), (0, 100), strict=True):
        assert panel.title == f"{title} (step {step})"
        outputs = [line for line in panel.series if "output" in line.label]
        for line, factor in zip(outputs, (1.0, 10.0), strict=True):
            assert line.x.tolist() == [0, 1, 2]
            np.testing.assert_allclose(line.y, np.array(variances[step]) * factor)


@pytest.mark.parametrize(("loss", "height"), [(50.0, 50.0), (1e9, 1e6), (np.inf, 1e6), (np.nan, 1e6)])
def test_divergence_is_marked_at_its_step_and_loss(tmp_path: Path, loss: float, height: float) -> None:
    """A loss that cannot be drawn, or only far above the others, is marked at the figure's highest."""
    run = make_run(tmp_path / "run")
    record(run, "divergence", {"step": 7, "loss": loss, "rule": "spike", "stopped": False})
    [panel] = draw(load_runs(run))["Training loss"].panels
    [mark] = [note for note in panel.notes if note.cross]
    assert (mark.x, mark.y, mark.run) == (7, height, "run")
    assert mark.color == panel.series[0].color
    assert panel.x.domain[1] > 7
    assert panel.y.domain[1] > height


def test_a_norm_that_diverged_is_marked_on_the_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record(run, "divergence", {"step": 3, "rule": "gradient spike", "stopped": True, "value": 1e9})
    [panel] = draw(load_runs(run))["Training loss"].panels
    [mark] = [note for note in panel.notes if note.cross]
    assert (mark.x, mark.y) == (3, pytest.approx(1.7))


@pytest.mark.usefixtures("no_figures")
def test_headrooms_that_the_grid_does_not_reach_are_told_as_bounds(tmp_path: Path) -> None:
    """Beside the last low quantile, of records whose earlier rows have neither."""
    folder = make_run(tmp_path / "a", tails=False)
    row = {"lr": 0.1, "multiples": [1 / 64, 1.0, 8.0], "relative": [1.1, 1.0, 1.0], "loss": 2.0}
    found = [(1 / 64, "below"), (1 / 64, "below"), (8.0, "above"), (None, None)]
    rows = [{**row, "step": i, "headroom": value, "headroom_bound": bound} for i, (value, bound) in enumerate(found)]
    rows[-1] |= {"headroom_low": 1 / 64, "headroom_low_bound": "below"}
    record(folder, "relative_loss", *rows)
    [table] = summary_rows(load_runs(tmp_path))
    assert (table["headroom"], table["low headroom"]) == ("<1/64×", "<1/64×")
    assert "&lt;1/64×" in write_page(load_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no runs in .* neither it nor a folder below it holds a recipe\.yaml"):
        load_runs(tmp_path)
    make_run(tmp_path / "one" / "two" / "three" / "four")
    with pytest.raises(ValueError, match="no runs in"):
        load_runs(tmp_path)
    assert [run.name for run in load_runs(tmp_path / "one")] == ["four"]


def test_a_folder_that_callbacks_alone_have_written_is_a_run(tmp_path: Path) -> None:
    """As Lightning's version_N is; beside one with nothing of ours, which is none."""
    for version, alarms in enumerate(([], [{"step": 7, "rule": "threshold", "stopped": False}])):
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (record(folder, "divergence", *alarms)).rename(folder / "divergence-000.arrows")
        (folder / "metrics").rmdir()
    (tmp_path / "version_2" / "checkpoints").mkdir(parents=True)
    runs = load_runs(tmp_path)
    assert [(run.name, run.state, run.diverged_at, run.watched) for run in runs] == [
        ("version_0", "–", None, True),
        ("version_1", "–", 7, True),
    ]
    assert summary_rows(runs) == [
        {"run": "version_0", "diverged at": "no"},
        {"run": "version_1", "diverged at": "7"},
    ]
    page = write_page(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Recipes" not in page
    assert "Environment" not in page
    [one] = load_runs(tmp_path / "version_1")
    assert one.diverged_at == 7


def test_a_figure_of_the_values_of_another_one_is_left_out(tmp_path: Path) -> None:
    """Where nothing was clipped, of the norm before and after."""
    for name, applied in (("clipped", 1.0), ("not", 2.0)):
        make_run(tmp_path / name, tails=False)
        rows = [{"step": s, "optimizer": 0, "of": "", "norm": 2.0, "applied": applied} for s in range(3)]
        record(tmp_path / name, "gradient_norm", *rows)
    assert {"Gradient norm", "Clipped gradient norm"} <= {*draw(load_runs(tmp_path))}
    alone = {*draw(load_runs(tmp_path / "not"))}
    assert "Gradient norm" in alone
    assert "Clipped gradient norm" not in alone


@pytest.mark.parametrize("bits", [0, 3, 7])
def test_density_is_a_histogram_of_the_logarithm(bits: int) -> None:
    x = np.random.default_rng(1).standard_t(3, 5000).astype(np.float32)
    x[:10], x[10:13] = 0.0, (np.inf, -np.inf, np.nan)
    counts = bucket_counts(torch.from_numpy(x), bits)
    pairs = np.array([(int(b), int(counts[b])) for b in counts.nonzero().flatten()])
    magnitude, density = magnitude_density(pairs, bits)
    finite = np.abs(x[13:])
    edges = 2.0 ** np.append(np.log2(magnitude) - 0.5, np.log2(magnitude[-1]) + 0.5)
    expected, _ = np.histogram(np.log10(finite), bins=np.log10(edges), density=True)
    np.testing.assert_allclose(np.nan_to_num(density), expected, rtol=1e-6)
    assert math.isclose(np.nansum(density) * math.log10(2), 1.0, rel_tol=1e-9)


def test_density_of_nothing_is_empty() -> None:
    magnitude, density = magnitude_density(np.array([(0, 5)]), 3)
    assert magnitude.size == density.size == 0


@pytest.mark.usefixtures("no_figures")
def test_columns_of_which_no_run_has_anything_are_left_out(tmp_path: Path) -> None:
    metrics = make_run(tmp_path / "1", recipe="callbacks: []\n", tails=False) / "metrics" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("0,9,nan", "0,9,1.5"))  # the loss ends as a number
    [row] = summary_rows(load_runs(tmp_path))
    assert not {"diverged at", "kurtosis"} & row.keys()
    page = write_page(load_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Kurtosis" not in page
    assert "none recorded" not in page
    make_run(tmp_path / "2", diverged=7)
    assert [r["diverged at"] for r in summary_rows(load_runs(tmp_path))] == ["not watched", "7"]
    page = write_page(load_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "excess kurtosis of the gradient of" in page
