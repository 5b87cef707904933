"""benchmarks/reproduction.py: commands from headers, going on after a kill, records without paths, pictures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from experiments_small import Draws
from ranks import TESTS, start_script

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import reproduction
from reproduction import commands, draw, keep, pictures, run_all, times

from normzoo._yaml_text import parse
from normzoo.cli._resume import locked
from normzoo.cli.main import main
from normzoo.cli.recipe import shipped
from normzoo.records.reading import load_run
from normzoo.records.segments import Segment
from normzoo.report import load_runs

DEADLINE = 120  # seconds
TINY = """# How large?
#
# Command:   normzoo sweep tiny.yaml --out runs/tiny   (an explanation)
#            normzoo run tiny.yaml seed=7 --out runs/one
# Time:      1 s
# Figure:    Sums of draws; runs *seed=2*; file sums.png
#            Sums of draws
experiment: {class_path: experiments_small.Draws, init_args: {sizes: [1, 2, 3]}}
sweep: {seed: [1, 2]}
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, in which commands run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(TESTS)])
    monkeypatch.setattr(reproduction, "shipped", lambda: {"paper_tiny": TINY})
    monkeypatch.setattr(reproduction, "run", run_here)
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)  # drawing takes longer than these
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.yaml").write_text(TINY)
    return tmp_path / "out"


def run_here(words: Sequence[str], folder: Path) -> int:
    with contextlib.chdir(folder):
        return main([*words])


def killed_in_between(text: str, out: str) -> None:
    """For a process of its own."""
    reproduction.shipped = lambda: {"paper_tiny": text}
    reproduction.run = run_here
    reproduction.run_all(["paper_tiny"], Path(out), None)


def test_the_commands_of_shipped_recipes_are_ones_that_the_script_runs() -> None:
    papers = [name for name in shipped() if name.startswith(reproduction.PREFIX)]
    assert papers
    folders = []
    for name in papers:
        own = commands(name)
        assert own, f"{name} has no command"
        for command in own:
            verb, recipe, *rest = command.words
            assert verb in ("run", "sweep", "replay")
            if verb != "replay":
                assert recipe == name
                assert command.folder.startswith("runs/"), f"{command.text}: no --out runs/NAME"
                assert all("=" in word for word in rest if word not in ("--out", command.folder))
                folders.append(command.folder)
    assert len(folders) == len(set(folders))
    assert set(reproduction.chosen(None)) == {name for name in papers if not name.endswith("_full")}


def test_commands_stand_in_the_header_without_what_is_said_of_them(out: Path) -> None:
    first, second = commands("paper_tiny")
    assert first.text == "normzoo sweep tiny.yaml --out runs/tiny"
    assert (first.folder, second.folder) == ("runs/tiny", "runs/one")
    assert second.words == ["run", "tiny.yaml", "seed=7", "--out", "runs/one"]


def test_data_is_given_or_downloaded(out: Path) -> None:
    command = reproduction.Command("x", "normzoo run x data.root=FOLDER --out runs/x")
    data = out.parent / "images"
    assert reproduction.to_run(command, out, data)[0] == ["run", "x", f"data.root={data}", "--out", "runs/x"]
    downloaded = ["run", "x", "data.root=data", "data.download=true", "--out", "runs/x"]
    assert reproduction.to_run(command, out, None) == (downloaded, False)


def test_commands_run_once_and_their_time_is_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all(["paper_tiny"], out, None) == []
    told = capsys.readouterr().out
    assert "out$ normzoo sweep tiny.yaml --out runs/tiny\n" in told
    assert told.splitlines()[-1].endswith("  in all")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_all(["paper_tiny"], out, None) == []
    assert "$ normzoo" not in (again := capsys.readouterr().out)
    assert again.splitlines() == told.splitlines()[-3:]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_command_that_fails_is_told_and_run_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "tiny.yaml").write_text(TINY.replace("sizes: [1, 2, 3]", "at: 2, what: fails"))
    assert run_all(["paper_tiny"], out, None) == ["paper_tiny"]
    assert "normzoo sweep tiny.yaml --out runs/tiny: exit code 1 after 0:00:0" in capsys.readouterr().out
    assert not (out / "runs" / "one").exists()  # what may need the first command's folder is not run
    for recipe in [out / "tiny.yaml", *out.glob("runs/*/*.yaml"), *out.glob("runs/*/*/*.yaml")]:
        recipe.write_text(recipe.read_text().replace("fails", "nothing"))
    assert run_all(["paper_tiny"], out, None) == []
    assert "runs/tiny  (since it was resumed)" in capsys.readouterr().out


def test_a_signal_to_a_command_ends_the_script(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "run", lambda words, folder: 143)
    with pytest.raises(SystemExit, match="143"):
        run_all(["paper_tiny"], out, None)
    assert not (out / reproduction.PROGRESS).exists()


def test_a_kill_loses_no_part(out: Path) -> None:
    shutil.copy(TESTS / "experiments_small.py", out)
    kills = TINY.replace("sizes: [1, 2, 3]", "at: 2, what: SIGKILL")
    (out / "tiny.yaml").write_text(kills)
    script = (
        f"import sys\nsys.path += [{str(TESTS)!r}]\nimport test_reproduction\n"
        f"test_reproduction.killed_in_between({kills!r}, '.')\n"
    )
    assert start_script(out, script).ended_with(DEADLINE) == [-9]
    [killed] = out.glob("runs/tiny/*/metrics/*.arrows")
    first = killed.read_bytes()
    forks = start_script(out, script)
    assert forks.ended_with(DEADLINE) == [0], forks.output
    assert killed.read_bytes() == first  # its first part was not made again
    progress = json.loads((out / reproduction.PROGRESS).read_text())
    assert [each["resumed"] for each in progress.values()] == [True, False]
    steps = [load_run(path.parent)["draws"]["step"].unique().tolist() for path in out.glob("runs/**/metrics")]
    assert steps == [[0, 1, 2]] * 3


@pytest.mark.slow
def test_a_signal_goes_to_the_command_as_well(out: Path) -> None:
    """In processes as they are, with nothing in the place of another."""
    shutil.copy(TESTS / "experiments_small.py", out)
    waits = TINY.replace("sizes: [1, 2, 3]", "at: 2, what: waits")
    (out / "tiny.yaml").write_text(waits)
    script = (
        f"import sys\nsys.path += [{str(Path(reproduction.__file__).parent)!r}]\nimport reproduction\nfrom pathlib "
        f"import Path\nreproduction.shipped = lambda: {{'paper_tiny': {waits!r}}}\n"
        "reproduction.run_all(['paper_tiny'], Path('.'), None)\n"
    )
    forks = start_script(out, script)
    end = time.monotonic() + DEADLINE
    while not (out / "waiting").exists():
        assert forks.running, forks.output
        assert time.monotonic() < end, forks.output
        time.sleep(0.05)
    os.kill(forks.pids[0], signal.SIGTERM)
    assert forks.ended_with(DEADLINE) == [143], forks.output
    [first] = load_runs(out / "runs" / "tiny")
    assert (first.state, first.status["error"]) == ("interrupted", "SIGTERM")
    assert first.record("draws")["step"].tolist() == [0, 0, 1, 1]


def test_a_training_run_that_was_cut_short_is_cleared_within_the_folder(out: Path) -> None:
    (out / "runs" / "one").mkdir(parents=True)
    (out / "runs" / "one" / "recipe.yaml").write_text("model: {arch: x}\n")
    command = reproduction.Command("x", "normzoo run x --out runs/one")
    assert reproduction.to_run(command, out, None) == (["run", "x", "--out", "runs/one"], False)
    assert not (out / "runs" / "one").exists()
    (out.parent / "elsewhere").mkdir()
    with pytest.raises(SystemExit, match="is not in"):
        reproduction.to_run(reproduction.Command("x", "normzoo run x --out ../elsewhere"), out, None)
    assert (out.parent / "elsewhere").exists()


def test_a_training_run_that_has_ended_unnoted_is_reported_alone(out: Path) -> None:
    (out / "runs" / "one").mkdir(parents=True)
    (out / "runs" / "one" / "recipe.yaml").write_text("model: {arch: x}\n")
    (out / "runs" / "one" / "status.json").write_text('{"state": "diverged"}')
    command = reproduction.Command("x", "normzoo run x --out runs/one")
    assert reproduction.to_run(command, out, None) == (["report", "runs/one"], True)
    assert (out / "runs" / "one" / "status.json").exists()


def test_a_command_that_outlived_the_script_is_waited_for(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out / "runs"
    folder.mkdir()
    with contextlib.ExitStack() as other:
        other.enter_context(locked(folder))
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                other.close()

        monkeypatch.setattr(reproduction.time, "sleep", pause)
        reproduction.wait_for(folder)
    assert len(pauses) == 2
    assert capsys.readouterr().out == f"waiting: {folder}: another process is still running there\n"
    reproduction.wait_for(out / "missing")


def add_files_of_a_training_run(run: Path) -> None:
    (run / "metrics" / "metrics.csv").write_text("step,train/loss\n0,2.5\n1,2.25\n")
    (run / "metrics" / "diverged.ckpt").write_bytes(b"0" * 1000)
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events").write_bytes(b"0" * 1000)
    recipe = run / "recipe.yaml"
    recipe.write_text(f"data: {{name: cifar10, root: {run}, files: [{run}, of_it]}}\n{recipe.read_text()}")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "error": f"OSError: {run}/metrics is full, 3/4 of 1"}))


def test_records_are_kept_without_paths_and_drawn_again(out: Path) -> None:
    assert main(["sweep", "out/tiny.yaml", "--out", "runs/tiny"]) == 0
    folder = out.parent / "runs" / "tiny"
    add_files_of_a_training_run(folder / "01-seed=1")
    target = keep(folder, "paper_tiny", out / "records")
    kept = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    names = ["environment.json", "metrics/draws-000.arrows", "recipe.yaml", "status.json"]
    first = {f"01-seed=1/{name}" for name in (*names, "metrics/metrics.csv")}
    assert kept == {"sweep.yaml"} | first | {f"02-seed=2/{name}" for name in names}
    assert not [path for path in target.rglob("*") if path.is_file() and str(out.parent).encode() in path.read_bytes()]
    environment = json.loads((target / "01-seed=1" / "environment.json").read_text())
    assert environment["command"] == "normzoo sweep tiny.yaml --out runs/tiny"
    assert set(environment) == {"command", *reproduction.ENVIRONMENT}
    assert environment["platform"].count("-") <= 1
    assert parse((target / "01-seed=1" / "recipe.yaml").read_text())["data"] == {
        "name": "cifar10",
        "root": "FOLDER",
        "files": ["FOLDER", "of_it"],
    }
    runs = load_runs(target)
    assert runs[0].status["error"] == "OSError: FOLDER is full, 3/4 of 1"
    assert runs[0].curve("train/loss") == ([0, 1], [2.5, 2.25])
    for run, original in zip(runs, load_runs(folder), strict=True):
        assert run.record("draws").to_string() == original.record("draws").to_string()

    (out / "images").mkdir()
    draw("paper_tiny", out / "records", out / "images")
    drawn = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    assert drawn.keys() == {"sums.png", "paper-tiny-2.png"}
    assert drawn["sums.png"] != drawn["paper-tiny-2.png"]
    assert main(["report", str(target)]) == 0


def test_the_records_of_a_replay_stand_beside_the_run(out: Path) -> None:
    assert main(["run", "out/tiny.yaml", "--out", "run"]) == 0
    segment = Segment(Path("run/capsules/000_step_00000002/replay/records"), Draws.schema, 0)
    segment.append([{"step": 0, "size": 1, "total": 2.0, "shared": 3.0, "curve": [1.0]}])
    target = keep(Path("run"), "paper_tiny", out / "records")
    assert sorted(path.name for path in target.iterdir()) == ["replay", "run"]
    run, replay = sorted(load_runs(target), key=lambda run: not run.of_recipe)
    assert (run.name, len(run.record("draws"))) == ("run", 6)
    assert (replay.name, len(replay.record("draws"))) == ("replay", 1)
    assert keep(Path("run"), "paper_tiny", out / "records") == target  # again, in its place
    with pytest.raises(SystemExit, match="not the folder of a run"):
        keep(out, "paper_tiny", out / "records")


def test_a_wrong_figure_is_told(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "out/tiny.yaml", "--out", "records/paper_tiny"]) == 0
    monkeypatch.setattr(reproduction, "shipped", lambda: {"paper_tiny": TINY.replace("Sums of draws; ", "Sums; ")})
    with pytest.raises(SystemExit, match="there is no figure 'Sums'; there are "):
        draw("paper_tiny", Path("records"), Path())
    monkeypatch.setattr(reproduction, "shipped", lambda: {"paper_tiny": TINY.replace("; file", "; fle")})
    with pytest.raises(SystemExit, match="fle is neither runs nor file"):
        pictures("paper_tiny")
    monkeypatch.setattr(reproduction, "shipped", lambda: {"paper_tiny": TINY.replace("Figure:", "Figure")})
    capsys.readouterr()
    draw("paper_tiny", Path("records"), Path())
    assert "no '# Figure:' in its header; there are Sums of draws" in capsys.readouterr().out


def test_an_unfinished_run_is_not_kept(out: Path) -> None:
    assert main(["run", "out/tiny.yaml", "experiment.at=2", "experiment.what=fails", "--out", "run"]) == 1
    with pytest.raises(SystemExit, match="run: run is failed; records are kept of what has finished or diverged"):
        keep(Path("run"), "paper_tiny", out / "records")
    assert not (out / "records").exists()


KEPT = sorted(path for path in reproduction.RECORDS.glob("*/")) if reproduction.RECORDS.is_dir() else []


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_what_is_kept_is_small_and_names_no_path_of_a_machine(folder: Path) -> None:
    assert folder.name in shipped()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= reproduction.MOST
    assert {path.suffix for path in files} <= {".yaml", ".json", ".csv", ".arrows"}
    for path in files:
        if path.suffix != ".arrows":
            assert not reproduction.PATH.search(path.read_text()), path
        if path.name == "environment.json":
            assert set(json.loads(path.read_text())) <= {"command", *reproduction.ENVIRONMENT}
    load_runs(folder)


@pytest.mark.slow
@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_the_figures_that_recipes_name_are_drawn_from_what_is_kept(folder: Path, tmp_path: Path) -> None:
    draw(folder.name, images=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {picture.file for picture in pictures(folder.name)}
    for path in tmp_path.iterdir():
        assert (reproduction.IMAGES / path.name).exists()


def test_times() -> None:
    ended = {
        "normzoo run a": {"recipe": "a", "seconds": 3725.4, "resumed": False},
        "normzoo run b": {"recipe": "b", "seconds": 59.6, "resumed": True},
    }
    assert times(ended).splitlines() == [
        " 1:02:05  normzoo run a",
        " 0:01:00  normzoo run b  (since it was resumed)",
        " 1:03:05  in all",
    ]
