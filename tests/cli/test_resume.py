"""``run --resume`` of training runs: cut short anywhere, a run goes on to the end of one that was not."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pandas.testing
import pytest
import torch
from ranks import TESTS, start_command
from resumed_model import CutShort

import normzoo
from normzoo.cli import build as building
from normzoo.cli.main import main
from normzoo.cli.run import locked

RECIPE = """
seed: 5
model: {class_path: resumed_model.Model}
data: {name: fashion_mnist, batch_size: 8}
trainer: {max_epochs: 3, limit_train_batches: 4, limit_val_batches: 2, accelerator: cpu, log_every_n_steps: 1,
          enable_model_summary: false, enable_progress_bar: false}
callbacks: [{name: gradient_norm, every_n_steps: 2}, {name: lr_monitor, logging_interval: step}]
"""
SETTINGS = {
    "epochs": [],
    "steps": ["trainer.max_steps=11", "trainer.max_epochs=-1"],
    "validation within an epoch": ["trainer.val_check_interval=2"],
    "validation in every other epoch": ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4"],
    "no validation": ["trainer.limit_val_batches=0"],
    "accumulated": ["trainer.accumulate_grad_batches=3", "trainer.limit_train_batches=8"],
    "by hand": ["model.manual=true", "trainer.limit_train_batches=4"],
    "one batch": ["trainer.limit_train_batches=1"],
    "own checkpoints": ["callbacks=[{name: model_checkpoint, every_n_train_steps: 3, save_top_k: -1}]"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copy(TESTS / "resumed_model.py", tmp_path)
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
    monkeypatch.setattr("normzoo.cli.rehearse.rehearse", lambda *_: None)
    monkeypatch.setattr("normzoo.cli.run.environment", lambda: {"packages": {}})
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def cut_short(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> CutShort:
    """Have the next runs cut short."""
    callback = CutShort(at, how)
    plain = building.build

    def build(*arguments: Any) -> Any:
        training = plain(*arguments)
        training.callbacks.append(callback)
        return training

    monkeypatch.setattr("normzoo.cli.build.build", build)
    return callback


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of the metrics, in an order of their own: a measurement that is read late logs where it is read."""
    with (run / "metrics" / "metrics.csv").open(newline="") as file:
        found = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return sorted(found, key=lambda row: (int(row["step"]), sorted(row)))


def weights(run: Path) -> dict[str, Any]:
    [path] = (run / "metrics" / "checkpoints").glob("epoch=*.ckpt")
    return torch.load(path, weights_only=True)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for quantity, frame in normzoo.load_run(one).items():
        pandas.testing.assert_frame_equal(normzoo.load_run(other)[quantity], frame)
    a, b = weights(one), weights(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(a[key], b[key])
    assert_same(a["normzoo"]["ranks"], b["normzoo"]["ranks"])
    assert json.loads((other / "status.json").read_text())["state"] == "finished"


def cut_and_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch, setting: list[str], at: int, how: str) -> Path:
    """The folder of a run that was cut short, or ended before, and went on."""
    run = folder / f"{how}-{at}"
    with monkeypatch.context() as patch:
        cut_short(patch, at, how)
        code = main(["run", "r.yaml", *setting, "--out", str(run)])
    if code != 0:
        assert code == (1 if how == "error" else 130)
        assert main(["run", "--resume", str(run)]) == 0
    return run


@pytest.mark.parametrize(
    ("setting", "how", "at"),
    [
        ("epochs", "error", 20),  # within the second epoch
        ("epochs", "signal", 5),  # within the first
        pytest.param("epochs", "signal", 46, marks=pytest.mark.slow),  # within the last validation
        ("steps", "signal", 33),
        pytest.param("accumulated", "signal", 28, marks=pytest.mark.slow),
    ],
)
def test_a_run_cut_short_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str, how: str, at: int
) -> None:
    assert main(["run", "r.yaml", *SETTINGS[setting], "--out", "whole"]) == 0
    assert_same_run(folder / "whole", cut_and_go_on(folder, monkeypatch, SETTINGS[setting], at, how))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "signal"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_cut_short_anywhere_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str, how: str
) -> None:
    with monkeypatch.context() as patch:
        counted = cut_short(patch, -1, how)
        assert main(["run", "r.yaml", *SETTINGS[setting], "--out", "whole"]) == 0
    assert counted.asked > 20
    for at in range(1, counted.asked + 1):
        run = cut_and_go_on(folder, monkeypatch, SETTINGS[setting], at, how)
        if setting != "own checkpoints":
            assert_same_run(folder / "whole", run)
            continue
        assert rows(run) == rows(folder / "whole")
        whole = sorted((folder / "whole" / "metrics" / "checkpoints").iterdir())
        saved = sorted((run / "metrics" / "checkpoints").iterdir())  # some of them twice, as NAME-v1.ckpt
        assert {path.name for path in whole} <= {re.sub(r"-v\d+", "", path.name) for path in saved}
        other = whole[-1]
        one = [path for path in saved if re.sub(r"-v\d+", "", path.name) == other.name][-1]
        assert_same(
            torch.load(one, weights_only=True)["state_dict"], torch.load(other, weights_only=True)["state_dict"]
        )


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_goes_on(folder: Path, kills: int) -> None:
    options = ["trainer.max_epochs=6", "trainer.limit_train_batches=6"]
    assert main(["run", "r.yaml", *options, "--out", "whole"]) == 0
    command = ["run", str(folder / "r.yaml"), *options, "--out", "run"]
    for _ in range(kills):
        process = start_command(folder, *command)
        recipe = folder / "run" / "recipe.yaml"
        while process.running and not recipe.exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        command = ["run", "--resume", "run"]
    assert main(command) in (0, 2)  # 2 if it had finished
    assert_same_run(folder / "whole", folder / "run")


def test_other_loaders_go_on_from_the_start_of_the_epoch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = ["data={class_path: resumed_model.Loose}"]
    assert main(["run", "r.yaml", *loose, "--out", "whole"]) == 0
    capsys.readouterr()
    run = cut_and_go_on(folder, monkeypatch, loose, 24, "signal")
    error = capsys.readouterr().err
    assert "interrupted.ckpt is not used, as the training data's loader does not tell its position" in error
    assert "goes on at the start of epoch 1, after 4 steps, from epoch=0-step=4.ckpt" in error
    assert_same_run(folder / "whole", run)
    run = cut_and_go_on(folder, monkeypatch, loose, 6, "signal")  # there is no epoch to go on from
    assert "has no checkpoint to go on from: the run starts again, in a clean folder" in capsys.readouterr().err
    assert_same_run(folder / "whole", run)


def test_without_checkpoints_a_run_starts_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ["trainer.enable_checkpointing=false"]
    assert main(["run", "r.yaml", *none, "--out", "whole"]) == 0
    run = cut_and_go_on(folder, monkeypatch, none, 24, "signal")
    assert "has no checkpoint to go on from: the run starts again, in a clean folder" in capsys.readouterr().err
    assert rows(run) == rows(folder / "whole")
    assert not [*run.rglob("*.ckpt")]
    assert len([*(run / "metrics").glob("gradient_norm-*")]) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "r.yaml", "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        cut_short(patch, 24, "signal")
        assert main(["run", "r.yaml", "--out", "run"]) == 130
    newest = folder / "run" / "metrics" / "checkpoints" / "interrupted.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    assert main(["run", "--resume", "run"]) == 0
    error = capsys.readouterr().err
    assert "interrupted.ckpt is damaged and is not used" in error
    assert "goes on at the start of epoch 1" in error
    newest.unlink()
    assert_same_run(folder / "whole", folder / "run")


def test_what_has_ended_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "r.yaml", "trainer.max_epochs=1", "--out", "run"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    capsys.readouterr()
    assert main(["run", "--resume", "run"]) == 2
    assert "--resume: run has finished" in capsys.readouterr().err
    status = folder / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "diverged"))
    (folder / "run" / "diverged.ckpt").touch()
    assert main(["run", "--resume", "run"]) == 2
    error = capsys.readouterr().err
    assert "run has diverged, and would again: normzoo replay run finds out why" in error
    assert "its state then is in run/diverged.ckpt, from which a run with model.checkpoint=" in error
    with locked(folder / "run"):
        assert main(["run", "--resume", "run"]) == 2
    assert "run: another process is still running there" in capsys.readouterr().err
    (folder / "run" / "diverged.ckpt").unlink()
    files = [path for path in before if path.is_file() and path != status]
    assert all(path.stat().st_mtime_ns == before[path] for path in files)


def test_a_run_killed_after_its_training_only_reports(folder: Path) -> None:
    assert main(["run", "r.yaml", "--out", "whole"]) == 0
    shutil.copytree("whole", "run")
    status = folder / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    assert main(["run", "--resume", "run"]) == 0
    assert_same_run(folder / "whole", folder / "run")


@pytest.mark.slow
def test_a_point_of_a_sweep_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = ["r.yaml", "sweep={seed: [1, 2]}", "trainer.max_epochs=2"]
    monkeypatch.setattr("normzoo.cli.sweep._check", lambda *_: None)
    assert main(["sweep", *swept, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        cut_short(patch, 24, "signal")
        assert main(["sweep", *swept, "--out", "s"]) == 130
    assert not (folder / "s" / "02-seed=2").exists()
    assert main(["sweep", "--resume", "s"]) == 0
    for name in ("01-seed=1", "02-seed=2"):
        assert_same_run(folder / "whole" / name, folder / "s" / name)


@pytest.mark.slow
def test_ranks_go_on_with_streams_of_their_own(folder: Path) -> None:
    ranks = ["trainer.devices=2", "trainer.strategy=ddp_fork", "trainer.max_epochs=6", "trainer.limit_train_batches=20"]
    for name, cut in (("whole", False), ("run", True)):
        process = start_command(folder, "run", str(folder / "r.yaml"), *ranks, "--out", name)
        checkpoints = folder / name / "metrics" / "checkpoints"
        while cut and process.running and not [*checkpoints.glob("*.ckpt")]:
            time.sleep(0.01)
        if cut:
            os.killpg(process.pids[0], signal.SIGINT)
        assert process.ended_with(100) == [130 if cut else 0], process.output
    process = start_command(folder, "run", "--resume", "run")
    assert process.ended_with(100) == [0], process.output
    assert "goes on within epoch" in process.output
    assert_same_run(folder / "whole", folder / "run")


def test_a_checkpoint_with_classes_is_refused_and_nothing_is_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder / "run" / "metrics" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "run" / "recipe.yaml").write_text(RECIPE)
    torch.save({"normzoo": {}, "global_step": 1, "x": CutShort(0, "error")}, checkpoints / "a.ckpt")
    assert main(["run", "--resume", "run"]) == 2
    assert "holds more than tensors and plain values" in capsys.readouterr().err
    assert (checkpoints / "a.ckpt").exists()
