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

import pytest
from capsules_small import SENTENCE, make_capsule
from report_runs import make_run, record
from sweeps import few

from normzoo.cli.main import main
from normzoo.report import load_runs, read_runs, write_page
from normzoo.report.capsules import last_steps, sentence_of

DEADLINE = 120  # seconds


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a capsule, which lacks a rank and has a record with two figures."""
    folder = make_run(tmp_path / "run", diverged=31, tails=False)
    capsule = make_capsule(folder / "capsules" / "step_00000031", ranks=3, missing=(1,))
    rows = [{"step": s, "optimizer": 0, "of": "", "norm": 2.0**s, "applied": 1.0} for s in (30, 31)]
    record(tmp_path / "records", "gradient_norm", *rows).parent.rename(capsule / "records")
    return folder


def test_a_capsule_is_shown(run: Path, tmp_path: Path) -> None:
    text = write_page(load_runs(run), tmp_path / "report.html").read_text(encoding="utf-8")
    before, section = text.split("<h2>run, capsule step_00000031</h2>")
    section, after = section.split("</section>")
    assert SENTENCE in section
    assert "<th>step</th><th>micro-batch</th><th>loss</th><th>on rank</th><th>lr</th>" in section
    assert "<td>30</td><td>1</td><td>31</td><td>2</td><td>0.1</td><td>31</td><td>1</td>" in section
    assert "<td>31</td><td>1</td><td>nan</td><td>2</td>" in section
    assert section.count("<svg") == 2
    assert "<h3>Gradient norm</h3>" in section
    assert "<li>rank 1 of 3, which had not written in time</li>" in section
    assert "<li>rank 2, /snapshots/1/trainer/scheduler: builtin_function_or_method</li>" in section
    assert "Gradient norm" not in before + after


def test_the_command_prints_the_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert f"{run / 'capsules' / 'step_00000031'}: {SENTENCE}\n" in printed.out
    assert printed.err == ""


def test_of_a_run_that_was_cut_short_the_error_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tails=False)
    make_capsule(folder / "capsules" / "a", kind="exception", sentence="", error="ValueError: no")
    [run] = load_runs(folder)
    assert sentence_of(run.capsules[0]) == "exception at step 31: ValueError: no"


def test_texts_of_a_capsule_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tails=False)
    hostile = "</p><script>alert(1)</script>"
    make_capsule(folder / "capsules" / "<b>", sentence=hostile)
    text = write_page(load_runs(folder), tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.escape(hostile) in text
    assert "<script" not in text
    assert "run, capsule &lt;b&gt;" in text


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
    assert page.count("<section>") == 1


def test_capsules_that_cannot_be_listed_are_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path) if path.name == "capsules" else os.scandir(path))
    monkeypatch.setattr("normzoo.report.runs.read_records", lambda folder: {})
    [loaded], _ = read_runs(run)
    assert loaded.capsule_problems == [f"{run / 'capsules'} cannot be read: Permission denied"]


def test_a_report_on_capsules_does_not_import_torch(run: Path) -> None:
    (run / "metrics" / "divergence-000.arrows").unlink()  # a record without figures, for which its class is asked
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
