"""What a report says of capsules."""

from __future__ import annotations

import html
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from capsules_small import SENTENCE, make_capsule, make_tree
from report_pages import Page
from report_runs import make_run, record
from sweeps import few

from normzoo import load_capsule
from normzoo.capsules.folder import seal, write_shard
from normzoo.cli.main import main
from normzoo.report import load_runs, read_runs, summary_rows, write_page
from normzoo.report.capsules import largest_gradients, last_steps, sentence_of
from normzoo.report.findings import course_of, findings

DEADLINE = 120  # seconds


SENTENCES = (
    "At steps 28, 30, 31: loss 29, 31, nan; gradient norm 29, 31, 32; learning rate 0.1, 0.1, 0.1.",
    "The largest gradient norms at step 31 are those of layer.13 (14, at step 30 0.5), layer.12 (13, at step 30 0.5) "
    "and layer.11 (12, at step 30 0.5).",
    "The update moves the median weight matrix by 0.075 times its norm at step 31 and 0.005 times its norm at step 30; "
    "0.001 to 0.01 is common.",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a capsule, which lacks a rank and has a record with two figures."""
    folder = make_run(tmp_path / "run", diverged=31, tails=False)
    capsule = make_capsule(folder / "capsules" / "step_00000031", ranks=3, missing=(1,))
    rows = [{"step": s, "optimizer": 0, "of": "", "norm": 2.0**s, "applied": 1.0} for s in (30, 31)]
    record(tmp_path / "records", "gradient_norm", *rows)
    record(tmp_path / "records", "parameter_norms", *norms(30), *norms(31)).parent.rename(capsule / "records")
    return folder


def norms(step: int, parameters: int = 14, **more: Any) -> list[dict[str, Any]]:
    """Rows of a record: of 14 parameters the last has the largest gradient at step 31, of size 14, and 0.5 before."""
    sizes = [0.5 if step < 31 else i + 1.0 for i in range(parameters)]
    rows = [
        {
            "step": step,
            "layer": f"layer.{i}",
            "gradient": size,
            "dimensions": 2,
            "nonfinite": 0,
            "weight": 1.0,
            "relative_update": size / 100,
        }
        for i, size in enumerate(sizes)
    ]
    return [{"optimizer": 0, "depth": i, **row, **more} for i, row in enumerate(rows)]


def test_a_capsule_is_shown(run: Path, tmp_path: Path) -> None:
    text = write_page(load_runs(run), tmp_path / "report.html").read_text(encoding="utf-8")
    before, section = text.split("<h2>run, capsule step_00000031</h2>")
    section, after = section.split("</section>")
    assert SENTENCE in section
    assert "<th>step</th><th>micro-batch</th><th>loss</th><th>on rank</th><th>lr</th>" in section
    assert "<td>30</td><td>1</td><td>31</td><td>2</td><td>0.1</td><td>31</td><td>1</td>" in section
    assert '<tr class="marked"><td>31</td><td>1</td><td>nan</td><td>2</td>' in section
    assert section.count('<tr class="marked">') == 2  # the micro-batches of the step of the alarm
    assert "<th>parameter</th><th>gradient (before clipping) at 30</th><th>at 31</th>" in section
    first = "<td>layer.13</td><td>0.5</td><td>14</td><td>0.005</td><td>0.14</td>"
    assert section.index(first) < section.index("<td>layer.4</td>")
    assert "<td>layer.3</td>" not in section  # beyond the ten with the largest gradients
    assert all(f"<li>{sentence}</li>" in section for sentence in SENTENCES)
    shown, folded = section.split("<details><summary>figures of the other measurements")
    assert (shown.count("<svg"), folded.count("<svg")) == (2, 2)
    assert shown.count("alarm at step 31") == 2
    assert "<h3>Gradient norm by layer</h3>" in shown
    assert "<h3>Gradient norm</h3>" in folded
    assert "<li>rank 1 of 3, which had not written in time</li>" in section
    assert "<li>rank 2, /snapshots/1/trainer/scheduler: builtin_function_or_method</li>" in section
    assert "Gradient norm" not in before + after


def test_the_command_prints_the_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    sentences = "".join(f"- {sentence}\n" for sentence in SENTENCES)
    assert f"{run / 'capsules' / 'step_00000031'}: {SENTENCE}\n{sentences}report: " in printed.out
    assert printed.err == ""


def test_the_folder_that_the_alarm_names_can_be_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The capsule itself, and the folder of all capsules, without the run that they are in."""
    capsule = run / "capsules" / "step_00000031"
    for folder in (capsule, run / "capsules"):
        assert main(["report", str(folder)]) == 0
        assert f"{capsule}: {SENTENCE}\n- {SENTENCES[0]}\n" in capsys.readouterr().out
        assert SENTENCE in (folder / "report.html").read_text(encoding="utf-8")
    assert load_capsule(capsule).about["sentence"] == SENTENCE  # which the page within it does not damage


def test_of_a_run_that_was_cut_short_the_error_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tails=False)
    make_capsule(folder / "capsules" / "a", kind="exception", sentence="", error="ValueError: no")
    [run] = load_runs(folder)
    assert sentence_of(run.capsules[0]) == "exception at step 31: ValueError: no"


def test_texts_of_a_capsule_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tails=False)
    hostile = "</p><script>alert(1)</script>"
    make_capsule(folder / "capsules" / "<b>", sentence=hostile)
    page = Page(write_page(load_runs(folder), tmp_path / "report.html"))
    assert html.escape(hostile) in page.text
    assert len(page.scripts) == 3
    assert hostile not in page.text
    assert "run, capsule &lt;b&gt;" in page.text


@pytest.mark.parametrize(
    "name",
    few(["manifest.json", "rank_00000.json", "rank_00000.safetensors", "records", "all"], "manifest.json", "all"),
)
def test_a_damaged_capsule_does_not_break_the_report(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_capsule(run / "capsules" / "step_00000090")
    folder = run / "capsules" / "step_00000031"
    path = {"records": folder / "records" / "gradient_norm-000.arrows", "all": folder}.get(name, folder / name)
    if name == "all":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        path.write_bytes(b"{" if name == "records" else path.read_bytes()[:-5])
    [loaded], damaged = read_runs(run)
    assert damaged == []
    assert [capsule.path.name for capsule in loaded.capsules] == ["step_00000090"]
    [problem] = loaded.capsule_problems
    assert str(path) in problem
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"normzoo: left out: {problem}\n"
    page = html.unescape((run / "report.html").read_text(encoding="utf-8"))
    assert f'<p class="error">run: {problem}</p>' in page
    assert page.count('<section id="') == 1


def test_capsules_that_cannot_be_listed_are_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path) if path.name == "capsules" else os.scandir(path))
    monkeypatch.setattr("normzoo.report.runs.read_records", lambda folder: {})
    [loaded], _ = read_runs(run)
    assert loaded.capsule_problems == [f"{run / 'capsules'} cannot be read: Permission denied"]


def test_a_report_on_capsules_does_not_import_torch(run: Path) -> None:
    code = (
        "import sys\nfrom normzoo.cli.main import main\n"
        f"assert main(['report', {str(run)!r}]) == 0\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert SENTENCE in done.stdout


def row(step: int, rank: int = 0, micro_batch: int = 0, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("lr", "norm", "applied", "scale")),
        "step": step,
        "rank": rank,
        "micro_batch": micro_batch,
        "loss": loss,
        **more,
    }


@pytest.mark.parametrize(
    ("losses", "largest", "rank"),
    [
        ([1.0, 3.0, 2.0], "3", "1"),
        ([1.0, math.inf, 2.0], "inf", "1"),
        ([1.0, 5.0, math.nan], "nan", "2"),
        ([None, -1.0, None], "-1", "1"),
        ([0.123456, None, None], "0.1235", "0"),
    ],
)
def test_of_each_micro_batch_the_largest_loss_is_shown(losses: list[float | None], largest: str, rank: str) -> None:
    rows = [row(4, r, loss=loss) for r, loss in enumerate(losses)]
    assert last_steps(rows) == [{"step": "4", "loss": largest, "on rank": rank}]


def test_only_the_last_steps_are_shown_and_only_columns_with_data() -> None:
    shown = last_steps([row(s, micro_batch=m, scale=2.0 if m else None) for s in range(20) for m in range(2)])
    assert [(r["step"], r["micro-batch"]) for r in shown] == [(str(s), str(m)) for s in range(14, 20) for m in range(2)]
    assert {tuple(r) for r in shown} == {("step", "micro-batch", "loss", "scale")}
    assert [r["scale"] for r in shown[:2]] == ["–", "2"]
    assert last_steps([]) == []


def test_a_norm_that_is_nan_is_shown_and_one_that_is_unknown_is_not() -> None:
    shown = last_steps(
        [row(1, norm=math.nan), row(1, rank=1, norm=7.0), row(2, norm=None), row(2, rank=1, norm=math.inf)]
    )
    assert [r["norm"] for r in shown] == ["nan", "inf"]


@pytest.mark.parametrize(
    ("remade", "sentence"),
    [
        (
            {"why_not": "no snapshot of the run's state was kept"},
            "No steps were made again: no snapshot of the run's state was kept.",
        ),
        ({"from": 2, "to": 5}, "Steps 2 to 5 were made again, with the losses of the run, bit for bit."),
        (
            {"from": 2, "to": 5, "first_difference": 4, "why_not": ""},
            "Steps 2 to 5 were made again; from step 4 on their losses differ from those of the run.",
        ),
        (
            {"from": 2, "to": 2, "why_not": "ValueError: no"},
            "Making the steps from 2 on again failed: ValueError: no.",
        ),
    ],
)
def test_what_was_made_again_is_told(tmp_path: Path, remade: dict[str, Any], sentence: str) -> None:
    assert findings(load_capsule(make_capsule(tmp_path / "a", remade=remade)))[-1] == sentence


@pytest.mark.parametrize(
    ("broken", "parameters", "weights"),
    [
        ({1, 3, 4, 5, 9}, "5 of 14 parameters: layer.1, layer.3, layer.4 and 2 others", set()),
        ({13}, "1 of 14 parameters: layer.13", set()),
        ({*range(14)}, "all 14 parameters", {7}),
    ],
)
def test_a_gradient_that_is_not_finite_is_told_with_its_parameters(
    tmp_path: Path, broken: set[int], parameters: str, weights: set[int]
) -> None:
    """The largest gradients are those of the step before."""
    capsule = make_capsule(tmp_path / "a")
    none = {"gradient": None, "relative_update": None, "nonfinite": 3}
    rows = [{**row, **(none if row["depth"] in broken else {})} for row in norms(31)]
    rows = [{**row, "weight": math.nan} if row["depth"] in weights else row for row in rows]
    record(tmp_path / "records", "parameter_norms", *norms(30), *rows).parent.rename(capsule / "records")
    before = "not finite before its update: layer.7" if weights else "all finite before its update"
    told = findings(load_capsule(capsule))
    assert told[1] == f"Step 31 is the first whose gradient is not finite, in {parameters}. Weights are {before}."
    assert told[2].startswith("The largest gradient norms at step 30 are those of layer.0 (0.5), layer.1 (0.5)")


def test_of_gradients_that_are_not_finite_from_the_first_step_on_none_is_the_largest(tmp_path: Path) -> None:
    capsule = make_capsule(tmp_path / "a")
    rows = norms(31, 2, nonfinite=1, gradient=None)
    record(tmp_path / "records", "parameter_norms", *rows).parent.rename(capsule / "records")
    assert not any("largest" in sentence for sentence in findings(load_capsule(capsule)))


def test_steps_without_loss_and_norm_are_no_part_of_the_course() -> None:
    """As that of an error, of which neither is known."""
    rows = [
        row(step, loss=None if step > 6 else float(step), norm=2.0 if step == 7 else None, lr=0.1) for step in range(9)
    ]
    assert course_of(rows, 8) == (
        "At steps 0, 4, 6, 7: loss 0, 4, 6, –; gradient norm –, –, –, 2; learning rate 0.1, 0.1, 0.1, 0.1."
    )
    assert course_of(rows, 1) == "At steps 0, 1: loss 0, 1; learning rate 0.1, 0.1."
    assert course_of(rows[:1], None) == "At step 0: loss 0; learning rate 0.1."
    assert course_of(rows[8:], 8) == ""


def test_a_single_step_has_nothing_before_it(tmp_path: Path) -> None:
    capsule = make_capsule(tmp_path / "a", step=28)
    record(tmp_path / "records", "parameter_norms", *norms(31, 2)).parent.rename(capsule / "records")
    assert findings(load_capsule(capsule)) == [
        "At step 28: loss 28.8; gradient norm 29; learning rate 0.1.",
        "The largest gradient norms at step 31 are those of layer.1 (2) and layer.0 (1).",
        "The update moves the median weight matrix by 0.015 times its norm at step 31; 0.001 to 0.01 is common.",
    ]


def test_the_largest_gradients_are_those_of_the_last_step_at_which_all_are_finite() -> None:
    """In the table; if there is none, the last step stands there as it is."""
    broken = [{**row, "gradient": math.nan, "nonfinite": 1} for row in norms(32)]
    shown = largest_gradients(pd.DataFrame([*norms(30), *norms(31), *broken]))
    assert (shown[0]["parameter"], shown[0]["at 31"]) == ("layer.13", "14")
    assert {shown["at 32"] for shown in largest_gradients(pd.DataFrame(broken))} == {"nan"}


def test_only_columns_that_are_shown_are_explained(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tails=False)
    make_capsule(folder / "capsules" / "a", ranks=1)
    text = write_page(load_runs(folder), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "lr, the learning rate" in text
    assert "on rank, the rank" not in text
    assert "GradScaler" not in text


@pytest.mark.parametrize(("rank", "batches"), [({}, "28"), ({"rank": 1}, "28, rank=1")])
def test_of_an_error_the_batch_and_the_step_are_told(tmp_path: Path, rank: dict[str, int], batches: str) -> None:
    """The table of runs names the error, unless records show that the run went on."""
    folder = make_run(tmp_path / "run", tails=False)
    about = {"kind": "exception", "step": 28, "error": "ValueError: no: sample", **rank}
    capsule = folder / "capsules" / "000_interrupted"
    for writer in range(2):
        tree = make_tree(writer)
        for micro in (micro for frame in tree["frames"] for micro in frame["micro_batches"]):
            micro |= {"ids": None, "hash": None}  # as where the batches themselves are kept
        write_shard(capsule, writer, about, tree)
    seal(capsule, about, 2, wait=0.0)
    told = findings(load_capsule(capsule))
    assert told[-1] == f"The batch of step 28, in which the error was raised, is capsule.batches({batches})."
    [row] = summary_rows(load_runs(folder))
    assert (row["diverged at"], row["ended by"]) == ("no", "ValueError at step 28")
    record(folder, "divergence", {"step": 40, "rule": "threshold", "stopped": False})
    [row] = summary_rows(load_runs(folder))
    assert "ended by" not in row
    assert row["last loss"] == "nan"


def test_biases_do_not_count_among_the_updates(tmp_path: Path) -> None:
    """Unless there is nothing else; the step before the last one is told beside the first."""
    matrices = [row for step in (29, 30, 31) for row in norms(step, 1, relative_update=2.6 * 10.0 ** (step - 29))]
    biases = [
        {**row, "layer": f"bias.{i}", "dimensions": 1, "relative_update": 7.0} for row in matrices for i in (1, 2)
    ]
    capsules = [make_capsule(tmp_path / name) for name in "ab"]
    for capsule, rows in zip(capsules, ([*matrices, *biases], biases), strict=True):
        record(tmp_path / capsule.name, "parameter_norms", *rows).parent.rename(capsule / "records")
    both, alone = (findings(load_capsule(capsule))[-1] for capsule in capsules)
    assert both == (
        "The update moves the median weight matrix by 260 times its norm at step 31, 26 times its norm at step 30 and "
        "2.6 times its norm at step 29; 0.001 to 0.01 is common."
    )
    assert alone.startswith("The update moves the median parameter by 7 times its norm at step 31, 7 times")


def test_the_largest_norm_before_the_alarm_is_told() -> None:
    rows = [row(step, norm=math.inf if step == 3 else 5000.0 if step == 6 else 1.0) for step in range(10)]
    assert "At steps 0, 5, 6, 8, 9: " in course_of(rows, 9)
    assert "gradient norm 1, 1, 5000, 1, 1." in course_of(rows, 9)
    assert "At steps 0, 3, 5, 6: " in course_of(rows, 6)  # not that of the alarm itself


def test_of_an_update_that_was_skipped_and_a_record_of_another_form_nothing_is_told(tmp_path: Path) -> None:
    capsule = make_capsule(tmp_path / "a")
    record(tmp_path / "records", "parameter_norms", *norms(31, 1, relative_update=None)).parent.rename(
        capsule / "records"
    )
    assert not any("update" in sentence for sentence in findings(load_capsule(capsule)))
    assert largest_gradients(pd.DataFrame({"step": [1], "layer": ["a"]})) == []
    assert largest_gradients(pd.DataFrame()) == []
