"""What reports say of replays, made by hand."""

from __future__ import annotations

import html
import importlib
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest
from capsules_small import make_capsule
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_pages import EVIDENCE, RECORDS, REFUTED, SENTENCE, SUGGESTION, make_findings, make_replay
from report_pages import Page
from report_runs import make_run

from normzoo import replaying
from normzoo.causes import Findings, titles
from normzoo.causes.evidence import KEYS
from normzoo.cli.main import main
from normzoo.records.schema import Schema
from normzoo.report import load_runs, write_page
from normzoo.report.capsules import capsules_section
from normzoo.report.elements import anchor, table_element
from normzoo.report.findings import causes_of
from normzoo.report.gallery import Gallery
from normzoo.report.replay_reading import read_replay
from normzoo.report.replay_tables import tables_of
from normzoo.report.replays import _RECORDS, replay_section

CAPSULE = "000_step_00000031"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a capsule that has been replayed."""
    folder = make_run(tmp_path / "run", diverged=31, tails=False)
    make_replay(make_capsule(folder / "capsules" / CAPSULE))
    return folder


def section_of(capsule: Path, findings: Findings | None = None, **more: Any) -> str:
    replay = read_replay(make_replay(capsule, findings, **more).parent)
    assert replay is not None
    return replay_section("run, capsule 0", replay, 40, Gallery())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The section of a replay with all records, and a cause for each title."""
    folder = tmp_path_factory.mktemp("capsule")
    return section_of(folder, make_findings(*titles.TITLES), records=RECORDS)


def table(title: str, **evidence: Any) -> list[list[list[str]]]:
    """The cells of the tables below a title, the headings first."""
    tables = tables_of({**EVIDENCE, **evidence}).get(title, [])
    return [[[*table.rows[0]], *([*row.values()] for row in table.rows)] for table in tables]


def test_a_replay_stands_below_its_capsule(run: Path, tmp_path: Path) -> None:
    text = write_page(load_runs(run), tmp_path / "report.html").read_text(encoding="utf-8")
    before, section = text.split(f"<h2>run, capsule {CAPSULE}, replayed</h2>")
    assert f"<h2>run, capsule {CAPSULE}</h2>" in before
    assert "<strong>A learning rate too large for the weights</strong>, high confidence. " + SENTENCE in section
    assert "<strong>One parameter that has grown</strong>, low confidence. Cause 1." in section
    assert SUGGESTION in section
    assert REFUTED in section
    link = anchor(titles.COURSE, f"run, capsule {CAPSULE}")
    assert f'See: <a href="#{link}">{titles.COURSE}</a>' in section
    assert f'<section id="{link}"><h3>{titles.COURSE}</h3>' in section
    assert "<li>Steps 32 to 48 were made again.</li>" in section
    assert "<li>With one rank of two, losses are not compared.</li>" in section
    assert "alarm at step 31" in section


def test_each_title_that_a_cause_can_name_is_on_the_page_and_open(whole: str) -> None:
    """Once each, in the order of the questions, and open."""
    links = [anchor(title, "run, capsule 0") for title in titles.TITLES]
    places = [whole.index(f'<section id="{link}">') for link in links]
    assert places == sorted(places)
    assert all(whole.count(f'id="{link}"') == whole.count(f'href="#{link}"') == 1 for link in links)
    assert len({*links}) == len(titles.TITLES)
    assert whole.count("<details") == 1  # figures of records that no cause can name
    assert whole.count("<svg") == len(RECORDS)


def test_what_no_cause_names_is_folded_and_what_is_not_there_is_no_link(tmp_path: Path) -> None:
    section = section_of(tmp_path, records=(), parameters=None, first_bad=None)
    assert f"See: {titles.PARAMETERS}<" in section
    assert anchor(titles.FIRST_BAD, "run, capsule 0") not in section
    assert f'<details id="{anchor(titles.INPUTS, "run, capsule 0")}"><summary>{titles.INPUTS}</summary>' in section
    assert f'<section id="{anchor(titles.BATCH_AND_WEIGHTS, "run, capsule 0")}">' in section


def test_the_figures_of_each_record_of_a_replay_stand_below_a_title_that_causes_name() -> None:
    modules = [
        importlib.import_module(f"{replaying.__name__}.{found.name}")
        for found in pkgutil.iter_modules(replaying.__path__)
    ]
    schemas = {value.name for module in modules for value in vars(module).values() if isinstance(value, Schema)}
    assert schemas
    assert schemas <= {*_RECORDS}
    assert {*_RECORDS.values()} <= {*titles.TITLES}


def test_a_figure_alone_below_a_heading_has_no_heading_of_its_own(whole: str) -> None:
    assert "<h4>Weight norm by parameter</h4>" in whole
    assert "<h4>Of a later version</h4>" in whole
    assert not {title for title in titles.TITLES if f"<h4>{title}</h4>" in whole}
    assert "<h4>Loss before and after each update</h4>" not in whole


def test_the_two_by_two_table() -> None:
    [rows] = table(titles.BATCH_AND_WEIGHTS)
    heads = [f"{what} at the weights of step {step}" for what in ("loss", "gradient norm") for step in (40, 32)]
    assert rows == [
        ["batch of step", *heads],
        ["40 (suspicious)", "19.1", "4.2", "30.7", "1.5"],
        ["33", "18.5", "4.1", "29", "inf"],
    ]
    alone = {"batch": 32, "other": None, "weights": [32, 32], "loss": [[9.0, 9.0], [None, None]], "norm": None}
    [rows] = table(titles.BATCH_AND_WEIGHTS, data_or_state=alone)
    assert rows[1:] == [["32 (suspicious)", "9", "–"]]
    raises = {**alone, "loss": [[None, None], [None, None]], "raises": [["IndexError: 10", None], [None, None]]}
    [rows] = table(titles.BATCH_AND_WEIGHTS, data_or_state=raises)
    assert rows[1:] == [["32 (suspicious)", "IndexError: 10", "–"]]


def test_the_table_of_trials() -> None:
    [rows] = table(titles.TRIALS)
    assert rows == [
        ["what was tried", "result", "last losses"],
        ["nothing changed", "does not hold: not finite", "4, 19, 95, nan"],
        ["gradients clipped at the norm 2.8", "does not hold", "4, 8"],
        ["another batch at step 40", "does not hold", "4, 18"],
        ["other batches at steps 40 to 42", "does not hold", "inf"],
        ["learning rate warmed up over 17 steps", "holds", "4, 3.5"],
        ["eps = 0.01 in norm1", "holds", "4"],
        ["learning rate / 4", "does not hold: loss high", "4, 9"],
        ["learning rate / 8", "holds", "–"],
    ]
    assert "holds is 0.0186" in tables_of(EVIDENCE)[titles.TRIALS][0].note


def test_the_other_tables() -> None:
    worst, alone, raising = table(titles.SAMPLES)
    assert worst[1] == ["5", "img_005", "0", "0", "900", "0.95", "ab12"]
    assert alone == [["row", "loss"], ["5", "10000"]]
    assert raising[1] == ["7", "0", "0"]
    place = {"row": 3, "rank": 0, "micro_batch": 0}
    moved = {"moved": [{**place, "layer": "net.1", "share": 0.997}], "without": {"rows": [place], "loss": 0.0016}}
    *_, moving, without, _ = table(titles.SAMPLES, samples={**EVIDENCE["samples"], **moved})
    assert moving[1] == ["3", "0", "0", "net.1", "0.997"]
    assert without == [["row", "rank", "micro-batch"], ["3", "0", "0"]]
    back, growth, largest = table(titles.PARAMETERS)
    assert back[1:] == [
        ["nothing", "18.5", "19.1", "–", "–"],
        ["fc", "4.4", "5", "17", "18"],
        ["fc.bias", "18", "19", "4.1", "4.2"],
        ["all parameters", "4.1", "4.2", "–", "–"],
    ]
    assert growth[0][:3] == ["parameter", "norm at step 32", "norm at step 40"]
    assert largest[1] == ["fc.weight", "matrix", "2", "0.1", "640"]
    [rows] = table(titles.INPUTS)
    assert rows[0][5:7] == ["range of other batches", "outside of it"]
    assert rows[2][5:8] == ["0 to 9", "1", "1"]
    [[_, *same]] = table(titles.SAME)
    assert [
        "losses, norms and weights as in the run",
        "no: the loss of step 47 is the first that differs, by 1.5e-07 of itself",
    ] in same
    assert [
        "what the replay took",
        "170 steps, 400 forward passes of micro-batches, 200 backward passes, 9.5 s in all, 0.05 s a step",
    ] in same
    [[_, *same]] = table(titles.SAME, same={"from": 1, "to": 2, "first_difference": None, "repeatable": True})
    assert same[:3] == [
        ["steps made again", "1 to 2"],
        ["losses, norms and weights as in the run", "yes, all of them"],
        ["a step repeats itself", "yes, bit for bit"],
    ]
    [[_, *bad]] = table(titles.FIRST_BAD)
    assert ["largest finite value of the dtype", "65504"] in bad
    assert ["what is wrong", "values are not finite"] in bad
    [[heads, layer]] = table(titles.NORM_LAYERS)
    assert layer == ["norm1", "BatchNorm2d", "1e-05", "channel", "64", "1", "17", "1e-12", "0.3", "0.9"]
    assert len(heads) == len(layer)


def test_texts_of_a_replay_are_escaped(tmp_path: Path) -> None:
    hostile = "</p><script>alert(1)</script>\x1b[31m"
    findings = make_findings(sentence=hostile, refuted_by=hostile, suggestion=hostile)
    folder = make_run(tmp_path / "run", tails=False)
    capsule = make_capsule(folder / "capsules" / "<b>'\"")
    texts = {"trials": {hostile: {"holds": True, "losses": [hostile]}}, "inputs": [{"path": hostile}]}
    make_replay(capsule, findings, **texts, first_bad={"module": hostile, "error": hostile})
    page = Page(write_page(load_runs(folder), tmp_path / "report.html"))
    assert len(page.scripts) == 3
    assert "<script>alert" not in page.text
    assert html.escape("</p><script>alert(1)</script>") in page.text
    assert 'id="run-capsule-b-' in page.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def altered(draw: st.DrawFn) -> Any:
    """The evidence with other values in some places."""

    def alter(value: Any, depth: int) -> Any:
        if draw(st.integers(0, 9)) == 0:
            return draw(JSON)
        if isinstance(value, dict):
            return {key: alter(part, depth + 1) for key, part in value.items()}
        return [alter(part, depth + 1) for part in value] if isinstance(value, list) else value

    key = draw(st.sampled_from([*EVIDENCE]))
    return {**EVIDENCE, key: alter(EVIDENCE[key], 0)}


@settings(max_examples=100, deadline=None)
@given(altered())
def test_evidence_of_any_form_makes_tables_of_text(evidence: dict[str, Any]) -> None:
    for tables in tables_of(evidence).values():
        for shown in tables:
            assert all(isinstance(text, str) and len(text) < 6500 for row in shown.rows for text in row.values())
            assert all(len(row) == len(shown.rows[0]) for row in shown.rows)
            assert "<script" not in table_element(shown.rows)


def test_evidence_that_answers_nothing_makes_no_tables() -> None:
    assert tables_of(dict.fromkeys(KEYS)) == {}
    assert tables_of({}) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evidence.json", "{", "evidence.json is damaged: it is no JSON"),
        ("evidence.json", '{"same": 3}', "evidence.json is not of a replay: same is of the type int"),
        ("findings.json", '{"causes": []}', "findings.json is not of a replay"),
        ("findings.json", None, "replay is not a replay: it has no findings.json"),
        ("records/replay_losses-000.arrows", "x", "replay_losses-000.arrows"),
        ("", "a file", "replay"),
    ],
)
def test_of_a_damaged_replay_there_is_a_sentence_and_the_capsule(
    run: Path, name: str, content: str | None, message: str
) -> None:
    folder = run / "capsules" / CAPSULE / "replay"
    if name == "":
        shutil.rmtree(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name if name else folder).write_text(content)
    [loaded] = load_runs(run)
    [problem] = loaded.capsule_problems
    assert message in problem
    section = capsules_section(loaded, Gallery())
    assert f'<p class="error">run: {html.escape(problem)}</p>' in section
    assert f"<h2>run, capsule {CAPSULE}</h2>" in section
    assert "replayed</h2>" not in section


def test_the_command_says_which_replay_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "capsules" / CAPSULE / "replay" / "findings.json"
    path.write_text('{"causes": 3, "facts": [], "notes": []}')
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"normzoo: left out: {path} is not of a replay: ")
    assert "likeliest" not in printed.out


def test_the_command_prints_the_causes_below_the_capsule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("- Replayed; "))
    assert lines[place - 1].startswith("- At steps 28, 30, 31")
    assert lines[place] == (f"- Replayed; the likeliest cause, high confidence: {SENTENCE} {REFUTED} {SUGGESTION}")
    assert lines[place + 1] == "- Also possible, low confidence: Cause 1."
    assert lines[place + 2].startswith("report: ")


def test_of_many_causes_the_first_three_are_told() -> None:
    told = causes_of(make_findings(*titles.TITLES[:5]))
    assert len(told) == 3
    assert told[-1] == "Also possible, low confidence: Cause 2."


def test_anchors_are_the_same_in_each_report_and_differ() -> None:
    assert anchor("Loss along the update", "a run, capsule 0") == "a-run-capsule-0-loss-along-the-update"
    assert anchor("<b>'\"&", "ü") == "ü-b"
