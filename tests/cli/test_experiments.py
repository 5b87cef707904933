"""Recipes of experiments that are no training runs: run, swept, checked, cut short and resumed, reported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas.testing
import pytest
import yaml
from ranks import TESTS, start_command

from normzoo.cli.main import main
from normzoo.cli.run import locked
from normzoo.records.reading import load_run
from normzoo.report import load_runs

DEADLINE = 120  # seconds
DRAWS = """# How large are sums of draws?
seed: 5
experiment: {class_path: experiments_small.Draws, init_args: {sizes: [1, 2, 3, 4]}}
"""
OF_TASK = """
experiment: {class_path: experiments_small.OfTask, init_args: {batches: 2}}
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 8}
optimizer: {name: sgd, lr: 0.1}
"""
TRAINED = """
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 0, log_every_n_steps: 1,
          enable_checkpointing: false, enable_model_summary: false, enable_progress_bar: false}
sweep: {optimizer.lr: [0.1, 0.2, 0.3]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(TESTS)])
    (tmp_path / "draws.yaml").write_text(DRAWS)
    (tmp_path / "of_task.yaml").write_text(OF_TASK)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)


def told(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that is refused says."""
    assert main([*command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def assert_same_record(first: Path, second: Path) -> None:
    one, other = load_run(first), load_run(second)
    assert one.keys() == other.keys()
    for name, frame in one.items():
        pandas.testing.assert_frame_equal(other[name], frame, check_exact=True)


def test_a_run_leaves_a_folder_like_any_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "draws.yaml", "--out", "run"]) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    names = {str(path.relative_to("run")) for path in Path("run").rglob("*") if path.is_file()}
    assert names == {"recipe.yaml", "environment.json", "status.json", "report.html", "metrics/draws-000.arrows"}
    [run] = load_runs(folder / "run")
    assert (run.state, run.status["error"]) == ("finished", "")
    assert run.record("draws")["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    page = (folder / "run" / "report.html").read_text()
    assert "Sums of draws" in page
    assert "experiments_small.Draws" in page
    assert main(["run", "run/recipe.yaml", "--out", "again"]) == 0
    assert_same_record(folder / "run", folder / "again")


@pytest.mark.usefixtures("no_report")
def test_data_and_task_are_made_as_for_a_run(folder: Path) -> None:
    assert main(["run", "of_task.yaml", "--out", "run"]) == 0
    first = load_run(folder / "run")["of_task"]["loss"].tolist()
    assert len(first) == 2
    assert 1 < first[0] < 10
    assert main(["run", "of_task.yaml", "seed=1", "--out", "other"]) == 0
    assert load_run(folder / "other")["of_task"]["loss"].tolist() != first


@pytest.mark.usefixtures("no_report")
def test_a_section_for_an_argument_with_a_default_may_be_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "of_task.yaml", "experiment.class_path=experiments_small.OfTaskOrNone"]
    assert main([*given, "--out", "with"]) == 0
    assert main([*given, "model=null", "optimizer=null", "--out", "without"]) == 0
    losses = [load_run(folder / name)["of_task_or_none"]["loss"][0] for name in ("with", "without")]
    assert losses[0] != losses[1]
    capsys.readouterr()
    error = told(capsys, *given, "model=null", "--out", "more")
    assert "the section 'model' is missing; OfTaskOrNone takes it" in error


def test_a_sweep_of_experiments(folder: Path) -> None:
    assert main(["sweep", "draws.yaml", "sweep={seed: [1, 2], experiment.sizes: [[1], [1, 2]]}", "--out", "sweep"]) == 0
    runs = load_runs(folder / "sweep")
    assert [run.state for run in runs] == ["finished"] * 4
    assert [len(run.record("draws")) for run in runs] == [2, 4, 2, 4]
    totals = [run.record("draws")["total"].tolist() for run in runs]
    assert totals[0] == totals[1][:2]
    assert totals[0] != totals[2]
    assert (folder / "sweep" / "report.html").exists()


def test_validate_makes_no_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "draws.yaml", "experiment.at=1", "experiment.what=fails"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "draws.yaml: valid\n"
    assert captured.err == "draws.yaml: none of the 4 parts of the experiment was tried\n"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["experiment=random_matrice"], ["experiment: 'random_matrice'", "did you mean 'random_matrices'"]),
        (["experiment=drws"], ["experiment: 'drws' is not a known experiment", "class_path"]),
        (["experiment.init_args.sises=[1]"], ["experiment.sises: 'sises' is not a known option of Draws", "'sizes'"]),
        (["experiment.sizes=many"], ["experiment.sizes: expected", "'many'"]),
        (["experiment.seed=3"], ["experiment.seed: give it in the section seed of the recipe"]),
        (["seed=-1"], ["seed: must be a whole number"]),
        (["experiment=torch.nn.Linear"], ["'torch.nn.Linear' is not a subclass of Experiment"]),
        (["experiment=experiments_small.Drawz"], ["cannot import 'experiments_small.Drawz'"]),
        (["experiment=experiments_small.NoParts"], ["NoParts has no parts with these arguments"]),
        (["experiment=experiments_small.BadParts"], ["BadParts.parts() must give a mapping for each part, not 1"]),
        (["experiment=experiments_small.FailingParts"], ["FailingParts.parts() fails: KeyError: 'sizes'"]),
        (["experiment=experiments_small.Nameless"], ["Nameless has no name for its record"]),
        (["data=fashion_mnist"], ["data: Draws takes nothing from this section; leave it out"]),
        (["trainer.max_steps=1"], ["trainer: Draws takes nothing from this section"]),
        (["callbacks=[divergence]"], ["callbacks: Draws takes nothing from this section"]),
        (["experiment=null"], ["the section 'model' is missing", "or an experiment"]),
    ],
    ids=lambda value: value[0][:40],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], messages: list[str]
) -> None:
    error = told(capsys, "run", "draws.yaml", *overrides, "--out", "run")
    assert all(message in error for message in messages), error
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=null"], "the section 'data' is missing; OfTask takes it"),
        (["model=null", "optimizer=null"], "the section 'model' is missing; OfTask takes it"),
        (["experiment.batches=null"], "experiment.batches: expected a value, not null"),
        (["experiment={class_path: experiments_small.OfTask}"], "experiment: batches must be given"),
        (["model.norm=gruop"], "model.norm: 'gruop' is not a known norm; did you mean 'group'"),
        (["data.rot=x"], "data.rot: 'rot' is not a known option"),
    ],
)
def test_what_is_wrong_with_data_and_task_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in told(capsys, "run", "of_task.yaml", *overrides, "--out", "run")


@pytest.mark.usefixtures("no_report")
def test_a_part_that_fails_fails_the_run_and_is_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "draws.yaml", "experiment.at=3", "experiment.what=fails", "--out", "run"]) == 1
    [run] = load_runs(folder / "run")
    assert (run.state, run.status["error"]) == ("failed", "RuntimeError: this part fails")
    assert run.record("draws")["step"].tolist() == [0, 0, 1, 1]
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("fails", "nothing"))
    assert main(["run", "--resume", "run"]) == 0
    assert main(["run", "draws.yaml", "--out", "whole"]) == 0
    assert_same_record(folder / "whole", folder / "run")


@pytest.mark.usefixtures("no_report")
def test_wrong_columns_fail_the_run(folder: Path) -> None:
    assert main(["run", "draws.yaml", "experiment=experiments_small.WrongColumns", "--out", "run"]) == 1
    [run] = load_runs(folder / "run")
    assert "columns differ from the record's" in run.status["error"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_between_two_parts(folder: Path, name: str, code: int) -> None:
    shutil.copy(TESTS / "experiments_small.py", folder)
    arguments = ["experiment.at=2", f"experiment.what={name}", "--out", "run"]
    forks = start_command(folder, "run", "draws.yaml", *arguments)
    assert forks.ended_with(DEADLINE) == [code], forks.output
    [run] = load_runs(folder / "run")
    assert (run.state, run.status["error"]) == ("interrupted", name)
    assert run.record("draws")["step"].tolist() == [0, 0, 1, 1]  # the part that it came in is made
    assert (folder / "run" / "report.html").exists()
    assert main(["run", "--resume", "run"]) == 0
    assert main(["run", "draws.yaml", "--out", "whole"]) == 0
    assert_same_record(folder / "whole", folder / "run")


def test_a_run_that_was_killed_goes_on_with_the_same_numbers(folder: Path) -> None:
    shutil.copy(TESTS / "experiments_small.py", folder)
    killed = ["experiment.at=3", "experiment.what=SIGKILL", "--out", "run"]
    forks = start_command(folder, "run", "draws.yaml", *killed)
    assert forks.ended_with(DEADLINE) == [-9], forks.output
    assert load_runs(folder / "run")[0].state == "unfinished"
    assert load_run(folder / "run")["draws"]["step"].tolist() == [0, 0, 1, 1]
    seconds = json.loads((folder / "run" / "status.json").read_text())["seconds"]
    assert seconds > 0
    with (folder / "run" / "metrics" / "draws-000.arrows").open("r+b") as file:  # as if it was killed in a write
        file.truncate(file.seek(0, 2) - 20)
    forks = start_command(folder, "run", "--resume", "run")
    assert forks.ended_with(DEADLINE) == [0], forks.output
    [run] = load_runs(folder / "run")
    assert run.state == "finished"
    assert run.status["seconds"] > seconds
    assert run.record("draws").attrs["segments"] == 2
    assert run.record("draws").attrs["broken_batches"] == 1
    assert main(["run", "draws.yaml", "--out", "whole"]) == 0
    assert_same_record(folder / "whole", folder / "run")


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_is_left_as_it_is(folder: Path) -> None:
    assert main(["run", "draws.yaml", "--out", "run"]) == 0
    assert main(["run", "--resume=run"]) == 0
    assert [path.name for path in (folder / "run" / "metrics").iterdir()] == ["draws-000.arrows"]


@pytest.mark.usefixtures("no_report")
def test_a_sweep_goes_on_after_a_kill(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(TESTS / "experiments_small.py", folder)
    grid = "sweep={seed: [1, 2, 3]}"
    forks = start_command(
        folder, "sweep", "draws.yaml", "experiment.at=3", "experiment.what=SIGKILL", grid, "--out", "s"
    )
    assert forks.ended_with(DEADLINE) == [-9], forks.output
    (folder / "killed").unlink()
    forks = start_command(folder, "sweep", "--resume", "s")  # the first goes on from part 2, and kills again
    assert forks.ended_with(DEADLINE) == [-9], forks.output
    first = (folder / "s" / "01-seed=1" / "metrics" / "draws-000.arrows").read_bytes()
    assert main(["sweep", "--resume", "s"]) == 0
    assert "s: 0 of 3 runs are kept" in capsys.readouterr().out
    assert (folder / "s" / "01-seed=1" / "metrics" / "draws-000.arrows").read_bytes() == first
    assert main(["sweep", "draws.yaml", grid, "--out", "whole"]) == 0
    for name in ("01-seed=1", "02-seed=2", "03-seed=3"):
        assert_same_record(folder / "whole" / name, folder / "s" / name)
    capsys.readouterr()
    assert main(["sweep", "--resume", "s"]) == 0
    assert "s: 3 of 3 runs are kept" in capsys.readouterr().out


def test_a_sweep_of_training_runs_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    (folder / "trained.yaml").write_text(TRAINED)
    assert main(["sweep", "trained.yaml", "--out", "s"]) == 0
    first, second, third = sorted((folder / "s").glob("0*"))
    kept = {path: path.stat().st_mtime_ns for path in [*first.rglob("*"), *third.rglob("*")]}
    losses = (second / "metrics" / "metrics.csv").read_bytes()
    for run, state in ((second, "running"), (third, "diverged")):
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": state}))
    kept[third / "status.json"] = (third / "status.json").stat().st_mtime_ns
    (second / "left over").mkdir()
    (second / "left over" / "file").touch()
    (second / "metrics" / "metrics.csv").write_bytes(losses * 2)
    capsys.readouterr()
    request.getfixturevalue("no_report")
    assert main(["sweep", "--resume", "s"]) == 0
    said = capsys.readouterr()
    assert "s: 2 of 3 runs are kept" in said.out
    assert "02-lr=0.2 has no checkpoint to go on from: the run starts again, in a clean folder" in said.err
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert not (second / "left over").exists()
    assert (second / "metrics" / "metrics.csv").read_bytes() == losses
    assert json.loads((second / "status.json").read_text())["state"] == "finished"


def test_what_cannot_be_resumed_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*command: str) -> str:
        return told(capsys, *command)

    assert "normzoo: expected a recipe, or --resume FOLDER; see normzoo run --help" in says("run")
    assert "leave out draws.yaml" in says("run", "draws.yaml", "--resume", "run")
    assert "leave out --out" in says("run", "--out", "x", "--resume", "run")
    assert "--resume: run is no folder of normzoo run, which has a recipe.yaml" in says("run", "--resume", "run")
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(TRAINED)
    assert "it has a recipe.yaml: use normzoo run --resume" in says("sweep", "--resume", "run")
    (folder / "run" / "recipe.yaml").rename(folder / "run" / "sweep.yaml")
    assert "it has a sweep.yaml: use normzoo sweep --resume" in says("run", "--resume", "run")
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["sweep.yaml"]
    (folder / "run" / "01-lr=0.1").mkdir()
    (folder / "run" / "01-lr=0.1" / "thesis.tex").touch()
    assert main(["sweep", "--resume", "run"]) == 2
    assert "run/01-lr=0.1 holds files that are not of a run, and is not deleted" in capsys.readouterr().err
    assert (folder / "run" / "01-lr=0.1" / "thesis.tex").exists()


@pytest.mark.usefixtures("no_report")
def test_a_folder_that_another_process_runs_in_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "draws.yaml", "sweep.seed=[1]", "--out", "s"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "s").rglob("*")}
    capsys.readouterr()
    with locked(folder / "s"):
        assert "s: another process is still running there" in told(capsys, "sweep", "--resume", "s").splitlines()[-1]
    with locked(folder / "s" / "01-seed=1"):
        assert "01-seed=1: another process is still running there" in told(capsys, "run", "--resume", "s/01-seed=1")
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.usefixtures("no_report")
def test_other_versions_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "draws.yaml", "--out", "run"]) == 0
    path = folder / "run" / "environment.json"
    environment = json.loads(path.read_text())
    environment["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    capsys.readouterr()
    assert main(["run", "--resume", "run"]) == 0
    assert "run goes on with torch " in (error := capsys.readouterr().err)
    assert "(before: 1.0); numbers may differ" in error


def test_only_the_first_process_makes_an_experiment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["run", "draws.yaml", "--out", "run"]) == 0
    assert not (folder / "run").exists()


def test_a_shown_recipe_can_be_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "draws.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(DRAWS)
