"""Run folders with damaged files: what is good is reported, what is not is named."""

from __future__ import annotations

import html
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damages import DAMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run
from sweeps import EXAMPLES

from normzoo import load_run
from normzoo._yaml_text import MAX_LENGTH, dump, parse
from normzoo.cli.main import main
from normzoo.records.segments import RecordError
from normzoo.report import RunError, load_runs, read_runs, write_page

FILES = (
    "recipe.yaml",
    "status.json",
    "environment.json",
    "metrics/metrics.csv",
    "metrics/gradient_tails-000.arrows",
    "metrics/relative_loss-000.arrows",
    "metrics/divergence-000.arrows",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("good") / "run", diverged=7)
    (folder / "environment.json").write_text(json.dumps({"command": ["normzoo", "run"], "git": {"dirty": None}}))
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the figures of a page takes longer than all else, for tests that look only at its text."""
    for name in ("draw_logged", "draw_recorded"):
        monkeypatch.setattr(f"normzoo.report.page.{name}", lambda *given: {})
    monkeypatch.setattr("normzoo.report.page.layer_maps", lambda runs: [])


def hold_reading(folder: Path, name: str, draw: bool = False) -> bool:
    """Whether the damage was noticed; either way readers answer as they promise."""
    runs, damaged = read_runs(folder.parent)
    assert len(runs) + len(damaged) == 2
    assert runs[0].name == "a_good_run"
    for run in damaged:
        assert str(folder / name) in run.problem
        assert len(run.problem.splitlines()) == 1
        with pytest.raises((RunError, RecordError), match=name.rsplit("/", 1)[-1].replace(".", r"\.")):
            load_runs(folder)
    try:
        load_run(folder)
    except RecordError as error:
        assert str(folder / name) in str(error)  # noqa: PT017
        assert damaged
    if draw:
        write_page(runs, folder.parent / "report.html", damaged)
    return bool(damaged)


@pytest.fixture(scope="module")
def two_runs(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for name in ("a_good_run", "run"):
        shutil.copytree(good, root / name)
    return root / "run"


def damage_one_file(folder: Path, name: str, kind: Callable[..., bytes], seed: int, draw: bool) -> bool:
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(kind(whole, random.Random(seed)))
    try:
        return hold_reading(folder, name, draw)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_one_damaged_file_of_each_kind(two_runs: Path, name: str) -> None:
    noticed = [damage_one_file(two_runs, name, kind, 5, draw=False) for kind in DAMAGES]
    assert any(noticed)


def fuzz(folder: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(st.sampled_from(FILES), st.sampled_from(DAMAGES), st.integers(0, 2**32))
    def property_holds(name: str, kind: Callable[..., bytes], seed: int) -> None:
        damage_one_file(folder, name, kind, seed, draw=seed % 32 == 31)

    property_holds()


def test_damaged_files(two_runs: Path) -> None:
    fuzz(two_runs, 15)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_damaged_files(two_runs: Path) -> None:
    fuzz(two_runs, EXAMPLES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", "[1, 2]"),
        ("status.json", '{"state": "finished", "seconds": "12"}'),
        ("status.json", '{"state": "finished", "seconds": -1, "error": ""}'),
        ("status.json", '{"state": "finished", "seconds": NaN, "error": ""}'),
        ("status.json", '{"state": "done"}'),
        ("status.json", '{"state": "failed", "error": 3}'),
        ("status.json", '{"state": []}'),
        ("environment.json", '"text"'),
        ("environment.json", "[" * 100_000),
        ("environment.json", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
        ("recipe.yaml", "a: ["),
        ("recipe.yaml", "- a\n- b"),
        ("recipe.yaml", "a: 1\na: 2"),
        ("recipe.yaml", "a: &a [*a]"),
        (
            "recipe.yaml",
            "a: &a [0, 0, 0, 0, 0, 0, 0, 0]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in itertools.pairwise("abcdefghijkl")),
        ),
        ("recipe.yaml", "a: " + "[" * 2000 + "]" * 2000),
        ("recipe.yaml", "callbacks: 3"),
        ("recipe.yaml", "callbacks: [[1]]"),
        ("recipe.yaml", "callbacks: [{every_n_steps: 1}]"),
        ("recipe.yaml", "a: !!python/object:os.system {}"),
        ("metrics/metrics.csv", "epoch,loss\n1,2\n"),
        ("metrics/metrics.csv", "step,loss,loss\n1,2,3\n"),
        ("metrics/metrics.csv", "step,loss\ninf,2\n"),
        ("metrics/metrics.csv", "step,loss\n1.5,2\n"),
        ("metrics/metrics.csv", "step,loss\n1,2,3\n"),
        ("metrics/metrics.csv", "step,loss\n1,2\n2,0.x\n"),
        ("metrics/metrics.csv", 'step,loss\n1,"2\n'),
    ],
)
def test_valid_files_with_wrong_content(good: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(good, tmp_path / "a_good_run")
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert hold_reading(tmp_path / "run", name)


def test_the_reason_and_the_line_in_a_recipe_are_named(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "run")
    (folder / "recipe.yaml").write_text("seed: 1\nmodel:\n  norm: group\n  norm: batch\n")
    text = r"recipe\.yaml is damaged, line 4: it is not a recipe in YAML \(key 'norm' twice\)$"
    with pytest.raises(RunError, match=text):
        load_runs(folder)


@pytest.mark.usefixtures("no_figures")
def test_a_recipe_is_read_as_the_command_reads_it(good: Path, tmp_path: Path) -> None:
    """Dates and sexagesimal numbers are text; aliases may make the recipe of the run longer than the user's."""
    folder = shutil.copytree(good, tmp_path / "run")
    text = (
        "a: &a "
        + 50_000 * "x"
        + "\nb: ["
        + ", ".join(10 * ["*a"])
        + "]\ntrainer: {max_time: 10:00:00:00, x: 2001-01-01}\n"
    )
    config = parse(text)
    written = dump(config)
    assert len(text) < MAX_LENGTH < len(written)
    (folder / "recipe.yaml").write_text(written)
    [run] = load_runs(folder)
    assert run.config == config
    assert run.config["trainer"] == {"max_time": "10:00:00:00", "x": "2001-01-01"}
    page = html.unescape(write_page([run], tmp_path / "report.html").read_text())
    assert "max_time: '10:00:00:00'\n  x: '2001-01-01'" in page


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["folder", "pipe", "link to itself"])
def test_something_else_in_the_place_of_a_file(good: Path, tmp_path: Path, name: str, what: str) -> None:
    shutil.copytree(good, tmp_path / "a_good_run")
    shutil.copytree(good, tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to itself": lambda: path.symlink_to(path)}[what]()
    assert hold_reading(tmp_path / "run", name)


def test_records_that_changed_places(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "a_good_run")
    folder = shutil.copytree(good, tmp_path / "run") / "metrics"
    shutil.copy(folder / "divergence-000.arrows", folder / "relative_loss-000.arrows")
    assert hold_reading(tmp_path / "run", "metrics/relative_loss-000.arrows")


def test_a_run_without_its_recipe_is_named(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "a_good_run")
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert hold_reading(tmp_path / "run", "recipe.yaml")


@pytest.mark.usefixtures("no_figures")
def test_the_command_reports_what_is_good(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good, tmp_path / "[red]:smile:")
    for name in ("bad", "worse"):
        shutil.copytree(good, tmp_path / name)
        (tmp_path / name / "status.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "[red]:smile:" in printed.out.replace("\n", "")
    assert printed.err.splitlines() == [
        f"normzoo: left out: {tmp_path / name / 'status.json'} is damaged: it is not valid JSON"
        for name in ("bad", "worse")
    ]
    page = (tmp_path / "report.html").read_text()
    assert page.count("is left out") == 2

    shutil.rmtree(tmp_path / "[red]:smile:")
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "bad")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 3


@pytest.mark.usefixtures("no_figures")
def test_a_report_that_cannot_be_written_is_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(good, tmp_path / "run")
    (folder / "report.html").write_text("earlier")

    def full(path: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(folder)]) == 2
    assert "report.html.part: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert (folder / "report.html").read_text() == "earlier"
